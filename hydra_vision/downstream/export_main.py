"""The commands `hydra-vision export-onnx` and `hydra-vision export-aoti`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from ..console import Parser, make_table, stdout_console
from ..errors import UserError
from ..features.options import add_model_options, backbone_from
from .export import TOLERANCE, export_aoti, export_onnx

__all__ = ['main']

_KINDS = {
    'onnx': (export_onnx, '.onnx', 'Write a model as ONNX, checked against onnxruntime on the CPU.'),
    'aoti': (export_aoti, '.pt2', 'Compile a model ahead of time for this CPU (AOTInductor package).'),
}


def main(kind: str, argv: Optional[Sequence[str]] = None, prog: str = 'hydra-vision export') -> int:
    """Run the command; `kind` is 'onnx' or 'aoti'.

    Returns:
        Exit code 0.

    Raises:
        UserError: arguments that do not fit, or an export that does not compute what the model computes.
    """
    export, suffix, description = _KINDS[kind]
    parser = Parser(prog=prog, description=description)
    add_model_options(parser, device=False)
    parser.add_argument('--output', type=Path, required=True, metavar='FILE', help=f'the {suffix} file')
    parser.add_argument('--dynamic-size', action='store_true', help='any height and width that the patch divides')
    parser.add_argument('--tolerance', type=float, default=TOLERANCE, help='difference to PyTorch (%(default)s)')
    parser.add_argument('--overwrite', action='store_true', help='replace an existing file')
    arguments = parser.parse_args(argv)
    if arguments.output.suffix != suffix:
        raise UserError(f'--output {arguments.output}; it must end in {suffix}')
    if arguments.dynamic_size and arguments.checkpoint is None:
        arguments.model_kwargs = [*arguments.model_kwargs, ('dynamic_img_size', True)]
    backbone = backbone_from(arguments)
    console = stdout_console()
    try:
        with console.status(f'exporting {backbone.name}'):
            report = export(
                backbone.model,
                arguments.output,
                img_size=backbone.img_size,
                dynamic_size=arguments.dynamic_size,
                overwrite=arguments.overwrite,
                tolerance=arguments.tolerance,
            )
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(str(error)) from error
    rows = [
        ['file', str(report.path)],
        ['size', f'{report.size / 2**20:.2f} MiB'],
        ['input', f'batch x {" x ".join(map(str, report.checked[0][1:]))}' + (' and others' * arguments.dynamic_size)],
        ['largest difference to PyTorch', f'{report.difference:.1e}'],
        ['one image', f'{report.milliseconds:.2f} ms (eager PyTorch {report.torch_milliseconds:.2f} ms)'],
        ['export took', f'{report.seconds:.0f} s'],
    ]
    console.print(make_table(f'{backbone.name}, weights: {backbone.weights}', ['', ''], rows))
    return 0

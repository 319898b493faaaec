"""The commands `hydra-vision export onnx` and `hydra-vision export aoti`."""

import argparse
from functools import partial

from ..console import make_table, path, stdout_console
from ..errors import UserError, first_line
from ..features.options import add_model_options, backbone_from
from ..io import check_output
from .export import TOLERANCE, export_aoti, export_onnx

__all__ = ['add_arguments', 'export_aoti_main', 'export_onnx_main']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of both commands."""
    add_model_options(parser, device=False)
    parser.add_argument('--output', type=path, required=True, metavar='FILE', help='.onnx or .pt2 file')
    parser.add_argument('--overwrite', action='store_true', help='replace an existing file')
    parser.add_argument('--dynamic-size', action='store_true', help='any height and width that the patch divides')
    parser.add_argument('--tolerance', type=float, default=TOLERANCE, help='difference to PyTorch (%(default)s)')


def _main(kind: str, arguments: argparse.Namespace) -> int:
    """Export a model."""
    export, suffix = {'onnx': (export_onnx, '.onnx'), 'aoti': (export_aoti, '.pt2')}[kind]
    check_output(arguments.output, (suffix,), overwrite=arguments.overwrite)
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
    except UserError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(first_line(error)) from error
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


export_onnx_main = partial(_main, 'onnx')
export_aoti_main = partial(_main, 'aoti')

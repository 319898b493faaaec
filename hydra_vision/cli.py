"""The console script `hydra-vision`. Each subcommand imports what it needs when it runs."""

import argparse
import fnmatch
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Optional

from .console import Parser
from .errors import UserError, nearest
from .version import __version__

__all__ = ['main']

PROG = 'hydra-vision'


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one subcommand.

    Args:
        argv: Arguments without the program's name; None takes them from the command line.

    Returns:
        Exit code: 0; 1 for work that had begun and failed, 2 for bad input (one line on stderr each); 130 after Ctrl-C.
            `train` stopped by a signal: 128 + its number.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Everything after the subcommand's name, --help too, belongs to the subcommand's own parser.
    arguments = _parser().parse_args(argv[:1])
    try:
        return _COMMANDS[arguments.command][0](argv[1:])
    except UserError as error:
        print(f'{PROG} {arguments.command}: error: {error}', file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hydra-vision models | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _env(argv: list[str]) -> int:
    parser = Parser(prog=f'{PROG} env', description=_COMMANDS['env'][1])
    parser.add_argument('--json', action='store_true', help='print JSON instead of tables')
    arguments = parser.parse_args(argv)
    from .console import make_table, stdout_console
    from .environment import environment

    facts = environment()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0

    console = stdout_console()
    console.print(
        make_table(
            'versions', ['package', 'version'], [[k, v or 'not installed'] for k, v in facts['versions'].items()]
        )
    )
    rows = []
    for device in facts['devices']:
        if device['device'] == 'cpu':
            detail = f'{device["threads"]} threads on {device["logical_cores"]} logical cores'
        else:
            detail = f'{device["memory_gib"]} GiB, compute capability {device["capability"]}'
        rows.append([device['device'], device['name'], detail])
    console.print(make_table('devices', ['device', 'name', ''], rows))
    rows = [
        [name, 'available' if backend['available'] else f'missing: {backend["missing"]}']
        for name, backend in facts['backends'].items()
    ]
    console.print(make_table('backends', ['backend', 'here'], rows))
    rows = [
        [kind, default['backend'], default['why'] + ('' if default['available'] else ' (not available: it will raise)')]
        for kind, default in facts['defaults'].items()
    ]
    console.print(make_table("what backend='auto' runs", ['device', 'backend', 'why'], rows))
    return 0


def _models(argv: list[str]) -> int:
    parser = Parser(prog=f'{PROG} models', description=_COMMANDS['models'][1])
    parser.add_argument('pattern', nargs='?', default='*', help="shell-style pattern, for example '*tiny*'")
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    arguments = parser.parse_args(argv)
    from .bench.counting import COUNTED, family_models
    from .console import make_table, stdout_console

    names = family_models()
    chosen = fnmatch.filter(names, arguments.pattern)
    if not chosen:
        raise UserError(f'no model matches {arguments.pattern!r}{nearest(arguments.pattern, names)}')
    rows = sorted((_describe_model(name) for name in chosen), key=lambda row: row['params_m'])
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = make_table(
        'models',
        ['name', 'params (M)', 'GMACs', 'input size', 'weights'],
        [
            [
                row['name'],
                f'{row["params_m"]:.2f}',
                f'{row["gmacs"]:.2f}',
                ' x '.join(map(str, row['input_size'])),
                row['weights'] or 'none',
            ]
            for row in rows
        ],
        right=(1, 2),
    )
    console = stdout_console()
    console.print(table)
    console.print(f'GMACs: {COUNTED}')
    return 0


def _describe_model(name: str) -> dict[str, Any]:
    from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

    from .bench.counting import count_model

    tags = [cfg.tag for cfg in get_arch_pretrained_cfgs(name).values() if cfg.has_weights]
    input_size = get_pretrained_cfg(name).input_size
    counts = count_model(name)
    return {
        'name': name,
        'params_m': round(counts.parameters / 1e6, 3),
        'gmacs': round(counts.flops / 2e9, 4),
        'input_size': list(input_size),
        'weights': ', '.join(tags) or None,
    }


def _train(argv: list[str]) -> int:
    from .train.main import main as train

    return train(argv, prog=f'{PROG} train')


def _compare_runs(argv: list[str]) -> int:
    from .train import runs

    parser = Parser(prog=f'{PROG} compare-runs', description=_COMMANDS['compare-runs'][1])
    runs.add_compare_arguments(parser)
    return runs.compare_main(parser.parse_args(argv))


def _average_checkpoints(argv: list[str]) -> int:
    from .train import runs

    parser = Parser(prog=f'{PROG} average-checkpoints', description=_COMMANDS['average-checkpoints'][1])
    runs.add_average_arguments(parser)
    return runs.average_main(parser.parse_args(argv))


def _export_run(argv: list[str]) -> int:
    from .train import runs

    parser = Parser(prog=f'{PROG} export-run', description=_COMMANDS['export-run'][1])
    runs.add_export_arguments(parser)
    return runs.export_main(parser.parse_args(argv))


def _bench(argv: list[str]) -> int:
    from .bench.main import main as bench

    return bench(argv, prog=f'{PROG} bench')


def _ablation(argv: list[str]) -> int:
    from .bench.ablation.main import main as ablation

    return ablation(argv, prog=f'{PROG} ablation')


def _efficiency_length(argv: list[str]) -> int:
    from .bench.efficiency.main import main as efficiency_length

    return efficiency_length(argv, prog=f'{PROG} efficiency-length')


def _show_matrix(argv: list[str]) -> int:
    from .visualize.main import main as visualize

    return visualize(argv, prog=f'{PROG} show-matrix', kind='matrix')


def _extract(argv: list[str]) -> int:
    return importlib.import_module('hydra_vision.features.main').main(argv)


def _knn(argv: list[str]) -> int:
    return importlib.import_module('hydra_vision.eval.main').knn_main(argv)


def _probe(argv: list[str]) -> int:
    return importlib.import_module('hydra_vision.eval.main').probe_main(argv)


def _visualize(argv: list[str]) -> int:
    return importlib.import_module('hydra_vision.visualize.main').main(argv)


def _tune(argv: list[str]) -> int:
    import torch

    from .ops.dispatch import backend_reasons

    if torch.cuda.is_available():
        reason = backend_reasons()['triton']
    else:  # Triton's interpreter would do for the backend, but its times mean nothing
        reason = 'no CUDA device is visible'
    if reason is not None:
        raise UserError(f'measuring launch parameters needs the Triton kernels on a GPU: {reason}')
    return importlib.import_module('hydra_vision.ops.triton.tune').main(argv, prog=f'{PROG} tune')


def _segment(argv: list[str]) -> int:
    from .downstream.segment import main as segment

    return segment(argv, prog=f'{PROG} segment')


def _export_onnx(argv: list[str]) -> int:
    from .downstream.export_main import main as export

    return export('onnx', argv, prog=f'{PROG} export-onnx')


def _export_aoti(argv: list[str]) -> int:
    from .downstream.export_main import main as export

    return export('aoti', argv, prog=f'{PROG} export-aoti')


_COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    'env': (_env, 'Versions, devices, backends and the default that runs on each device.'),
    'models': (_models, 'The registered Hydra models: parameters, GMACs, input size, weights.'),
    'train': (_train, 'Train, resume or validate; without arguments on a small built-in data set.'),
    'compare-runs': (_compare_runs, 'Put finished training runs side by side: table and curves.'),
    'average-checkpoints': (_average_checkpoints, 'Average the weights of several checkpoints.'),
    'export-run': (_export_run, 'Write a finished run as a folder that timm and transformers open.'),
    'bench': (_bench, 'Time models, or the operator alone, against their peers.'),
    'ablation': (_ablation, "Train a family of mixers at equal parameters: the paper's tables for images."),
    'efficiency-length': (_efficiency_length, 'From which length on each mixer costs less than attention.'),
    'show-matrix': (_show_matrix, 'Draw the mixing matrices of a block on an image, and where one patch looks.'),
    'extract': (_extract, 'Write features of images to .npy, .safetensors or .parquet.'),
    'knn': (_knn, 'Nearest-neighbour accuracy of features.'),
    'probe': (_probe, 'Accuracy of a linear classifier on features.'),
    'export-onnx': (_export_onnx, 'Write a model as ONNX, checked against onnxruntime.'),
    'export-aoti': (_export_aoti, 'Compile a model ahead of time for this CPU.'),
    'segment': (_segment, 'Train a semantic segmenter on a folder of images and masks.'),
    'visualize': (_visualize, 'Pictures of features, receptive fields, class maps, mixing matrices.'),
    'tune': (_tune, 'Measure a launch table of the Triton kernels for this GPU.'),
}


def _parser() -> Parser:
    width = max(map(len, _COMMANDS))
    lines = [f'  {name:<{width}}  {text}' for name, (_, text) in _COMMANDS.items()]
    parser = Parser(
        prog=PROG,
        usage=f'{PROG} [--version] [--help] COMMAND ...',
        description='Hydra-ViT vision backbones for timm.',
        epilog='commands:\n' + '\n'.join(lines) + f'\n\n`{PROG} COMMAND --help` describes each.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=f'hydra_vision {__version__}')
    parser.add_argument('command', metavar='COMMAND', type=_command_name, help='one of those below')
    return parser


def _command_name(name: str) -> str:
    if name not in _COMMANDS:
        raise argparse.ArgumentTypeError(
            f'unknown command {name!r}{nearest(name, _COMMANDS)}; commands: {", ".join(_COMMANDS)}'
        )
    return name


if __name__ == '__main__':
    sys.exit(main())

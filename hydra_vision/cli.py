"""The console script `hydra-vision`. Each command imports what it needs when it runs."""

import argparse
import contextlib
import fnmatch
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .console import Parser, make_table, stdout_console
from .errors import UserError, first_line, nearest, user_text
from .version import __version__

__all__ = ['guarded', 'main']

PROG = 'hydra-vision'


class Command(NamedTuple):
    """A command: `module.add(parser)` adds its arguments; `module.run(arguments)` returns the exit code, 0 if nothing
    else is said, and raises UserError for arguments that do not fit.

    Without `add`, the module parses by itself: `module.run(argv, prog=...)`.
    """

    text: str
    example: str
    module: str
    add: str | None = 'add_arguments'
    run: str = 'main'


class Group(NamedTuple):
    """Commands that belong together."""

    text: str
    commands: Mapping[str, Command]


_RUNS = {
    'compare': Command(
        'Put finished training runs next to each other: table and curves.',
        'runs compare output/first output/second --output comparison',
        'train.runs',
        'add_compare_arguments',
        'compare_main',
    ),
    'average': Command(
        'Average the weights of several checkpoints.',
        'runs average output/run/checkpoints/*.pt --output averaged.pt',
        'train.runs',
        'add_average_arguments',
        'average_main',
    ),
    'export': Command(
        'Write a finished run as a folder that timm and transformers open.',
        'runs export output/run --output model',
        'train.runs',
        'add_export_arguments',
        'export_main',
    ),
}
_PROBE = {
    'knn': Command(
        'Classify test images by their nearest training images; nothing is trained.',
        'probe knn sklearn/digits/train sklearn/digits/test --model hydra_vit_nano --random-init --img-size 64',
        'eval.main',
        'add_knn_arguments',
        'knn_main',
    ),
    'linear': Command(
        'Train a linear classifier on frozen features and judge it on others.',
        'probe linear train.npy test.npy',
        'eval.main',
        'add_linear_arguments',
        'linear_main',
    ),
}
_SEGMENT = {
    'train': Command(
        'Train an smp decoder on a timm backbone. DATA holds train/, val/ and test/, each with images/NAME.jpg and '
        'masks/NAME.png, and classes.txt.',
        'segment train DATA --model hydra_vit_tiny --crop 352x480 --output output/segment',
        'downstream.segment',
        'add_train_arguments',
        'train_main',
    ),
    'time': Command(
        'Time a segmenter on random images: training and inference.',
        'segment time --model hydra_vit_tiny --crop 256x256 --batch-size 2 --output output/speed',
        'downstream.segment',
        'add_time_arguments',
        'time_main',
    ),
    'compare': Command(
        'A table and a picture of finished runs.',
        'segment compare output/hydra output/vit --output comparison',
        'downstream.segment',
        'add_compare_arguments',
        'compare_main',
    ),
}
_EXPORT = {
    'onnx': Command(
        'Write a model as ONNX, checked against onnxruntime on the CPU.',
        'export onnx --model hydra_vit_tiny --random-init --output tiny.onnx',
        'downstream.export_main',
        run='export_onnx_main',
    ),
    'aoti': Command(
        'Compile a model ahead of time for this CPU (AOTInductor package).',
        'export aoti --model hydra_vit_tiny --random-init --output tiny.pt2',
        'downstream.export_main',
        run='export_aoti_main',
    ),
}
_COMMANDS: dict[str, Command | Group] = {
    'env': Command(
        'Versions, devices, backends and the default that runs on each device.',
        'env --json',
        'cli',
        '_add_env_arguments',
        '_env',
    ),
    'models': Command(
        'The registered Hydra models: parameters, GMACs, input size, weights.',
        "models '*tiny*'",
        'cli',
        '_add_models_arguments',
        '_models',
    ),
    'train': Command(
        'Train, resume or validate; without arguments on a small built-in data set.',
        'train --data-dir imagenet --model hydra_vit_tiny --output output/tiny',
        'train.main',
        None,
    ),
    'runs': Group('Finished training runs: compare, average, export.', _RUNS),
    'extract': Command(
        'Write the features of images to a file. Run it again to continue after an interruption.',
        'extract photos --model vit_tiny_patch16_224 --output features.npy',
        'features.main',
    ),
    'probe': Group('Accuracy of frozen features: knn, linear.', _PROBE),
    'segment': Group('Semantic segmentation: train, time, compare.', _SEGMENT),
    'export': Group('Checked exports: onnx, aoti.', _EXPORT),
    'visualize': Command(
        'Pictures of features, receptive fields, class maps, mixing matrices.',
        'visualize matrix sklearn/photos --model hydra_vit_tiny --random-init --output matrix.png',
        'visualize.main',
    ),
    'bench': Command(
        'Time any timm models next to each other, inference and training.',
        'bench --models hydra_vit_tiny,vit_tiny_patch16_224 --img-sizes 224,512x256 --mode infer,train',
        'bench',
    ),
    'tune': Command(
        'Measure launch parameters of the Triton kernels for this GPU.', 'tune --length 196', 'cli', None, '_tune'
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None takes them from the command line.

    Returns:
        Exit code: 0; 2 for wrong arguments, 1 where what they name failed (data, a checkpoint, the disk, memory), one
        line on stderr each; 130 after Ctrl-C. `train` stopped by a signal: 128 + its number.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = PROG

    def run() -> int:
        nonlocal name
        name, command, rest = _find(argv)
        return _run(name, command, rest)

    return guarded(run, lambda: name)


def guarded(run: Callable[[], int], name: Callable[[], str]) -> int:
    """Run a command whose errors are a line on stderr each.

    Args:
        run: Returns the exit code.
        name: Returns what stands before the errors.

    Returns:
        Exit code, as that of ``main``.
    """
    _prepare_streams()
    code = 0
    try:
        code = run()
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f'{name()}: error: {user_text(error)}', file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hydra-vision models | head`: the reader has what it wanted
        _silence()
        return code
    except (OSError, MemoryError) as error:  # a full disk behind stdout, a file that vanished
        _silence()
        print(f'{name()}: error: {first_line(error)}', file=sys.stderr)
        return 1


def _prepare_streams() -> None:
    """Make stdout and stderr take what is written: they may be closed, and file names need not be UTF-8."""
    for stream in ('stdout', 'stderr'):
        if getattr(sys, stream) is None:  # closed by the shell: `>&-`
            setattr(sys, stream, open(os.devnull, 'w'))  # noqa: SIM115
        elif isinstance(getattr(sys, stream), io.TextIOWrapper):
            getattr(sys, stream).reconfigure(errors='backslashreplace')


def _silence() -> None:
    """What is still in stdout's buffer cannot be written: without this, Python says so when it ends."""
    with contextlib.suppress(OSError, ValueError):  # not a file of the system
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _find(argv: list[str]) -> tuple[str, Command, list[str]]:
    """The command that the first words name, with its full name and the words after it."""
    name, commands = PROG, _COMMANDS
    text = 'Hydra-ViT vision backbones for timm.'
    while True:
        # Everything after a command's name, --help too, belongs to the command's own parser.
        word = _parser(name, text, commands).parse_args(argv[:1]).command
        name, argv, found = f'{name} {word}', argv[1:], commands[word]
        if isinstance(found, Command):
            return name, found, argv
        text, commands = found


def _run(name: str, command: Command, argv: list[str]) -> int:
    module = importlib.import_module(f'.{command.module}', __package__)
    run = getattr(module, command.run)
    if command.add is None:
        return run(argv, prog=name)
    parser = Parser(prog=name, description=command.text, example=f'{PROG} {command.example}')
    getattr(module, command.add)(parser)
    return run(parser.parse_args(argv))


def _parser(name: str, text: str, commands: Mapping[str, Command | Group]) -> Parser:
    width = max(map(len, commands))
    lines = [f'  {word:<{width}}  {command.text}' for word, command in commands.items()]
    parser = Parser(
        prog=name,
        usage=f'{name} [--help] COMMAND ...',
        description=text,
        epilog='commands:\n' + '\n'.join(lines) + f'\n\n`{name} COMMAND --help` describes each, with an example.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if name == PROG:
        parser.usage = f'{name} [--version] [--help] COMMAND ...'
        parser.add_argument('--version', action='version', version=f'hydra_vision {__version__}')

    def known(word: str) -> str:
        if word not in commands:
            raise argparse.ArgumentTypeError(
                f'unknown command {word!r}{nearest(word, commands)}; commands: {", ".join(commands)}'
            )
        return word

    parser.add_argument('command', metavar='COMMAND', type=known, help='one of those below')
    return parser


def _tune(argv: list[str], prog: str) -> int:
    import torch

    from .ops.dispatch import backend_reasons

    if not {'-h', '--help'} & {*argv}:
        # Triton's interpreter would do for the backend, but its times mean nothing.
        reason = backend_reasons()['triton'] if torch.cuda.is_available() else 'no CUDA device is visible'
        if reason is not None:
            raise UserError(f'measuring launch parameters needs the Triton kernels on a GPU: {reason}')
    return importlib.import_module('.ops.triton.tune', __package__).main(argv, prog=prog)


def _add_env_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--json', action='store_true', help='print JSON instead of tables')


def _env(arguments: argparse.Namespace) -> int:
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


def _add_models_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('pattern', nargs='?', default='*', help="shell-style pattern, for example '*tiny*'")
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')


def _models(arguments: argparse.Namespace) -> int:
    from .flops import COUNTED, family_models

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

    from .flops import count_model

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


if __name__ == '__main__':
    sys.exit(main())

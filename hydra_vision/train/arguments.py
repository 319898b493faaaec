"""The command line of training: a recipe, overrides of any field, and what to do with it."""

import argparse
import typing
from collections.abc import Sequence

from hydra_vision.errors import ConfigError, nearest
from hydra_vision.train.config import keys

# flag -> the recipe field that it sets; everything else goes through --set
_FLAGS = {
    '--data-dir': ('data.dir', 'PATH', 'folder with train/ and val/, a sub-folder a class'),
    '--model': ('model.name', 'NAME', 'timm model name'),
    '--num-classes': ('model.num_classes', 'N', 'classes of the data set'),
    '--img-size': ('data.img_size', 'N', 'image size in pixels'),
    '--epochs': ('schedule.epochs', 'N', 'epochs, warm-up included'),
    '--batch-size': ('data.batch_size', 'N', 'images a step'),
    '--accum-steps': ('optim.accum_steps', 'N', 'steps an update'),
    '--lr': ('optim.lr', 'X', 'learning rate'),
    '--workers': ('data.workers', 'N', 'loader processes'),
    '--device': ('run.device', 'NAME', 'auto, cpu, cuda, cuda:1, ...'),
    '--amp': ('run.amp', 'TYPE', 'auto, none, bf16 or fp16'),
    '--compile': ('run.torch_compile', 'BOOL', 'true compiles the model'),
    '--seed': ('run.seed', 'N', 'random seed'),
}


INITIAL = 'initial weights'  # what --validate evaluates without a checkpoint


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours, so that the same main serves two commands and tests."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f'{message} (see {self.prog} --help)')


class _Override(argparse.Action):
    """Appends (source, 'key=value') to one list, so that the last word on the command line wins."""

    def __call__(self, parser, namespace, values, option_string=None):
        text = values if option_string == '--set' else f'{_FLAGS[option_string][0]}={values}'
        namespace.overrides = [*namespace.overrides, (option_string, text)]


def parse_arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Parses a command line.

    Raises:
        ConfigError: an unknown flag, which names the nearest valid one.
    """
    parser = _Parser(
        prog=prog,
        description='Train an image classifier. Without arguments: a demonstration on handwritten digits.',
        epilog='Every field of a recipe with its meaning: --print-config. Packaged recipes: --list-configs.',
        allow_abbrev=False,
    )
    parser.set_defaults(overrides=[])
    parser.add_argument('--config', metavar='NAME|PATH', help='packaged recipe or YAML file')
    parser.add_argument('--output', metavar='DIR', help='run folder (default: output/RECIPE, numbered if taken)')
    parser.add_argument(
        '--resume', metavar='auto|PATH', help='continue from a checkpoint; auto: the last one of the run folder, if any'
    )
    parser.add_argument(
        '--validate',
        nargs='?',
        const=INITIAL,
        metavar='CHECKPOINT',
        help="evaluate a checkpoint (or the best one of a folder); none: the recipe's initial weights",
    )
    measure = parser.add_mutually_exclusive_group()
    measure.add_argument('--dry-run', action='store_true', help='train a few updates, print what the run would take')
    measure.add_argument(
        '--bench-data', action='store_true', help='measure the loader and the device, each alone: which is the limit'
    )
    parser.add_argument('--json', action='store_true', help='with --validate: print the result as JSON')
    parser.add_argument('--set', action=_Override, metavar='KEY=VALUE', help='set any field, e.g. optim.lr=5e-4')
    parser.add_argument('--print-config', action='store_true', help='print the recipe after all overrides, and stop')
    parser.add_argument('--list-configs', action='store_true', help='print the names of the packaged recipes, and stop')
    fields = parser.add_argument_group('recipe fields')
    for flag, (key, metavar, text) in _FLAGS.items():
        fields.add_argument(flag, action=_Override, metavar=metavar, help=f'{text} ({key})')
    arguments, unknown = parser.parse_known_args(argv)
    for word in unknown:
        name = word.split('=')[0]
        if name.lstrip('-') in set(keys()):
            raise ConfigError(f'unknown flag {name}: write --set {name.lstrip("-")}=VALUE')
        if name.startswith('-'):
            raise ConfigError(f'unknown flag {name}{nearest(name, parser._option_string_actions)}')
        raise ConfigError(f'unexpected argument {word!r} (see {prog} --help)')
    if arguments.json and not arguments.validate:
        raise ConfigError('--json goes with --validate')
    if (arguments.dry_run or arguments.bench_data) and (arguments.validate or arguments.output):
        raise ConfigError('--dry-run and --bench-data write and validate nothing: leave out --output and --validate')
    if arguments.validate and (arguments.resume or arguments.output):
        raise ConfigError('--validate writes nothing and resumes nothing: leave out --resume and --output')
    return arguments

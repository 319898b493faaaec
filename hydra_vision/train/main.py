"""The training command: reads the recipe, picks the run folder, trains, resumes or validates."""

import argparse
import json
import shutil
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from ..errors import CheckpointError, ConfigError, UserError, nearest, user_text
from ..io import write_text
from .checkpoint import (
    BEST,
    checkpoint_to_resume,
    find_checkpoint,
    load_run,
    prepare_to_resume,
    remove_leftovers,
    run_folder,
)
from .config import Config, check_values, keys, merge, parse_override, read_recipe, recipe_names
from .distributed import World, connected, world_from_environment
from .signals import Stopped

if TYPE_CHECKING:
    from .engine import Trainer

DEMO = 'hydra_vit_nano_digits'
MAIN = 'hydra_vit_base_imagenet1k'
INITIAL = 'initial weights'  # what --validate evaluates without a checkpoint

# flag -> the recipe field that it sets; everything else goes through --set
_FLAGS = {
    '--data-dir': ('data.dir', 'PATH', 'folder with train/ and val/, one subfolder per class'),
    '--model': ('model.name', 'NAME', 'timm model name'),
    '--num-classes': ('model.num_classes', 'N', 'classes of the data set'),
    '--img-size': ('data.img_size', 'N', 'image size in pixels'),
    '--epochs': ('schedule.epochs', 'N', 'epochs, warmup included'),
    '--batch-size': ('data.batch_size', 'N', 'images per batch, over all processes'),
    '--accum-steps': ('optim.accum_steps', 'N', 'batches per optimizer step'),
    '--lr': ('optim.lr', 'X', 'learning rate'),
    '--workers': ('data.workers', 'N', 'loader processes'),
    '--device': ('run.device', 'NAME', 'auto, cpu, cuda, cuda:1, ...'),
    '--amp': ('run.amp', 'TYPE', 'auto, none, bf16 or fp16'),
    '--compile': ('run.torch_compile', 'BOOL', 'true compiles the model'),
    '--seed': ('run.seed', 'N', 'random seed'),
}


# Command line


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError, so that all processes of a run end with one message."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f'{message} (see {self.prog} --help)')


class _Override(argparse.Action):
    """Appends (source, 'key=value') to one list, so that the last one on the command line wins."""

    def __call__(self, parser, namespace, values, option_string=None):
        text = values if option_string == '--set' else f'{_FLAGS[option_string][0]}={values}'
        namespace.overrides = [*namespace.overrides, (option_string, text)]


def parse_arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Parse a command line.

    Raises:
        ConfigError: An unknown flag, naming the nearest valid one.
    """
    parser = _Parser(
        prog=prog,
        description='Train an image classifier. Without arguments: a demonstration on handwritten digits.',
        epilog='Every field of a recipe with its meaning: --print-config. Packaged recipes: --list-configs.\n\n'
        f'example:\n  {prog} --data-dir PATH --config hydra_vit_tiny_imagenet1k --output runs/tiny',
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
        help="evaluate a checkpoint (or the best one of a folder); without one: the recipe's initial weights",
    )
    measure = parser.add_mutually_exclusive_group()
    measure.add_argument('--dry-run', action='store_true', help='train a few steps, print what the run would take')
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
    for flag in ('config', 'output', 'resume', 'validate'):
        if getattr(arguments, flag) == '':  # an unset shell variable
            raise ConfigError(f"--{flag}='' is empty")
    if arguments.json and not arguments.validate:
        raise ConfigError('--json needs --validate')
    if (arguments.dry_run or arguments.bench_data) and (arguments.validate or arguments.output):
        raise ConfigError('--dry-run and --bench-data write and validate nothing: leave out --output and --validate')
    if arguments.validate and (arguments.resume or arguments.output):
        raise ConfigError('--validate writes nothing and resumes nothing: leave out --resume and --output')
    return arguments


def read_overrides(overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Merge (source, 'key=value') pairs in order, each checked on its own so that the error names its flag."""
    merged: dict[str, Any] = {}
    for source, text in overrides:
        values = parse_override(text, source)
        check_values(values, source)
        merged = merge(merged, values)
    return merged


# What it does


def main(argv: Sequence[str] | None = None, prog: str = 'train_imagenet.py') -> int:
    """Run the training command.

    Args:
        argv: Arguments, without the program's name; None takes them from the command line.
        prog: Name of the program in help and error messages.

    Returns:
        Exit code: 0, 1 for a run that failed, 2 for a wrong recipe or command line, 130 after Ctrl-C, 128 + the number
        of the signal for a run that was stopped by one and saved (SIGTERM 143, SIGUSR1 138).
    """
    errors = Console(stderr=True, highlight=False, markup=False)
    world = World()
    try:
        world = world_from_environment()
        console = Console(highlight=False, markup=False, quiet=not world.primary)
        with connected(world):
            with world.together():
                arguments = parse_arguments(argv, prog)
                overrides = read_overrides(arguments.overrides)
            return _run(arguments, overrides, console, world)
    except RuntimeError as error:
        from .data import loader_death

        death = loader_death(error)
        if death is None:
            raise
        errors.print(f'error: {death}', soft_wrap=True)
        return death.exit_code
    except UserError as error:
        if world.primary or not error.shared:
            rank = '' if world.primary else f' (rank {world.rank})'
            errors.print(f'error: {user_text(error)}{rank}', soft_wrap=True)
        return error.exit_code
    except Stopped as stopped:
        if world.primary:
            name = signal.Signals(stopped.signal).name
            errors.print(
                f'stopped by {name}; saved {stopped.path} (epochs done: {stopped.epoch}, step {stopped.updates}); the '
                f'same command with --resume auto continues there',
                soft_wrap=True,
            )
        return 128 + stopped.signal
    except KeyboardInterrupt:
        text = 'interrupted; the same command with --resume auto continues after the last checkpoint'
        if world.primary:
            errors.print(text, soft_wrap=True)
        return 130


def _run(arguments: argparse.Namespace, overrides: dict[str, Any], console: Console, world: World) -> int:
    if arguments.list_configs:
        console.print('\n'.join(recipe_names()))
        return 0
    if arguments.validate:
        return _validate(arguments, overrides, console, world)
    recipe = _recipe(arguments, overrides)
    with world.together():
        recipe_values = read_recipe(recipe)
    checkpoint, state = _resumed(arguments, Path(recipe).stem, console, world)
    if state is None:
        values, source = recipe_values, recipe
    else:  # the run's own recipe; another one only where it was asked for
        source = str(checkpoint)
        values = merge(state['config'], recipe_values) if arguments.config else state['config']
    with world.together():
        config = Config.from_dict(merge(values, overrides), source=source)
    if arguments.print_config:
        console.print(config.to_yaml(comments=True), soft_wrap=True, end='')
        return 0
    if config.schedule.epochs == 0:
        raise ConfigError('schedule.epochs=0 trains nothing; add --validate to evaluate the initial weights').of_all()
    if arguments.dry_run or arguments.bench_data:
        return _measure(arguments, config, state, console, world)
    folder = None
    with world.together():
        folder = run_folder(arguments.output, checkpoint, Path(recipe).stem) if world.primary else None
    folder = world.broadcast(folder)
    if state is not None:
        _print_changes(state['config'], config.to_dict(), console)
    return _train(config, folder, checkpoint, state, console, world)


def _recipe(arguments: argparse.Namespace, overrides: dict[str, Any]) -> str:
    """The recipe of a command line: ImageNet's where it names data, else the demonstration."""
    return arguments.config or (MAIN if {'dir', 'name'} & overrides.get('data', {}).keys() else DEMO)


def _resumed(
    arguments: argparse.Namespace, name: str, console: Console, world: World
) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint that --resume means, which rank 0 chooses and every process reads from the shared folder."""
    path, state = None, None
    with world.together():
        if world.primary:
            path, state, problems = checkpoint_to_resume(arguments.resume, arguments.output, name)
            for problem in problems:
                console.print(f'warning: {problem}; continuing from {path}', highlight=False, soft_wrap=True)
    path = world.broadcast(path)
    with world.together():
        if path is not None and state is None:
            state = load_run(path)
    return path, state


def _train(
    config: Config,
    folder: Path,
    checkpoint: Path | None,
    state: dict[str, Any] | None,
    console: Console,
    world: World,
) -> int:
    from .engine import Trainer  # timm: not before the recipe is known to be right

    created = not folder.exists()
    with world.together():
        if world.primary:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f'cannot create the output folder {folder}: {error}') from error
    try:
        trainer = Trainer(config, folder, console, state, world)
        with world.together():
            if world.primary:
                _prepare(folder, trainer, checkpoint, state, console)
    except UserError as error:
        error.of_all()  # what `together` does not cover follows from the recipe and the checkpoint alone
        if created and world.primary:
            shutil.rmtree(folder, ignore_errors=True)  # nothing was started: leave no empty run behind
        raise
    trainer.run()
    return 0


def _prepare(
    folder: Path, trainer: 'Trainer', checkpoint: Path | None, state: dict[str, Any] | None, console: Console
) -> None:
    """Prepare a run folder before training starts."""
    from .report import write_run, write_summary

    remove_leftovers(folder)
    write_text(folder / 'config.yaml', trainer.config.to_yaml())
    write_run(folder, trainer.facts(), trainer.device)
    if state is None:
        return
    write_summary(folder, trainer.history)  # the process before may have been killed between checkpoint and summary
    for path in prepare_to_resume(checkpoint, state, folder):
        console.print(f'renamed: {path}', highlight=False, soft_wrap=True)


def _measure(
    arguments: argparse.Namespace, config: Config, state: dict[str, Any] | None, console: Console, world: World
) -> int:
    from .engine import Trainer
    from .measure import bench_data, dry_run

    if arguments.bench_data and world.size > 1:  # it runs for a time, in which each process takes its own steps
        raise ConfigError(f'--bench-data measures one process, not {world.size}: start it without torchrun').of_all()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder), console, state, world)
        (dry_run if arguments.dry_run else bench_data)(trainer)
    return 0


def _validate(arguments: argparse.Namespace, overrides: dict[str, Any], console: Console, world: World) -> int:
    from . import report
    from .evaluate import initial_state, validate

    if arguments.validate == INITIAL:
        path, recipe = INITIAL, _recipe(arguments, overrides)
        config = Config.from_dict(merge(read_recipe(recipe), overrides), source=recipe)
        state = initial_state(config, world)
    else:
        path = find_checkpoint(arguments.validate, BEST)
        state = load_run(path)
        values = merge(state['config'], read_recipe(arguments.config)) if arguments.config else state['config']
        config = Config.from_dict(merge(values, overrides), source=str(path))
    quiet = Console(stderr=True, quiet=not world.primary)
    results = validate(config, state, quiet if arguments.json else console, world)
    if not world.primary:
        return 0
    if arguments.json:
        result = {'checkpoint': str(path), 'model': state['arch'], 'epoch': state['epoch'], 'results': results}
        print(json.dumps(result, indent=2))
    else:
        title = f'{path} ({state["arch"]}, epoch {state["epoch"]})'
        report.print_table(console, title, report.RESULT_HEADER, report.result_rows(results))
    return 0


def _print_changes(before: dict[str, Any], after: dict[str, Any], console: Console) -> None:
    """Print every field that a resumed run does not take from its checkpoint."""
    for section, values in after.items():
        for key, value in values.items():
            old = before.get(section, {}).get(key)
            if old != value:
                console.print(f'resuming with {section}.{key}: {old} -> {value}', soft_wrap=True)

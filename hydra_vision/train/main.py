"""The training command: reads the recipe, picks the run folder, trains, resumes or validates."""

import argparse
import json
import shutil
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hydra_vision.errors import CheckpointError, ConfigError, TrainError
from hydra_vision.io import write_text
from hydra_vision.train.arguments import INITIAL, parse_arguments
from hydra_vision.train.checkpoint import BEST, find_checkpoint, load_checkpoint, remove_leftovers, set_aside
from hydra_vision.train.config import Config, check_values, merge, parse_override
from hydra_vision.train.distributed import World, connected, world_from_environment
from hydra_vision.train.errors import Stopped, loader_death
from hydra_vision.train.recipes import read_recipe, recipe_names
from hydra_vision.train.runs import checkpoint_to_resume, run_folder, settle

if TYPE_CHECKING:
    from hydra_vision.train.engine import Trainer

DEMO = 'hydra_vit_nano_digits'
MAIN = 'hydra_vit_base_imagenet1k'


def main(argv: Sequence[str] | None = None, prog: str = 'train_imagenet.py') -> int:
    """Runs the training command.

    Args:
        argv: arguments, without the program's name; None takes them from the command line.
        prog: name of the program in help and error messages.

    Returns:
        Exit code: 0, 1 for a run that failed, 2 for a wrong recipe or command line, 130 after Ctrl-C, 128 + the number
        of the signal that a run was stopped and saved by (SIGTERM 143, SIGUSR1 138).
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
        death = loader_death(error)
        if death is None:
            raise
        errors.print(f'error: {death}', soft_wrap=True)
        return death.exit_code
    except TrainError as error:
        if world.primary or not error.shared:
            rank = '' if world.primary else f' (rank {world.rank})'
            errors.print(f'error: {_one_line(error)}{rank}', soft_wrap=True)
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
        raise ConfigError('schedule.epochs=0 trains nothing; add --validate to evaluate the initial weights')
    if arguments.dry_run or arguments.bench_data:
        return _measure(arguments, config, state, console, world)
    folder = None
    with world.together():
        folder = run_folder(arguments.output, checkpoint, Path(recipe).stem) if world.primary else None
    folder = world.broadcast(folder)
    if state is not None:
        _tell_changes(state['config'], config.to_dict(), console)
    return _train(config, folder, checkpoint, state, console, world)


def _recipe(arguments: argparse.Namespace, overrides: dict[str, Any]) -> str:
    """The recipe that a command line means: ImageNet's where it names data, else the demonstration."""
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
                console.print(f'warning: {problem}; going on from {path}', highlight=False, soft_wrap=True)
    path = world.broadcast(path)
    with world.together():
        if path is not None and state is None:
            state = load_checkpoint(path)
    return path, state


def read_overrides(overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Merges (source, 'key=value') pairs in order, each checked on its own so that the error names its flag."""
    merged: dict[str, Any] = {}
    for source, text in overrides:
        values = parse_override(text, source)
        check_values(values, source)
        merged = merge(merged, values)
    return merged


def _train(
    config: Config,
    folder: Path,
    checkpoint: Path | None,
    state: dict[str, Any] | None,
    console: Console,
    world: World,
) -> int:
    from hydra_vision.train.engine import Trainer  # timm: not before the recipe is known to be right

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
    except TrainError as error:
        error.of_all()  # what `together` does not cover follows from the recipe and the checkpoint alone
        if created and world.primary:
            shutil.rmtree(folder, ignore_errors=True)  # nothing was started: leave no empty run behind
        raise
    trainer.run()
    return 0


def _prepare(
    folder: Path, trainer: 'Trainer', checkpoint: Path | None, state: dict[str, Any] | None, console: Console
) -> None:
    """What a run folder holds before training starts."""
    from hydra_vision.train.provenance import write_run
    from hydra_vision.train.report import write_summary

    remove_leftovers(folder)
    write_text(folder / 'config.yaml', trainer.config.to_yaml())
    write_run(folder, trainer.facts(), trainer.device)
    if state is None:
        return
    write_summary(folder, trainer.history)  # the process before may have been killed between checkpoint and summary
    best = settle(checkpoint, state, folder)
    for path in [*set_aside(folder, state['updates']), *([] if best is None else [best])]:
        console.print(f'set aside: {path}', highlight=False, soft_wrap=True)


def _measure(
    arguments: argparse.Namespace, config: Config, state: dict[str, Any] | None, console: Console, world: World
) -> int:
    from hydra_vision.train.engine import Trainer
    from hydra_vision.train.measure import bench_data, dry_run

    if arguments.bench_data and world.size > 1:  # it runs for a time, in which each process takes its own steps
        raise ConfigError(f'--bench-data measures one process, not {world.size}: start it without torchrun').of_all()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder), console, state, world)
        (dry_run if arguments.dry_run else bench_data)(trainer)
    return 0


def _validate(arguments: argparse.Namespace, overrides: dict[str, Any], console: Console, world: World) -> int:
    from hydra_vision.train import report
    from hydra_vision.train.validation import initial_state, validate

    if arguments.validate == INITIAL:
        path, recipe = INITIAL, _recipe(arguments, overrides)
        config = Config.from_dict(merge(read_recipe(recipe), overrides), source=recipe)
        state = initial_state(config, world)
    else:
        path = find_checkpoint(arguments.validate, BEST)
        state = load_checkpoint(path)
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


def _tell_changes(before: dict[str, Any], after: dict[str, Any], console: Console) -> None:
    """Names every field that a resumed run does not take over from its checkpoint."""
    for section, values in after.items():
        for key, value in values.items():
            old = before.get(section, {}).get(key)
            if old != value:
                console.print(f'resuming with {section}.{key}: {old} -> {value}', soft_wrap=True)


def _one_line(error: TrainError) -> str:
    """The message of an error; one that comes out of a loader process carries its traceback in front."""
    text = str(error)
    if 'Original Traceback' not in text:
        return text
    return text.rstrip().splitlines()[-1].partition('Error: ')[2]

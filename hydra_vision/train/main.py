"""The training command: reads the recipe, picks the run folder, trains, resumes or validates."""

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hydra_vision.train.arguments import parse_arguments
from hydra_vision.train.checkpoint import BEST, LAST, find_checkpoint, load_checkpoint, write_atomically, write_text
from hydra_vision.train.config import Config, check_values, merge, parse_override
from hydra_vision.train.errors import CheckpointError, ConfigError, TrainError, loader_death
from hydra_vision.train.recipes import read_recipe, recipe_names

DEMO = "hydra_vit_nano_digits"
MAIN = "hydra_vit_base_imagenet1k"
_RUN_FILES = (LAST, BEST, "summary.csv", "curve.png", "results.md")


def main(argv: Sequence[str] | None = None, prog: str = "train_imagenet.py") -> int:
    """Runs the training command.

    Args:
        argv: arguments, without the program's name; None takes them from the command line.
        prog: name of the program in help and error messages.

    Returns:
        Exit code: 0, 1 for a run that failed, 2 for a wrong recipe or command line, 130 after Ctrl-C.
    """
    errors = Console(stderr=True, highlight=False, markup=False)
    try:
        return _run(parse_arguments(argv, prog), Console(highlight=False, markup=False))
    except RuntimeError as error:
        death = loader_death(error)
        if death is None:
            raise
        errors.print(f"error: {death}", soft_wrap=True)
        return death.exit_code
    except TrainError as error:
        errors.print(f"error: {_one_line(error)}", soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        text = "interrupted; the same command with --resume auto continues after the last finished epoch"
        errors.print(text, soft_wrap=True)
        return 130


def _run(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.list_configs:
        console.print("\n".join(recipe_names()))
        return 0
    overrides = read_overrides(arguments.overrides)
    if arguments.validate:
        return _validate(arguments, overrides, console)
    recipe = arguments.config or (MAIN if {"dir", "name"} & overrides.get("data", {}).keys() else DEMO)
    recipe_values = read_recipe(recipe)
    checkpoint = _checkpoint_to_resume(arguments, Path(recipe).stem)
    if checkpoint is None:
        state, values, source = None, recipe_values, recipe
    else:  # the run's own recipe; another one only where it was asked for
        state, source = load_checkpoint(checkpoint), str(checkpoint)
        values = merge(state["config"], recipe_values) if arguments.config else state["config"]
    config = Config.from_dict(merge(values, overrides), source=source)
    if arguments.print_config:
        console.print(config.to_yaml(comments=True), soft_wrap=True, end="")
        return 0
    if arguments.dry_run or arguments.bench_data:
        return _measure(arguments, config, state, console)
    folder = _run_folder(arguments.output, checkpoint, Path(recipe).stem)
    if state is not None:
        _tell_changes(state["config"], config.to_dict(), console)
    return _train(config, folder, checkpoint, state, console)


def read_overrides(overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Merges (source, 'key=value') pairs in order, each checked on its own so that the error names its flag."""
    merged: dict[str, Any] = {}
    for source, text in overrides:
        values = parse_override(text, source)
        check_values(values, source)
        merged = merge(merged, values)
    return merged


def _train(
    config: Config, folder: Path, checkpoint: Path | None, state: dict[str, Any] | None, console: Console
) -> int:
    from hydra_vision.train.engine import Trainer  # torch and timm: not before the recipe is known to be right
    from hydra_vision.train.provenance import write_run

    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot create the output folder {folder}: {error}") from error
    try:
        trainer = Trainer(config, folder, console, state)
        write_text(folder / "config.yaml", config.to_yaml())
        write_run(folder, trainer.facts(), trainer.device)
        if checkpoint is not None and checkpoint.parent.resolve() != folder.resolve():
            _carry_best(checkpoint, state, folder)
    except TrainError:
        if created:
            shutil.rmtree(folder, ignore_errors=True)  # nothing was started: leave no empty run behind
        raise
    trainer.run()
    return 0


def _measure(arguments: argparse.Namespace, config: Config, state: dict[str, Any] | None, console: Console) -> int:
    from hydra_vision.train.engine import Trainer
    from hydra_vision.train.measure import bench_data, dry_run

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder), console, state)
        (dry_run if arguments.dry_run else bench_data)(trainer)
    return 0


def _validate(arguments: argparse.Namespace, overrides: dict[str, Any], console: Console) -> int:
    from hydra_vision.train import report
    from hydra_vision.train.validation import validate

    path = find_checkpoint(arguments.validate, BEST)
    state = load_checkpoint(path)
    values = merge(state["config"], read_recipe(arguments.config)) if arguments.config else state["config"]
    config = Config.from_dict(merge(values, overrides), source=str(path))
    results = validate(config, state, Console(stderr=True) if arguments.json else console)
    if arguments.json:
        result = {"checkpoint": str(path), "model": state["arch"], "epoch": state["epoch"], "results": results}
        print(json.dumps(result, indent=2))
    else:
        title = f"{path} ({state['arch']}, epoch {state['epoch']})"
        report.print_table(console, title, report.RESULT_HEADER, report.result_rows(results))
    return 0


def _checkpoint_to_resume(arguments: argparse.Namespace, name: str) -> Path | None:
    """The checkpoint that --resume means; None starts afresh."""
    if arguments.resume is None:
        return None
    if arguments.resume != "auto":
        return find_checkpoint(arguments.resume, LAST)
    numbered = re.compile(re.escape(name) + r"(-\d+)?")  # not those of a recipe whose name only begins like this one
    folders = [path for path in Path("output").glob("*") if numbered.fullmatch(path.name)]
    if arguments.output is not None:
        folders = [Path(arguments.output)]
    found = [folder / LAST for folder in folders if (folder / LAST).is_file()]
    return max(found, key=lambda path: path.stat().st_mtime) if found else None


def _run_folder(output: str | None, checkpoint: Path | None, name: str) -> Path:
    """Where this run writes. A run that is there already is never overwritten, only resumed."""
    if checkpoint is not None and (output is None or Path(output).resolve() == checkpoint.parent.resolve()):
        return checkpoint.parent
    if output is None:
        folder, number = Path("output") / name, 1
        while folder.exists():
            folder, number = Path("output") / f"{name}-{number}", number + 1
        return folder
    folder = Path(output)
    taken = [file for file in _RUN_FILES if (folder / file).exists()]
    if taken:
        raise ConfigError(
            f"--output {folder} already holds a run ({taken[0]}): continue it with --resume auto, or choose another one"
        )
    return folder


def _carry_best(checkpoint: Path, state: dict[str, Any], folder: Path) -> None:
    """Copies the best checkpoint so far to the folder in which a run goes on: no later epoch may be better."""
    if state["best"] is None:
        return
    for path in (checkpoint, checkpoint.parent / BEST):
        if path.is_file() and load_checkpoint(path)["epoch"] == state["best"]["epoch"]:
            with open(path, "rb") as source:
                write_atomically(folder / BEST, lambda file, source=source: shutil.copyfileobj(source, file))
            return


def _tell_changes(before: dict[str, Any], after: dict[str, Any], console: Console) -> None:
    """Names every field that a resumed run does not take over from its checkpoint."""
    for section, values in after.items():
        for key, value in values.items():
            old = before.get(section, {}).get(key)
            if old != value:
                console.print(f"resuming with {section}.{key}: {old} -> {value}", soft_wrap=True)


def _one_line(error: TrainError) -> str:
    """The message of an error; one that comes out of a loader process carries its traceback in front."""
    text = str(error)
    if "Original Traceback" not in text:
        return text
    return text.rstrip().splitlines()[-1].partition("Error: ")[2]

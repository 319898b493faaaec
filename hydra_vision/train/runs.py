"""Run folders: which one a command means, and which checkpoint in it."""

import re
import shutil
from pathlib import Path
from typing import Any

from hydra_vision.train.checkpoint import (
    BEST,
    KEPT,
    LAST,
    find_checkpoint,
    has_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    write_atomically,
)
from hydra_vision.train.errors import CheckpointError, ConfigError

_RUN_FILES = (LAST, BEST, KEPT, 'summary.csv', 'curve.png', 'results.md')
OUTPUT = Path('output')

Found = tuple[Path | None, dict[str, Any] | None, list[str]]


def checkpoint_to_resume(resume: str | None, output: str | None, name: str) -> Found:
    """What --resume means.

    Args:
        resume: 'auto', a checkpoint, a run folder, or None.
        output: the run folder that was asked for, if one was.
        name: of the recipe, after which run folders are called.

    Returns:
        Path and content of the checkpoint, None twice to start afresh; and what was wrong with newer ones.

    Raises:
        CheckpointError: no such checkpoint, or none that is intact.
    """
    if resume is None:
        return None, None, []
    if resume != 'auto':
        path = Path(resume).expanduser()
        if path.is_dir():
            found = newest_checkpoint(path)
            if found[0] is None:
                raise CheckpointError(f'no checkpoint {str(find_checkpoint(resume, LAST))!r}')
            return found
        state = load_checkpoint(path)
        if 'averaged' in state:
            raise CheckpointError(
                f'{path} is a mean of checkpoints, no run to go on with; start from it: model.checkpoint'
            )
        return path, state, []
    folders = [Path(output)] if output is not None else _runs(name)
    times = {folder: time for folder in folders if (time := has_checkpoint(folder)) is not None}
    return newest_checkpoint(max(times, key=times.__getitem__)) if times else (None, None, [])


def run_folder(output: str | None, checkpoint: Path | None, name: str) -> Path:
    """Where a run writes. A run that is there already is never overwritten, only resumed.

    A folder that a run left before its first checkpoint holds nothing to lose and is used again.

    Raises:
        ConfigError: the folder holds a run.
    """
    if checkpoint is not None:
        home = folder_of(checkpoint)
        if output is None or Path(output).resolve() == home.resolve():
            return home
    if output is None:
        folder, number = OUTPUT / name, 1
        while _taken(folder):
            folder, number = OUTPUT / f'{name}-{number}', number + 1
        return folder
    folder = Path(output)
    taken = _taken(folder)
    if taken:
        raise ConfigError(
            f'--output {folder} already holds a run ({taken[0]}): continue it with --resume auto, or choose another one'
        )
    return folder


def folder_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint belongs to."""
    return checkpoint.parent.parent if checkpoint.parent.name == KEPT else checkpoint.parent


def carry_best(checkpoint: Path, state: dict[str, Any], folder: Path) -> None:
    """Copies the best checkpoint so far to the folder in which a run goes on: no later epoch may be better."""
    if state['best'] is None:
        return
    for path in (checkpoint, folder_of(checkpoint) / BEST):
        if not path.is_file():
            continue
        found = load_checkpoint(path)
        if found['epoch'] == state['best']['epoch'] and not found['progress']['batches']:
            with open(path, 'rb') as source:
                write_atomically(folder / BEST, lambda file, source=source: shutil.copyfileobj(source, file))
            return


def _runs(name: str) -> list[Path]:
    """Folders of runs of a recipe."""
    numbered = re.compile(re.escape(name) + r'(-\d+)?')  # not those of a recipe whose name only begins like this one
    return [path for path in OUTPUT.glob('*') if numbered.fullmatch(path.name)]


def _taken(folder: Path) -> list[str]:
    """Files of a run in a folder; a path that is no folder counts as taken."""
    if folder.exists() and not folder.is_dir():
        return [folder.name]
    return [file for file in _RUN_FILES if (folder / file).exists()]

"""Run folders: which one a command means, and which checkpoint in it."""

import os
import re
from pathlib import Path
from typing import Any

from hydra_vision.errors import CheckpointError, ConfigError
from hydra_vision.train.checkpoint import (
    BEST,
    KEPT,
    LAST,
    find_checkpoint,
    has_checkpoint,
    link,
    load_checkpoint,
    newest_checkpoint,
)

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


def settle(checkpoint: Path, state: dict[str, Any], folder: Path) -> Path | None:
    """Makes last.pt and best.pt of the folder in which a run goes on those of the part of it that is done.

    They may be others: best.pt of a run in another folder, both of later epochs that are trained again, or of the epoch
    before where the process was killed between writing a checkpoint and naming it.

    Returns:
        Where a best.pt of later epochs went, if there was one: `best.pt.old`.
    """
    home, target, best = folder_of(checkpoint), folder / BEST, state['best']
    if home.resolve() == folder.resolve() and checkpoint.name != LAST:
        link(checkpoint, folder / LAST)
    named = [] if best is None else [home / BEST, checkpoint, *(home / KEPT).glob('step-*.pt')]
    found = next((path for path in named if _is_of_epoch(path, best['epoch'])), None)
    if found is not None and target.is_file() and os.path.samefile(found, target):
        return None
    aside = None
    if target.is_file() and not _is_of_epoch(target, *range(1, state['epoch'] + 1)):
        aside = target.with_name(f'{BEST}.old')
        os.replace(target, aside)
    if found is not None:
        link(found, target)
    return aside


def _is_of_epoch(path: Path, *epochs: int) -> bool:
    """Whether a file is an intact checkpoint of the end of one of these epochs."""
    if not path.is_file():
        return False
    try:
        state = load_checkpoint(path)
    except CheckpointError:
        return False
    return state['epoch'] in epochs and not state.get('progress', {}).get('batches')


def _runs(name: str) -> list[Path]:
    """Folders of runs of a recipe."""
    numbered = re.compile(re.escape(name) + r'(-\d+)?')  # not those of a recipe whose name only begins like this one
    return [path for path in OUTPUT.glob('*') if numbered.fullmatch(path.name)]


def _taken(folder: Path) -> list[str]:
    """Files of a run in a folder; a path that is no folder counts as taken."""
    if folder.exists() and not folder.is_dir():
        return [folder.name]
    return [file for file in _RUN_FILES if (folder / file).exists()]

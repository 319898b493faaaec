"""What an interrupted segmentation run goes on from: the trainer's checkpoints, one an epoch."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from ..errors import CheckpointError, UserError
from ..train.checkpoint import KEPT, LAST, newest_checkpoint, save_checkpoint

__all__ = ['load_state', 'remove_states', 'save_state']


def save_state(folder: Path, state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write what `train_segmenter` calls its state, atomically; the one before is kept in case this one is damaged.

    Args:
        folder: of the run.
        state: of the training.
        facts: that a resumed run must share: model, data, recipe.

    Raises:
        UserError: the disk is full or not writable; the earlier state survives.
    """
    try:
        save_checkpoint(folder, {**state, 'facts': dict(facts)}, is_best=False)
    except CheckpointError as error:
        raise UserError(str(error)) from error


def load_state(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The newest intact state of a run.

    Raises:
        UserError: there is none, or the run was another one.
    """
    try:
        path, state, _ = newest_checkpoint(folder)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    if state is None:
        done = ': it is finished' if (folder / 'summary.json').is_file() else ''
        raise UserError(f'--resume: {folder} holds no interrupted run{done}')
    before: Optional[Mapping[str, Any]] = state.pop('facts', None)
    if before is None:
        raise UserError(f'--resume: {path} is not of a segmentation run')
    for key, value in facts.items():
        if before.get(key) != value:
            raise UserError(f'--resume: the run in {folder} has {key} {before.get(key)}, not {value}')
    return state


def remove_states(folder: Path) -> None:
    """What only a resumed run needs."""
    (folder / LAST).unlink(missing_ok=True)
    shutil.rmtree(folder / KEPT, ignore_errors=True)

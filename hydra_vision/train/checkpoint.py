"""Checkpoints and the run folders that hold them.

An interrupted write never costs the previous checkpoint, damage is noticed (every record of the file has a CRC-32), and
reading a checkpoint runs no code from it.

A run folder holds the newest checkpoints as `checkpoints/step-N.pt` (N: optimizer steps); `last.pt` and `best.pt` are
the newest and the best of them under fixed names (hard links where the file system has them).
"""

import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError, TrainError, WriteError, first_line
from ..io import to_path, write_atomically
from ..weights import brief_mismatch, explain

FORMAT = 3
_READABLE = (2, FORMAT)  # 2 has a checksum of its own, which the CRC-32 of the records makes superfluous
LAST, BEST = 'last.pt', 'best.pt'
KEPT = 'checkpoints'
OUTPUT = Path('output')
_RUN_FILES = (LAST, BEST, KEPT, 'summary.csv', 'curve.png', 'results.md')

Found = tuple[Path | None, dict[str, Any] | None, list[str]]


# One file


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint file atomically.

    Args:
        path: Of the file.
        state: Plain containers, numbers, strings and tensors.

    Raises:
        WriteError: It could not be written; an earlier file of that name survives.
    """
    state = {'format': FORMAT, **_to_cpu(state)}
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this trainer onto the CPU, checking every record against its CRC-32.

    Raises:
        CheckpointError: No such file, not readable, damaged, or not written by this trainer.
    """
    if not path.is_file():
        raise CheckpointError(f'no checkpoint {str(path)!r}')
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f'checkpoint {path} is damaged: the checksum of {damaged} does not match')
        state = torch.load(path, map_location='cpu', weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # what unpicklers raise for arbitrary bytes is not a closed list
        raise CheckpointError(f'{path} {explain(path, error)}; expected a checkpoint of this trainer') from error
    if not isinstance(state, dict) or 'format' not in state:
        raise CheckpointError(f'{path} was not written by this trainer (weights alone cannot be resumed or validated)')
    if state['format'] not in _READABLE:
        raise CheckpointError(f'{path} has format {state["format"]}; this version reads {_READABLE}')
    return state


def load_run(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a training run, from which its model can be built.

    Raises:
        CheckpointError: As `load_checkpoint`; a checkpoint of something else.
    """
    state = load_checkpoint(path)
    missing = [key for key in ('arch', 'config', 'num_classes', 'state_dict') if key not in state]
    if missing:
        raise CheckpointError(f'{path} is not the checkpoint of a training run: it has no {missing[0]}')
    return state


def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], name: str) -> None:
    """Load the weights of a checkpoint into a model.

    Args:
        model: On any device.
        weights: A state dict.
        name: Name of the model in error messages.

    Raises:
        CheckpointError: Names or shapes that do not fit.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f'the checkpoint does not fit {name}; {brief_mismatch(error)}') from error


def find_checkpoint(text: str, name: str) -> Path:
    """The checkpoint that a path means: that file, or the one called `name` in that run folder."""
    path = to_path(text, 'checkpoint')
    return path / name if path.is_dir() else path


def _to_cpu(value: Any) -> Any:
    """Nested containers with every tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_cpu(item) for item in value)
    return value


# The checkpoints of a run


class CheckpointSchedule:
    """When checkpoints inside an epoch are due.

    Args:
        every_steps: Optimizer steps between them, None for none.
        every_minutes: Minutes between them, None for none.
    """

    def __init__(self, every_steps: int | None, every_minutes: float | None):
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.reset()

    def reset(self) -> None:
        """Start the clock again, after a checkpoint was written."""
        self.saved, self.requested = time.monotonic(), False

    def due_by_clock(self) -> bool:
        """Whether this process requests a checkpoint because `every_minutes` have passed.

        It requests one once: other processes follow one step later, by when it would request another.
        """
        if self.every_minutes is None or self.requested:
            return False
        self.requested = (time.monotonic() - self.saved) / 60 >= self.every_minutes
        return self.requested

    def due_at(self, step: int) -> bool:
        """Whether a checkpoint is due after an optimizer step."""
        return self.every_steps is not None and step % self.every_steps == 0


def save_checkpoint(
    folder: Path, state: Mapping[str, Any], is_best: bool, keep_last: int = 2, keep_steps: Collection[int] = ()
) -> Path:
    """Write `checkpoints/step-N.pt`, make it `last.pt` (and `best.pt` if `is_best`), and remove older ones.

    Args:
        folder: Of the run.
        state: See `write_checkpoint`; `state["updates"]` is N.
        is_best: Whether it is the best one so far.
        keep_last: Number of newest checkpoints to keep.
        keep_steps: N of others to keep.

    Returns:
        Path of the new checkpoint.

    Raises:
        WriteError: The disk is full or not writable; earlier checkpoints survive.
    """
    kept = folder / KEPT
    path = kept / f'step-{state.get("updates", 0):09d}.pt'
    try:
        kept.mkdir(exist_ok=True)
    except OSError as error:
        raise WriteError(f'could not write {path}: {first_line(error)}') from error
    try:
        write_checkpoint(path, state)
    except WriteError as error:
        kept_text = f'; the previous {LAST} is intact' if (folder / LAST).exists() and not path.exists() else ''
        raise WriteError(f'{error}{kept_text}') from error
    link(path, folder / LAST)
    if is_best:
        link(path, folder / BEST)
    wanted = {f'step-{step:09d}.pt' for step in keep_steps}
    for old in _newest_first(folder)[max(keep_last, 1) :]:
        if old.name not in wanted and old != path:
            old.unlink(missing_ok=True)
    return path


def best_steps(history: Sequence[Mapping[str, Any]], count: int) -> set[int]:
    """Optimizer steps of the `count` best epochs in the rows of summary.csv, by raw or averaged weights."""
    scores = [
        (max(row[key] for key in ('val_top1', 'ema_top1') if row.get(key) is not None), row['updates'])
        for row in history
        if row.get('val_top1') is not None
    ]
    return {updates for _, updates in sorted(scores, reverse=True)[:count]}


def newest_checkpoint(folder: Path, load: Callable[[Path], dict[str, Any]] = load_checkpoint) -> Found:
    """The newest intact checkpoint of a run folder.

    Args:
        folder: Of the run.
        load: Reads a file; ``load_run`` for what a training run can go on from.

    Returns:
        Its path and content, or None twice where the folder has none at all; and what was wrong with newer ones.

    Raises:
        CheckpointError: There are checkpoints, but none of them is intact.
    """
    problems: list[str] = []
    candidates = _newest_first(folder)
    last = folder / LAST
    if last.is_file() and not any(os.path.samefile(last, path) for path in candidates):
        candidates.append(last)
    for path in candidates:
        try:
            return path, load(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(f'no checkpoint of {folder} is intact: {"; ".join(problems)}')
    return None, None, []


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, atomically; a copy where the file system has no hard links."""
    linked = target.with_name(f'.{target.name}.tmp')
    try:
        linked.unlink(missing_ok=True)
        os.link(source, linked)  # a later step is a new file, so this one never changes
        os.replace(linked, target)
    except OSError:
        with open(source, 'rb') as file:
            write_atomically(target, lambda copy: shutil.copyfileobj(file, copy))


def _newest_first(folder: Path) -> list[Path]:
    """Paths of the kept checkpoints, newest first."""
    return sorted((folder / KEPT).glob('step-*.pt'), reverse=True)


# Starting and resuming runs


def checkpoint_to_resume(resume: str | None, output: str | None, name: str) -> Found:
    """The checkpoint that --resume means.

    Args:
        resume: 'auto', a checkpoint, a run folder, or None.
        output: The run folder, if one was given.
        name: Name of the recipe, after which run folders are called.

    Returns:
        Path and content of the checkpoint, None twice to start from scratch; and what was wrong with newer ones.

    Raises:
        CheckpointError: No such checkpoint, or none that is intact.
    """
    if resume is None:
        return None, None, []
    if resume != 'auto':
        path = to_path(resume, '--resume')
        if path.is_dir():
            found = newest_checkpoint(path, load_run)
            if found[0] is None:
                raise CheckpointError(f'no checkpoint {str(find_checkpoint(resume, LAST))!r}')
            return found
        state = load_run(path)
        if 'averaged' in state:
            raise CheckpointError(
                f'{path} is a mean of checkpoints, which cannot be resumed; start from it with model.checkpoint'
            )
        return path, state, []
    numbered = re.compile(re.escape(name) + r'(-\d+)?')  # not those of a recipe whose name only begins like this one
    runs = [path for path in OUTPUT.glob('*') if numbered.fullmatch(path.name)]
    folders = [Path(output)] if output is not None else runs
    times = {folder: time for folder in folders if (time := _time_of_newest(folder)) is not None}
    return newest_checkpoint(max(times, key=times.__getitem__), load_run) if times else (None, None, [])


def run_folder(output: str | None, checkpoint: Path | None, name: str) -> Path:
    """The folder that a run writes to. An existing run is never overwritten, only resumed.

    A folder that a run left before its first checkpoint holds nothing to lose and is used again.

    Raises:
        ConfigError: The folder holds a run.
    """
    if checkpoint is not None:
        home = folder_of(checkpoint)
        if output is None or Path(output).resolve() == home.resolve():
            return home
    if output is None:
        folder, number = OUTPUT / name, 1
        while _run_files(folder):
            folder, number = OUTPUT / f'{name}-{number}', number + 1
        return folder
    folder = Path(output)
    files = _run_files(folder)
    if files:
        raise ConfigError(
            f'--output {folder} already holds a run ({files[0]}): continue it with --resume auto, or choose another one'
        )
    return folder


def folder_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint belongs to."""
    return checkpoint.parent.parent if checkpoint.parent.name == KEPT else checkpoint.parent


def prepare_to_resume(checkpoint: Path, state: Mapping[str, Any], folder: Path) -> list[Path]:
    """Make a run folder ready to continue from a checkpoint.

    Checkpoints of later steps, which the run will write again, are renamed to `*.old`: otherwise they would count as
    the newest ones. `last.pt` and `best.pt` are repointed to checkpoints at or before the resumed step. They may be
    others: best.pt of a run in another folder, both of later epochs that are trained again, or of the epoch before
    where the process was killed between writing a checkpoint and linking it.

    Args:
        checkpoint: The checkpoint to continue from.
        state: Its content.
        folder: The folder of the continued run, which may be another one.

    Returns:
        New paths of the renamed files.
    """
    aside = []
    for path in _newest_first(folder):
        if int(path.stem.removeprefix('step-')) > state['updates']:
            aside.append(_rename_to_old(path))
    home, target, best = folder_of(checkpoint), folder / BEST, state['best']
    if home.resolve() == folder.resolve() and checkpoint.name != LAST:
        link(checkpoint, folder / LAST)
    candidates = [] if best is None else [home / BEST, checkpoint, *_newest_first(home)]
    found = next((path for path in candidates if _is_of_epoch(path, best['epoch'])), None)
    if found is not None and target.is_file() and os.path.samefile(found, target):
        return aside
    if target.is_file() and not _is_of_epoch(target, *range(1, state['epoch'] + 1)):
        aside.append(_rename_to_old(target))
    if found is not None:
        link(found, target)
    return aside


def remove_leftovers(folder: Path) -> None:
    """Remove partly written files of a killed process; those of checkpoints are as large as checkpoints."""
    for part in (folder, folder / KEPT):
        for path in part.glob('.*.tmp'):
            path.unlink(missing_ok=True)


def _rename_to_old(path: Path) -> Path:
    old = path.with_name(f'{path.name}.old')
    os.replace(path, old)
    return old


def _is_of_epoch(path: Path, *epochs: int) -> bool:
    """Whether a file is an intact checkpoint of the end of one of these epochs."""
    if not path.is_file():
        return False
    try:
        state = load_checkpoint(path)
    except TrainError:
        return False
    return state['epoch'] in epochs and not state.get('progress', {}).get('batches')


def _time_of_newest(folder: Path) -> float | None:
    """When the newest checkpoint of a folder was written (seconds since 1970), None where there is none."""
    times = [path.stat().st_mtime for path in (*_newest_first(folder), folder / LAST) if path.is_file()]
    return max(times) if times else None


def _run_files(folder: Path) -> list[str]:
    """Files of a run in a folder; a path that is not a folder counts as one."""
    if folder.exists() and not folder.is_dir():
        return [folder.name]
    return [file for file in _RUN_FILES if (folder / file).exists()]

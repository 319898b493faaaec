"""Checkpoints: an interrupted write never costs the previous one, damage is noticed, reading runs no code of the file.

A run folder holds the newest checkpoints as `checkpoints/step-N.pt` (N: optimizer steps); `last.pt` and `best.pt` are
the newest and the best of them under fixed names (hard links where the file system has them).
"""

import hashlib
import os
import pickle
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from hydra_vision.errors import CheckpointError, WriteError, first_line
from hydra_vision.io import write_atomically

FORMAT = 2
LAST, BEST = 'last.pt', 'best.pt'
KEPT = 'checkpoints'


def save_checkpoint(
    folder: Path, state: Mapping[str, Any], is_best: bool, keep_last: int = 2, keep_steps: Collection[int] = ()
) -> Path:
    """Writes `checkpoints/step-N.pt`, makes it `last.pt` (and `best.pt` where `is_best`), and removes older ones.

    Args:
        folder: of the run.
        state: plain containers, numbers, texts and tensors; `state["updates"]` is N.
        is_best: whether it is the best one so far.
        keep_last: how many of the newest ones stay.
        keep_steps: N of others that stay.

    Returns:
        Path of the new checkpoint.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints survive.
    """
    state = {'format': FORMAT, **_on_cpu(state)}
    state['checksum'] = checksum(state)
    kept = folder / KEPT
    path = kept / f'step-{state.get("updates", 0):09d}.pt'
    try:
        kept.mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(f'could not write {path}: {first_line(error)}') from error
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except WriteError as error:
        kept_text = f'; the previous {LAST} is intact' if (folder / LAST).exists() and not path.exists() else ''
        raise CheckpointError(f'{error}{kept_text}') from error
    link(path, folder / LAST)
    if is_best:
        link(path, folder / BEST)
    wanted = {f'step-{step:09d}.pt' for step in keep_steps}
    for old in _steps(folder)[max(keep_last, 1) :]:
        if old.name not in wanted and old != path:
            old.unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of this trainer onto the CPU and compares its checksum.

    Raises:
        CheckpointError: no such file, not readable, damaged, or not written by this trainer.
    """
    if not path.is_file():
        raise CheckpointError(f'no checkpoint {str(path)!r}')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, pickle.UnpicklingError) as error:
        # What the unpickler says (and its advice to read the file with less care) helps nobody.
        why = first_line(error) if isinstance(error, OSError) else 'damaged, or not a checkpoint of this trainer'
        raise CheckpointError(f'cannot read checkpoint {path}: {why}') from error
    if not isinstance(state, dict) or 'format' not in state:
        raise CheckpointError(f'{path} was not written by this trainer (weights alone cannot be resumed or validated)')
    if state['format'] != FORMAT:
        raise CheckpointError(f'{path} has format {state["format"]}; this version reads format {FORMAT}')
    if state.pop('checksum', None) != checksum(state):
        raise CheckpointError(f'checkpoint {path} is damaged: its checksum does not fit its content')
    return state


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
    """The newest checkpoint of a run folder that is intact.

    Returns:
        Its path and content, or None twice where the folder has none at all; and what was wrong with newer ones.

    Raises:
        CheckpointError: there are checkpoints, but none of them is intact.
    """
    problems: list[str] = []
    candidates = _steps(folder)
    last = folder / LAST
    if last.is_file() and not any(os.path.samefile(last, path) for path in candidates):
        candidates.append(last)
    for path in candidates:
        try:
            return path, load_checkpoint(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(f'no checkpoint of {folder} is intact: {"; ".join(problems)}')
    return None, None, []


def has_checkpoint(folder: Path) -> float | None:
    """When the newest checkpoint of a folder was written (seconds since 1970), None where there is none."""
    times = [path.stat().st_mtime for path in (*_steps(folder), folder / LAST) if path.is_file()]
    return max(times) if times else None


def find_checkpoint(text: str, name: str) -> Path:
    """The checkpoint that a path means: that file, or the one called `name` in that run folder."""
    path = Path(text).expanduser()
    return path / name if path.is_dir() else path


def checksum(value: Any) -> str:
    """SHA-256 over names, numbers and the bytes of tensors in nested containers, as hexadecimal text."""
    digest = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            digest.update(f'{item.dtype}{tuple(item.shape)}'.encode())
            digest.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(item, Mapping):
            digest.update(b'{')
            for key, inner in item.items():
                digest.update(repr(key).encode())
                add(inner)
            digest.update(b'}')
        elif isinstance(item, (list, tuple)):
            digest.update(b'[')
            for inner in item:
                add(inner)
            digest.update(b']')
        else:
            digest.update(f'{type(item).__name__}:{item!r};'.encode())

    add(value)
    return digest.hexdigest()


def set_aside(folder: Path, updates: int) -> list[Path]:
    """Renames the checkpoints of later steps, which a run that goes on from step `updates` will write again.

    Otherwise they would count as the newest ones.

    Returns:
        Their new paths: `step-N.pt.old`.
    """
    aside = []
    for path in _steps(folder):
        if int(path.stem.removeprefix('step-')) > updates:
            aside.append(path.with_name(f'{path.name}.old'))
            os.replace(path, aside[-1])
    return aside


def remove_leftovers(folder: Path) -> None:
    """Removes half-written files of a process that was killed; those of checkpoints are as large as these."""
    for part in (folder, folder / KEPT):
        for path in part.glob('.*.tmp'):
            path.unlink(missing_ok=True)


def _on_cpu(value: Any) -> Any:
    """Nested containers with every tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item) for item in value)
    return value


def _steps(folder: Path) -> list[Path]:
    """Paths of the kept checkpoints, newest first."""
    return sorted((folder / KEPT).glob('step-*.pt'), reverse=True)


def link(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, atomically; a copy where the file system has no hard links."""
    linked = target.with_name(f'.{target.name}.tmp')
    try:
        linked.unlink(missing_ok=True)
        os.link(source, linked)  # a later step is a new file, so this one stays as it is
        os.replace(linked, target)
    except OSError:
        with open(source, 'rb') as file:
            write_atomically(target, lambda copy: shutil.copyfileobj(file, copy))

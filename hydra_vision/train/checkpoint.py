"""Checkpoints: an interrupted write never costs the previous one, and reading runs no code from the file."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hydra_vision.train.errors import CheckpointError, first_line

FORMAT = 1
LAST, BEST = "last.pt", "best.pt"


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Calls `write` on a temporary file in the same folder, flushes it to the disk and renames it to `path`.

    Whatever goes wrong before the rename (full disk, kill, power), the file that was there before is untouched.

    Raises:
        CheckpointError: the file could not be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns some write errors into RuntimeError
        temporary.unlink(missing_ok=True)
        kept = f"; the previous {path.name} is intact" if path.exists() else ""
        raise CheckpointError(f"could not write {path}: {first_line(error)}{kept}") from error
    except BaseException:  # interrupted by the user: leave no half file behind
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a small text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def save_checkpoint(folder: Path, state: dict[str, Any], is_best: bool) -> None:
    """Writes `last.pt`, and makes it `best.pt` as well where `is_best`.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints survive.
    """
    last, best = folder / LAST, folder / BEST
    write_atomically(last, lambda file: torch.save({"format": FORMAT, **state}, file))
    if is_best:
        linked = best.with_name(f".{best.name}.tmp")
        linked.unlink(missing_ok=True)
        try:
            os.link(last, linked)  # the next last.pt is a new file, so this one stays as it is
            os.replace(linked, best)
        except OSError:  # a file system without hard links
            write_atomically(best, lambda file: torch.save({"format": FORMAT, **state}, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of this trainer onto the CPU.

    Raises:
        CheckpointError: no such file, not readable, or not written by this trainer.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {str(path)!r}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, pickle.UnpicklingError) as error:
        # What the unpickler says (and its advice to read the file with less care) helps nobody.
        why = first_line(error) if isinstance(error, OSError) else "damaged, or not a checkpoint of this trainer"
        raise CheckpointError(f"cannot read checkpoint {path}: {why}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path} was not written by this trainer (weights alone cannot be resumed or validated)")
    if state["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {state['format']}; this version reads format {FORMAT}")
    return state


def find_checkpoint(text: str, name: str) -> Path:
    """The checkpoint that a path means: that file, or the one called `name` in that run folder."""
    path = Path(text).expanduser()
    return path / name if path.is_dir() else path


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable, where the system can open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse it; the rename itself is done
        pass
    finally:
        os.close(descriptor)

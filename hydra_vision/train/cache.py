"""Decoded images in memory, for sets that are small and read many times."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hydra_vision.errors import DataError
from hydra_vision.train.distributed import local_processes, world_from_environment

_SHARE = 0.8  # of the memory that is free now: workers, batches and the model need some as well
_SAMPLE = 256  # images that the estimate of the whole is made from


def decode_all(decode: Callable[[int], np.ndarray | None], count: int, split: str) -> list[np.ndarray | None]:
    """Calls `decode` for 0 .. count-1 in threads and keeps the arrays.

    Args:
        decode: index -> uint8 array, or None for an image that cannot be read.
        count: number of images.
        split: what messages call the set.

    Raises:
        DataError: the set would not fit into the memory that is free, found after the first images.
    """
    images: list[np.ndarray | None] = []
    threads = min(8, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1)
    console = Console()
    shown = console.is_terminal and world_from_environment().primary
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not shown) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        task = bar.add_task(f'decoding {split}', total=count)
        for start in range(0, count, _SAMPLE):  # in blocks, so that an error ends it soon
            images += pool.map(decode, range(start, min(start + _SAMPLE, count)))
            if start == 0:
                _check_memory(images, count, split)
            bar.update(task, completed=len(images))
    return images


def free_memory() -> int | None:
    """Bytes that this process may still take, by the system and by its control group; None where neither tells."""
    found = []
    try:
        for line in Path('/proc/meminfo').read_text().splitlines():
            if line.startswith('MemAvailable:'):
                found.append(int(line.split()[1]) * 1024)
        limit = Path('/sys/fs/cgroup/memory.max').read_text().strip()
        if limit != 'max':
            found.append(int(limit) - int(Path('/sys/fs/cgroup/memory.current').read_text()))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def _check_memory(images: list[np.ndarray | None], count: int, split: str) -> None:
    read = [image.nbytes for image in images if image is not None]
    free = free_memory()
    if not read or free is None:
        return
    processes = local_processes()
    needed = sum(read) / len(read) * count * processes
    if needed > _SHARE * free:
        each = f' in each of {processes} processes' if processes > 1 else ''
        raise DataError(
            f"data.cache='ram': {split} needs about {needed / processes / 2**30:.1f} GiB decoded{each}, "
            f'{free / 2**30:.1f} GiB are free here (up to {_SHARE:.0%} of them may be used); set data.cache=none'
        )

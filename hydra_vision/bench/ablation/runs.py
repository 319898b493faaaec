"""The runs of an ablation: a recipe each, trained by the ordinary trainer in processes of their own."""

import contextlib
import csv
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import yaml

from hydra_vision.bench.ablation.family import FittedRow
from hydra_vision.errors import UserError
from hydra_vision.train.config import Config

__all__ = ['Run', 'check_folder', 'last_epoch', 'result', 'train']

# Fields that do not change what is learned: a run may be continued with others.
_FREE = (('data', 'dir'), ('data', 'workers'), ('data', 'cache'), ('run', 'device'), ('run', 'threads'))


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One row with one seed."""

    fitted: FittedRow
    seed: int
    config: Config
    output: Path  # of the whole ablation

    @property
    def name(self) -> str:
        return f'{self.fitted.row.name}-seed{self.seed}'

    @property
    def folder(self) -> Path:
        return self.output / 'runs' / self.name

    @property
    def log(self) -> Path:
        return self.output / 'logs' / f'{self.name}.log'

    @property
    def epochs(self) -> int:
        return self.config.schedule.epochs + self.config.schedule.cooldown_epochs


def last_epoch(run: Run) -> Optional[dict[str, str]]:
    """The last row of the run's summary, or None where no epoch was finished."""
    path = run.folder / 'summary.csv'
    if not path.is_file():
        return None
    with path.open(newline='') as file:
        rows = list(csv.DictReader(file))
    return rows[-1] if rows else None


def result(run: Run) -> Optional[dict[str, str]]:
    """The last row of a finished run's summary; None where it is not finished."""
    row = last_epoch(run)
    return row if row is not None and int(row['epoch']) >= run.epochs else None


def check_folder(run: Run) -> None:
    """Let a run pass that is new, or that its folder holds with the same recipe.

    Raises:
        UserError: the folder holds another recipe's run.
    """
    path = run.folder / 'config.yaml'
    if not path.is_file():
        return
    there, here = yaml.safe_load(path.read_text()), run.config.to_dict()
    for section, values in here.items():
        for key, value in values.items():
            old = there.get(section, {}).get(key)
            if (section, key) not in _FREE and old != value:
                raise UserError(
                    f'{run.folder} holds a run with {section}.{key} = {old!r}, this one has {value!r}; '
                    'choose another --output'
                )


def train(runs: Sequence[Run], jobs: int, progress: Callable[[str], None]) -> list[Run]:
    """Train what is not finished, ``jobs`` runs at a time.

    Args:
        runs: In the order in which they start.
        jobs: Processes at a time.
        progress: Called with a line of text when a run starts, ends or fails.

    Returns:
        The runs that failed; their logs say why.
    """
    waiting = [run for run in runs if result(run) is None]
    if len(waiting) < len(runs):
        progress(f'{len(runs) - len(waiting)} of {len(runs)} runs are finished already')
    done, failed = 0, []
    active: dict[Run, tuple[subprocess.Popen, float]] = {}
    with _interrupted_by_sigterm(), _terminating(active):
        queue = list(waiting)
        while queue or active:
            while queue and len(active) < jobs:
                run = queue.pop(0)
                active[run] = (_start(run, jobs), time.monotonic())
            for run, (process, started) in list(active.items()):
                if process.poll() is None:
                    continue
                del active[run]
                done += 1
                row, seconds = result(run), time.monotonic() - started
                if process.returncode == 0 and row is not None:
                    text = f'top-1 {float(row["val_top1"]):.2f} %'
                else:
                    failed.append(run)
                    text = f'FAILED with exit code {process.returncode}, see {run.log}'
                progress(f'[{done}/{len(waiting)}] {run.name}: {text}, {seconds:.0f} s')
            time.sleep(0.2)
    return failed


@contextlib.contextmanager
def _terminating(active: dict[Run, tuple[subprocess.Popen, float]]) -> Iterator[None]:
    """Leave no process behind: what still runs at the end is asked to stop, and waited for."""
    try:
        yield
    finally:
        for process, _ in active.values():
            process.terminate()
        for process, _ in active.values():
            process.wait()


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """A job scheduler's SIGTERM ends the command as Ctrl-C does, not without a word to the runs."""
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start(run: Run, jobs: int) -> subprocess.Popen:
    recipe = run.output / 'recipes' / f'{run.name}.yaml'
    for folder in (recipe.parent, run.log.parent):
        folder.mkdir(parents=True, exist_ok=True)
    recipe.write_text(run.config.to_yaml())
    command = [sys.executable, '-m', 'hydra_vision.cli', 'train', '--config', str(recipe), '--output', str(run.folder)]
    environment = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    environment.setdefault('OMP_NUM_THREADS', str(max(1, cores // jobs)))
    with run.log.open('a') as log:
        return subprocess.Popen([*command, '--resume', 'auto'], stdout=log, stderr=log, env=environment)


def workers_for(jobs: int) -> int:
    """Loader processes of each of so many runs: their share of the cores, beside one for the run itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, cores // jobs - 1)


def rows_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row of results.csv a finished run."""
    rows = []
    for run in runs:
        last = result(run)
        if last is None:
            continue
        row = run.fitted.row
        rows.append(
            {
                'row': row.name,
                'label': row.label,
                'data': row.data,
                'seed': run.seed,
                'parameters': run.fitted.parameters,
                'model': yaml.safe_dump(dict(run.fitted.model_kwargs), default_flow_style=True, width=10**6).strip(),
                'epochs': run.epochs,
                'top1': float(last['val_top1']),
                'val_loss': float(last['val_loss']),
                'train_loss': float(last['train_loss']),
            }
        )
    return rows

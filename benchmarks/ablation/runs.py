"""The runs of an ablation: a recipe each, trained by the ordinary trainer in processes of their own."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from hydra_vision.device import available_cores
from hydra_vision.errors import UserError
from hydra_vision.io import read_csv
from hydra_vision.train.config import Config

from .rows import FittedRow

# Fields that do not change what is learned: a run may be continued with others.
_FREE = (('data', 'dir'), ('data', 'workers'), ('data', 'cache'), ('run', 'device'), ('run', 'threads'))


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One row with one seed; ``output`` is the folder of the whole ablation."""

    fitted: FittedRow
    seed: int
    config: Config
    output: Path

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

    def result(self) -> dict[str, str] | None:
        """The last row of the finished run's summary; None where it is not finished."""
        path = self.folder / 'summary.csv'
        rows = read_csv(path) if path.is_file() else []
        return rows[-1] if rows and int(rows[-1]['epoch']) >= self.epochs else None

    def check_folder(self) -> None:
        """Let a run pass that is new, or that its folder holds with the same recipe.

        Raises:
            UserError: The folder holds a run of another recipe.
        """
        path = self.folder / 'config.yaml'
        if not path.is_file():
            return
        there = yaml.safe_load(path.read_text(encoding='utf-8'))
        for section, values in self.config.to_dict().items():
            for key, value in values.items():
                old = there.get(section, {}).get(key)
                if (section, key) not in _FREE and old != value:
                    raise UserError(
                        f'{self.folder} holds a run with {section}.{key}={old!r}, this one has {value!r}; choose '
                        'another --output'
                    )

    def row(self) -> dict[str, Any] | None:
        """Its row of results.csv; None where it is not finished."""
        last, row = self.result(), self.fitted.row
        return last and {
            'row': row.name,
            'label': row.label,
            'data': row.data,
            'seed': self.seed,
            'parameters': self.fitted.parameters,
            'model': one_line(self.fitted.model_kwargs),
            'epochs': self.epochs,
            'top1': float(last['val_top1']),
            'val_loss': float(last['val_loss']),
            'train_loss': float(last['train_loss']),
        }


def one_line(values: Any) -> str:
    """Arguments of a model as YAML in one line."""
    return yaml.safe_dump(dict(values), default_flow_style=True, width=10**6).strip()


def train(runs: Sequence[Run], jobs: int, progress: Callable[[str], object]) -> list[Run]:
    """Train what is not finished.

    Args:
        runs: In the order in which they start.
        jobs: Processes at a time.
        progress: Called with a line of text when a run ends or fails.

    Returns:
        The runs that failed; their logs say why.
    """
    queue = [run for run in runs if run.result() is None]
    if len(queue) < len(runs):
        progress(f'{len(runs) - len(queue)} of {len(runs)} runs are finished already')
    total, done, failed = len(queue), 0, []
    active: dict[Run, tuple[subprocess.Popen, float]] = {}
    with _interrupted_by_sigterm(), _terminating(active):
        while queue or active:
            while queue and len(active) < jobs:
                run = queue.pop(0)
                active[run] = (_start(run, jobs), time.monotonic())
            for run, (process, started) in list(active.items()):
                if process.poll() is None:
                    continue
                del active[run]
                done += 1
                result = run.result()
                if process.returncode == 0 and result is not None:
                    text = f'top-1 {float(result["val_top1"]):.2f} %'
                else:
                    failed.append(run)
                    text = f'FAILED with exit code {process.returncode}, see {run.log}'
                progress(f'[{done}/{total}] {run.name}: {text}, {time.monotonic() - started:.0f} s')
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
    """A job scheduler's SIGTERM ends the command as Ctrl-C does, and with it the runs."""
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
    recipe.write_text(run.config.to_yaml(), encoding='utf-8')
    command = [sys.executable, '-m', 'hydra_vision.cli', 'train', '--config', str(recipe), '--output', str(run.folder)]
    environment = {'OMP_NUM_THREADS': str(max(1, available_cores() // jobs)), **os.environ}
    with run.log.open('a') as log:
        return subprocess.Popen([*command, '--resume', 'auto'], stdout=log, stderr=log, env=environment)

"""Loggers: where the metrics of a run go besides the terminal: CSV files, TensorBoard, Weights & Biases.

Metrics are one flat mapping from names to numbers. The first part of a name is its group: `step/loss` (inside an
epoch), `mixers/LAYER/dt_mean` (a Hydra layer), `epoch/val_top1` (the end of an epoch).
"""

import contextlib
import csv
import importlib.util
import io
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError, TrainError, WriteError, first_line
from ..io import write_text
from .config import Config, LogConfig

STEPS, MIXERS = 'steps.csv', 'mixers.csv'
STEP_COLUMNS = (
    *('updates', 'epoch', 'lr', 'loss', 'grad_norm', 'param_norm', 'images_per_second', 'skipped', 'loss_scale'),
    *('dt_mean', 'dt_max', 'decay_q05', 'decay_q50', 'decay_q95'),
)
MIXER_COLUMNS = ('updates', 'layer', 'dt_mean', 'dt_max', 'decay_q05', 'decay_q50', 'decay_q95')
_COLUMNS = {STEPS: STEP_COLUMNS, MIXERS: MIXER_COLUMNS}
_WANDB_ID = 'wandb_id'

Metrics = Mapping[str, Any]


class Logger(Protocol):
    """Receives the metrics of a run on rank 0.

    After a resume, steps continue after the checkpoint: what a logger holds of later steps is to be replaced.
    """

    def log(self, step: int, values: Metrics) -> None:
        """Record metrics.

        Args:
            step: Optimizer steps done.
            values: Name -> number; anything else was not measured.
        """

    def close(self) -> None:
        """The run ends here, finished or not."""


def check_packages(log: LogConfig) -> None:
    """Check that the packages of the requested loggers are installed, before any work.

    Raises:
        ConfigError: Names the extra to install.
    """
    wanted = {'tensorboard': log.tensorboard, 'wandb': log.wandb != 'off'}
    for package, on in wanted.items():
        if on and importlib.util.find_spec(package) is None:
            raise ConfigError(f"log.{package} needs the package {package}: pip install 'hydra-vision[log]'")


def create_loggers(config: Config, folder: Path, updates: int, facts: dict[str, Any]) -> list[Logger]:
    """The loggers that a recipe asks for.

    Args:
        config: The recipe.
        folder: Of the run; TensorBoard's and W&B's files go into subfolders.
        updates: Optimizer steps done: what was logged of later ones is replaced.
        facts: Of the model and the data, for W&B.

    Raises:
        TrainError: W&B cannot start the run.
    """
    loggers: list[Logger] = []
    if config.log.every:
        loggers.append(CsvLogger(folder, updates))
    if config.log.tensorboard:
        loggers.append(TensorBoardLogger(folder, updates))
    if config.log.wandb != 'off':
        loggers.append(WandbLogger(config, folder, facts))
    return loggers


class CsvLogger:
    """Appends rows to steps.csv and mixers.csv. (summary.csv is written with the checkpoint.)

    Args:
        folder: Of the run.
        updates: Optimizer steps done: rows of later ones, left by a process that was killed after its last checkpoint,
            are removed.
    """

    def __init__(self, folder: Path, updates: int):
        self.folder = folder
        for name, columns in _COLUMNS.items():
            if (folder / name).is_file():
                _keep_until(folder / name, columns, updates)

    def log(self, step: int, values: Metrics) -> None:
        """One row of steps.csv, and one per layer of mixers.csv."""
        row = {name.removeprefix('step/'): value for name, value in values.items() if name.startswith('step/')}
        if row:
            self._append(STEPS, [{'updates': step, **row}])
        layers: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            if name.startswith('mixers/'):
                _, layer, statistic = name.split('/')
                layers.setdefault(layer, {'updates': step, 'layer': layer})[statistic] = value
        if layers:
            self._append(MIXERS, list(layers.values()))

    def close(self) -> None:
        """Nothing: every row is in the file already."""

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS[name], lineterminator='\n')
        if not (self.folder / name).is_file():
            writer.writeheader()
        for row in rows:
            writer.writerow({key: f'{cell:.6g}' if isinstance(cell, float) else cell for key, cell in row.items()})
        path = self.folder / name
        with _writing(path), open(path, 'a', encoding='utf-8') as file:
            file.write(text.getvalue())


class TensorBoardLogger:
    """Event files in RUN/tensorboard; x is the number of optimizer steps.

    Args:
        folder: Of the run.
        updates: Optimizer steps done; TensorBoard hides what an earlier process logged of later ones.
    """

    def __init__(self, folder: Path, updates: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / 'tensorboard'), purge_step=updates + 1 if updates else None)

    def log(self, step: int, values: Metrics) -> None:
        """One scalar per metric."""
        with _writing(self.writer.log_dir):
            for name, value in _numbers(values).items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class WandbLogger:
    """A Weights & Biases run; offline it writes to RUN/wandb, and `wandb sync` uploads it later.

    A resumed run continues under the same id, kept in RUN/wandb_id.

    Args:
        config: The recipe.
        folder: Of the run.
        facts: Of the model and the data.

    Raises:
        TrainError: W&B cannot start the run (no login, no network).
    """

    def __init__(self, config: Config, folder: Path, facts: dict[str, Any]):
        os.environ.setdefault('WANDB_SILENT', 'true')
        import wandb

        path = folder / _WANDB_ID
        if not path.is_file():
            write_text(path, uuid.uuid4().hex[:12] + '\n')
        try:
            self.run = wandb.init(
                project=config.log.wandb_project,
                name=folder.name,
                id=path.read_text().strip(),
                resume='allow',
                dir=str(folder),
                mode=config.log.wandb,
                config={**config.to_dict(), 'run_facts': facts},
            )
        except (wandb.errors.Error, OSError) as error:
            raise TrainError(f'log.wandb={config.log.wandb!r}: {first_line(error)}; offline needs no login') from error
        self.run.define_metric('updates')
        self.run.define_metric('*', step_metric='updates')

    def log(self, step: int, values: Metrics) -> None:
        """All metrics of a step."""
        self.run.log({'updates': step, **_numbers(values)})

    def close(self) -> None:
        """Write what is left."""
        self.run.finish()


@contextlib.contextmanager
def _writing(path: 'Path | str') -> Iterator[None]:
    """Raises WriteError in place of what a full or read-only disk raises."""
    try:
        yield
    except OSError as error:
        raise WriteError(f'could not write {path}: {first_line(error)}') from error


def _numbers(values: Metrics) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}


def _keep_until(path: Path, columns: tuple[str, ...], updates: int) -> None:
    """Keep the header and the complete rows up to an optimizer step in a file."""
    rows = path.read_text(encoding='utf-8', errors='replace').splitlines()[1:]
    cells = [row.split(',') for row in rows]
    kept = [row for row in cells if len(row) == len(columns) and row[0].isdigit() and int(row[0]) <= updates]
    write_text(path, ''.join(','.join(row) + '\n' for row in [list(columns), *kept]))

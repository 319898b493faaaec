"""Where the numbers of a run go, beside the terminal."""

import csv
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from hydra_vision.io import write_text
from hydra_vision.train.stats import mixer_statistics

if TYPE_CHECKING:
    from hydra_vision.train.engine import Trainer

STEPS, MIXERS = 'steps.csv', 'mixers.csv'
STEP_COLUMNS = (
    *('updates', 'epoch', 'lr', 'loss', 'grad_norm', 'param_norm', 'images_per_second', 'skipped', 'loss_scale'),
    *('dt_mean', 'dt_max', 'decay_q05', 'decay_q50', 'decay_q95'),
)
MIXER_COLUMNS = ('updates', 'layer', 'dt_mean', 'dt_max', 'decay_q05', 'decay_q50', 'decay_q95')
_COLUMNS = {STEPS: STEP_COLUMNS, MIXERS: MIXER_COLUMNS}

Layers = dict[str, dict[str, float]]


class Sink(Protocol):
    """Receives the numbers of a run on the process that writes (rank 0).

    The trainer calls every sink in the order of `Trainer.sinks`. After a resume, `step` and `epoch` go on after the
    checkpoint: what a sink holds of later updates is to be replaced.
    """

    def step(self, updates: int, values: dict[str, float | None], layers: Layers) -> None:
        """Numbers at one update, every `log.every` updates.

        Args:
            updates: optimizer steps done.
            values: the columns of steps.csv; over the layers, the worst (`dt_max`, `decay_q05`, `decay_q95`) or the
                mean (`dt_mean`, `decay_q50`); None where it was not measured.
            layers: name of a Hydra layer -> its statistics.
        """

    def epoch(self, row: dict[str, Any]) -> None:
        """The row of summary.csv that an epoch ended with."""

    def close(self) -> None:
        """The run ends here, finished or not."""


class CsvLog:
    """Writes steps.csv and mixers.csv, a row at a time.

    Args:
        folder: of the run.
        updates: optimizer steps done: rows of later ones, left by a process that went on after its last checkpoint,
            are removed.
    """

    def __init__(self, folder: Path, updates: int):
        self.folder = folder
        for name, columns in _COLUMNS.items():
            if (folder / name).is_file():
                _keep_until(folder / name, columns, updates)

    def step(self, updates: int, values: dict[str, float | None], layers: Layers) -> None:
        """One row, and one a layer."""
        self._append(STEPS, [[values.get(column) for column in STEP_COLUMNS]])
        rows = [[updates, name, *(layer[column] for column in MIXER_COLUMNS[2:])] for name, layer in layers.items()]
        self._append(MIXERS, rows)

    def epoch(self, row: dict[str, Any]) -> None:
        """Nothing: summary.csv belongs to the checkpoint."""

    def close(self) -> None:
        """Nothing: every row is in the file already."""

    def _append(self, name: str, rows: list[list[Any]]) -> None:
        if not rows:
            return
        text = io.StringIO()
        if not (self.folder / name).is_file():
            text.write(','.join(_COLUMNS[name]) + '\n')
        formatted = [[f'{cell:.6g}' if isinstance(cell, float) else cell for cell in row] for row in rows]
        csv.writer(text, lineterminator='\n').writerows(formatted)
        with open(self.folder / name, 'a', encoding='utf-8') as file:
            file.write(text.getvalue())


class StepLog:
    """Measures where training is and tells the sinks, every `log.every` updates.

    Args:
        every: updates between rows, 0 for none.
    """

    def __init__(self, every: int):
        self.every = every

    def start(self, updates: int) -> None:
        """The pace is measured from here on, where so many updates are done."""
        self.time, self.updates = time.monotonic(), updates

    def due_at(self, step: int) -> bool:
        """Whether an update is one of those that are measured."""
        return self.every > 0 and step % self.every == 0

    def write(self, run: 'Trainer', images: torch.Tensor) -> None:
        """One row; waits for the device.

        Args:
            run: what is measured.
            images: (B, C, H, W) of the latest batch, on which Hydra layers are measured.
        """
        learner, config = run.learner, run.config
        seconds, updates = time.monotonic() - self.time, learner.updates - self.updates
        images_an_update = config.data.batch_size * config.optim.accum_steps
        layers = {}
        if config.log.mixers and (run.world.primary or learner.sharded):
            layers = mixer_statistics(run.model, images[: config.log.mixer_images], run.amp)
        values = {
            'updates': learner.updates,
            'epoch': run.epoch + run.progress.batches / len(run.train_loader),
            'lr': learner.lr,
            'loss': run.progress.last_loss,
            'grad_norm': learner.grad_norm,
            'param_norm': learner.param_norm(),
            'images_per_second': updates * images_an_update / max(seconds, 1e-9),
            'skipped': learner.skipped,
            'loss_scale': learner.scaler.get_scale() if learner.scaler.is_enabled() else None,
            **across_layers(layers),
        }
        for sink in run.sinks:
            sink.step(learner.updates, values, layers)
        self.start(learner.updates)


def across_layers(layers: Layers) -> dict[str, float]:
    """The worst layer's extremes and the mean of the middle ones; empty without layers."""
    if not layers:
        return {}
    column = {key: [layer[key] for layer in layers.values()] for key in MIXER_COLUMNS[2:]}
    pick = {'dt_max': max, 'decay_q05': min, 'decay_q95': max}
    return {key: pick[key](values) if key in pick else sum(values) / len(values) for key, values in column.items()}


def _keep_until(path: Path, columns: tuple[str, ...], updates: int) -> None:
    """Leaves the header and the complete rows up to an update in a file."""
    rows = path.read_text(encoding='utf-8').splitlines()[1:]
    cells = [row.split(',') for row in rows]
    kept = [row for row in cells if len(row) == len(columns) and row[0].isdigit() and int(row[0]) <= updates]
    write_text(path, ''.join(','.join(row) + '\n' for row in [list(columns), *kept]))

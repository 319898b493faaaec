"""Images a second and memory of the ablation's models, one process, nothing else on the device."""

import csv
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
import yaml

from hydra_vision.bench.ablation.runs import Run
from hydra_vision.bench.report import write_csv
from hydra_vision.bench.turns import failed, time_in_turns
from hydra_vision.errors import UserError
from hydra_vision.train import build

__all__ = ['MODES', 'Speed', 'SpeedFile', 'measure_speed', 'read_speed']

MODES = ('infer', 'train')


@dataclasses.dataclass(frozen=True)
class Speed:
    """What was measured for one row in one mode."""

    row: str
    mode: str
    images_per_second: Optional[float]
    peak_bytes: Optional[int]
    status: str = 'ok'

    def csv(self, run: dict[str, Any]) -> dict[str, Any]:
        """One row of speed.csv; ``run`` holds what else belongs to the row."""
        return {
            'row': self.row,
            'mode': self.mode,
            **run,
            'images_per_s': None if self.images_per_second is None else round(self.images_per_second, 1),
            'peak_memory_gib': None if self.peak_bytes is None else round(self.peak_bytes / 2**30, 4),
            'status': self.status,
        }


class SpeedFile:
    """speed.csv: written anew after every mode, kept for rows and modes that another command measured.

    Args:
        path: Of the file.
        run: What is the same in every row: device, dtype.

    Raises:
        UserError: The file cannot be read, or holds times of another device or precision; it is not changed.
    """

    def __init__(self, path: Path, run: Mapping[str, str]) -> None:
        self.path, self.run = path, dict(run)
        self._lines = {(line['row'], line['mode']): line for line in read_speed(path)}
        for line in self._lines.values():
            for key, value in self.run.items():
                if line.get(key) != value:
                    raise UserError(
                        f'{path} was measured with {key} = {line.get(key)!r}, this command has {value!r}; choose '
                        'another --output'
                    )

    def missing(self, runs: Sequence[Run], mode: str) -> list[Run]:
        """Runs without a result in this mode, or with one of another model or batch size, or a failed one."""
        return [run for run in runs if not self._has(run, mode)]

    def _has(self, run: Run, mode: str) -> bool:
        line = self._lines.get((run.fitted.row.name, mode))
        same = line is not None and all(line.get(key) == str(value) for key, value in _identity(run).items())
        return same and not failed(line['status'])

    def add(self, speeds: Sequence[Speed], runs: Sequence[Run]) -> None:
        """Keep what was measured, on the disk too."""
        identities = {run.fitted.row.name: _identity(run) for run in runs}
        for speed in speeds:
            self._lines[speed.row, speed.mode] = speed.csv({**identities[speed.row], **self.run})
        write_csv(self.path, list(self._lines.values()))


def _identity(run: Run) -> dict[str, Any]:
    """What a row of speed.csv is about beside the row's name."""
    size = run.config.data.img_size
    model = {'name': run.config.model.name, **run.config.model.kwargs}
    return {
        'batch': run.config.data.batch_size,
        'img_size': size if isinstance(size, int) else 'x'.join(map(str, size)),
        'parameters': run.fitted.parameters,
        'model': yaml.safe_dump(model, default_flow_style=True, width=10**6).strip(),
    }


def read_speed(path: Path) -> list[dict[str, str]]:
    """Rows of a speed.csv; none where there is no such file.

    Raises:
        UserError: It is not a speed.csv.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline='') as file:
            lines = list(csv.DictReader(file))
        for line in lines:
            line['row'], line['mode'], line['status']
    except (OSError, KeyError, csv.Error, UnicodeError) as error:
        raise UserError(f'{path} cannot be read ({error!r}); choose another --output') from error
    return lines


def measure_speed(
    runs: Sequence[Run], mode: str, device: torch.device, *, rounds: int, time_limit: float
) -> list[Speed]:
    """Time every row's model, in turns, for inference or for training (forward, loss, backward; no optimizer).

    Args:
        runs: One a row.
        mode: One of ``MODES``.
        device: Where to run; eager mode, in the precision of the recipe.
        rounds: Rounds at most.
        time_limit: Seconds of measuring.
    """
    by_name = {run.fitted.row.name: run for run in runs}
    found = time_in_turns(
        list(by_name), lambda name: _step(by_name[name], mode, device), device, rounds=rounds, time_limit=time_limit
    )
    results = []
    for name, outcome in found.items():
        timing = outcome.timing
        rate = None if timing is None else by_name[name].config.data.batch_size / timing.median
        results.append(Speed(name, mode, rate, None if timing is None else outcome.peak_bytes, outcome.status))
    return results


def _step(run: Run, mode: str, device: torch.device) -> Callable[[], object]:
    config = run.config
    model = build.create_model(config, config.model.num_classes).to(device).train(mode == 'train')
    amp = build.amp_dtype(config, device)
    size = config.data.img_size
    sides = (size, size) if isinstance(size, int) else size
    images = torch.randn(config.data.batch_size, config.model.in_chans, *sides, device=device)
    target = torch.randint(config.model.num_classes, (config.data.batch_size,), device=device)

    def infer() -> torch.Tensor:
        with torch.no_grad(), torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            return model(images)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            loss = F.cross_entropy(model(images), target)
        loss.backward()

    return train if mode == 'train' else infer

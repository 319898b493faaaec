"""TensorBoard and Weights & Biases: sinks for the numbers of a run, see `hydra_vision.train.log`."""

import importlib.util
import os
import uuid
from pathlib import Path
from typing import Any

from hydra_vision.errors import ConfigError, TrainError, first_line
from hydra_vision.io import write_text
from hydra_vision.train.config import Config
from hydra_vision.train.log import Sink

_ID = 'wandb_id'


def check_packages(config: Config) -> None:
    """Refuses a logger whose package is missing, before any work.

    Raises:
        ConfigError: names the extra to install.
    """
    wanted = {'tensorboard': config.log.tensorboard, 'wandb': config.log.wandb != 'off'}
    for package, on in wanted.items():
        if on and importlib.util.find_spec(package) is None:
            raise ConfigError(f"log.{package} needs the package {package}: pip install 'hydra-vision[log]'")


def create_loggers(config: Config, folder: Path, updates: int, facts: dict[str, Any]) -> list[Sink]:
    """The loggers that a recipe asks for.

    Args:
        config: the recipe.
        folder: of the run; TensorBoard's and W&B's files go into folders of their own there.
        updates: optimizer steps done: what was logged of later ones is replaced.
        facts: of the model and the data.

    Raises:
        TrainError: W&B cannot start the run.
    """
    check_packages(config)
    sinks: list[Sink] = []
    if config.log.tensorboard:
        sinks.append(TensorBoardLog(folder, updates))
    if config.log.wandb != 'off':
        sinks.append(WandbLog(config, folder, facts))
    return sinks


def _numbers(values: dict[str, Any], prefix: str, leave_out: tuple[str, ...] = ()) -> dict[str, float]:
    """What can be drawn, with the names that a logger groups by."""
    return {
        f'{prefix}/{key}': float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and key not in leave_out
    }


class TensorBoardLog:
    """Event files in RUN/tensorboard; x is the number of updates.

    Args:
        folder: of the run.
        updates: optimizer steps done; TensorBoard hides what an earlier process logged of later ones.
    """

    def __init__(self, folder: Path, updates: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / 'tensorboard'), purge_step=updates + 1 if updates else None)

    def step(self, updates: int, values: dict[str, float | None], layers: dict[str, dict[str, float]]) -> None:
        """Numbers inside an epoch."""
        for name, value in _numbers(values, 'step', ('updates',)).items():
            self.writer.add_scalar(name, value, updates)
        for layer, statistics in layers.items():
            for name, value in _numbers(statistics, f'mixers/{layer}').items():
                self.writer.add_scalar(name, value, updates)

    def epoch(self, row: dict[str, Any]) -> None:
        """Numbers of an epoch."""
        for name, value in _numbers(row, 'epoch', ('updates',)).items():
            self.writer.add_scalar(name, value, row['updates'])
        self.writer.flush()

    def close(self) -> None:
        """Writes what is left."""
        self.writer.close()


class WandbLog:
    """A Weights & Biases run; offline it writes to RUN/wandb, and `wandb sync` uploads it later.

    A run that is continued goes on under the same id, kept in RUN/wandb_id.

    Raises:
        TrainError: W&B refuses (no login, no network).
    """

    def __init__(self, config: Config, folder: Path, facts: dict[str, Any]):
        os.environ.setdefault('WANDB_SILENT', 'true')
        import wandb

        path = folder / _ID
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

    def step(self, updates: int, values: dict[str, float | None], layers: dict[str, dict[str, float]]) -> None:
        """Numbers inside an epoch."""
        numbers = _numbers(values, 'step', ('updates',))
        for layer, statistics in layers.items():
            numbers |= _numbers(statistics, f'mixers/{layer}')
        self.run.log({'updates': updates, **numbers})

    def epoch(self, row: dict[str, Any]) -> None:
        """Numbers of an epoch."""
        self.run.log({'updates': row['updates'], **_numbers(row, 'epoch', ('updates',))})

    def close(self) -> None:
        """Writes what is left."""
        self.run.finish()

"""When a run is saved, what its checkpoints hold, and how it goes on from one."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import timm
import torch

from hydra_vision.errors import CheckpointError, ConfigError, WriteError
from hydra_vision.train import report
from hydra_vision.train.checkpoint import LAST, save_checkpoint
from hydra_vision.train.fields import CheckpointConfig
from hydra_vision.train.progress import Progress
from hydra_vision.train.randomness import random_state, seed_generators, set_random_state
from hydra_vision.version import __version__

if TYPE_CHECKING:
    from hydra_vision.train.engine import Trainer


class Saver:
    """Writes the checkpoints of a run, and knows when.

    Args:
        config: when checkpoints are due, and how many are kept.
    """

    def __init__(self, config: CheckpointConfig):
        self.config = config
        self.saved, self.asked = time.monotonic(), False

    def due_by_clock(self) -> bool:
        """Whether this process asks for a checkpoint because checkpoint.every_minutes have passed.

        It asks once: what several processes ask for is done an update later, by when it would ask again.
        """
        every = self.config.every_minutes
        if every is None or self.asked:
            return False
        self.asked = (time.monotonic() - self.saved) / 60 >= every
        return self.asked

    def due_at(self, step: int) -> bool:
        """Whether checkpoint.every_steps wants a checkpoint after an update."""
        every = self.config.every_steps
        return every is not None and step % every == 0

    def save(self, run: 'Trainer') -> None:
        """Checkpoint first, then the summary: what the summary tells can be resumed from.

        Raises:
            CheckpointError: on every process, where it could not be written.
        """
        state = _state(run)
        error = None
        if run.world.primary:
            try:
                is_best = run.best is not None and run.best['epoch'] == run.epoch and not run.progress.batches
                save_checkpoint(run.folder, state, is_best, self.config.keep_last, self._best_steps(run.history))
                report.write_summary(run.folder, run.history)
            except (CheckpointError, WriteError) as raised:
                error = str(raised)
        error = run.world.broadcast(error)
        if error is not None:
            raise CheckpointError(error).of_all()
        self.saved, self.asked = time.monotonic(), False
        note_good(run)

    def _best_steps(self, history: Sequence[report.Row]) -> set[int]:
        """Optimizer steps of the best epochs so far, as many as checkpoints of them are to be kept."""
        scores = [
            (max(row[key] for key in ('val_top1', 'ema_top1') if row.get(key) is not None), row['updates'])
            for row in history
            if row.get('val_top1') is not None
        ]
        return {updates for _, updates in sorted(scores, reverse=True)[: self.config.keep_best]}


def note_good(run: 'Trainer') -> None:
    """What an error may say of the latest checkpoint."""
    where = f'step {run.learner.updates}' if run.progress.batches else f'epoch {run.epoch}'
    last = run.folder / LAST
    run.guard.last_good = f'the last good checkpoint is {last} ({where})'
    if not last.is_file():
        run.guard.last_good = 'the checkpoint that it was resumed from is good'


def _state(run: 'Trainer') -> dict[str, Any]:
    """What a checkpoint holds; a collective call."""
    return {
        'arch': run.config.model.name,
        'config': run.config.to_dict(),
        'num_classes': run.num_classes,
        'classes': run.classes,
        'epoch': run.epoch,
        'progress': run.progress.to_dict(),
        'best': run.best,
        'history': run.history,
        **run.learner.state(),
        'random': run.world.gather(random_state(run.device)),
        'versions': {'hydra_vision': __version__, 'timm': timm.__version__, 'torch': str(torch.__version__)},
    }


def restore(run: 'Trainer', state: dict[str, Any]) -> None:
    """Takes over everything that a checkpoint holds beside what learns.

    Raises:
        ConfigError: the recipe cuts a half-trained epoch into other batches.
    """
    run.epoch, run.history, run.best = state['epoch'], state['history'], state['best']
    run.progress = Progress(**state['progress'])
    if run.progress.batches:
        before = state['config']
        for key, now in (
            ('data.batch_size', run.config.data.batch_size),
            ('optim.accum_steps', run.config.optim.accum_steps),
        ):
            section, name = key.split('.')
            if before[section][name] != now:
                raise ConfigError(
                    f'{key}: {before[section][name]} -> {now} is not possible in the middle of epoch {run.epoch + 1}, '
                    f'where the checkpoint was written; resume with {before[section][name]}, or from the checkpoint of '
                    f"an epoch's end"
                )
    if run.world.rank < len(state['random']):
        set_random_state(state['random'][run.world.rank], run.device)
    else:
        seed_generators((run.config.run.seed, run.world.rank, run.learner.updates), run.device)
    if len(state['random']) != run.world.size:
        run.console.print(
            f'resuming with {run.world.size} instead of {len(state["random"])} processes: the images of every step '
            f'stay the same, dropout and mixing draw other numbers',
            highlight=False,
            soft_wrap=True,
        )

"""Stops a run whose numbers went wrong, before a checkpoint could keep them."""

import math

import torch

from hydra_vision.errors import NonFiniteError
from hydra_vision.train import build
from hydra_vision.train.config import Config
from hydra_vision.train.distributed import World
from hydra_vision.train.learner import Learner
from hydra_vision.train.progress import Progress


class Guard:
    """Looks at losses, weights and the loss scale; every process comes to the same decision.

    Args:
        config: the recipe.
        learner: what is looked at.
        world: the processes.

    Attributes:
        last_good: what an error says of the last good checkpoint.
    """

    def __init__(self, config: Config, learner: Learner, world: World):
        self.config, self.learner, self.world = config, learner, world
        self.last_good = 'no epoch was finished yet'
        self.counted: tuple[int, int] | None = None  # epoch and update of the last step that was counted as bad

    def check_losses(self, progress: Progress, epoch: int, batches: int) -> None:
        """Takes the latest losses into account, averaged over the processes; stops at one that is NaN or infinite.

        Where optim.skip_nonfinite allows it, such a batch is left out of the mean: its update was skipped as well.

        Args:
            progress: of the epoch; its latest losses are moved into the mean.
            epoch: epochs done.
            batches: in an epoch.
        """
        if not progress.losses:
            return
        losses = self.world.sum(torch.stack(progress.losses)) / self.world.size
        first = progress.batches - len(progress.losses)
        progress.losses.clear()
        for number, value in enumerate(losses.tolist(), start=first + 1):
            update = (epoch, (number - 1) // self.config.optim.accum_steps)
            if math.isfinite(value):
                progress.checked += 1
                progress.loss_sum += value
                progress.last_loss = value
            elif not self.config.optim.skip_nonfinite:
                step = epoch * build.updates_in(batches, self.config.optim.accum_steps) + update[1] + 1
                self._stop(f'the loss became {value} at step {step} (epoch {epoch + 1}, batch {number})')
            elif self.learner.scaler.is_enabled() and update != self.counted:
                self.learner.skipped, self.counted = self.learner.skipped + 1, update
        self.check_steps()

    def check_steps(self) -> None:
        """Stops where more bad steps were skipped than the recipe allows, or fp16's scale shows that all are bad."""
        learner, limit = self.learner, self.config.optim.skip_nonfinite
        if learner.skipped > limit > 0:
            self._stop(
                f'{learner.skipped} steps had a loss or a gradient that is NaN or infinite, the latest at step '
                f'{learner.updates} (optim.skip_nonfinite={limit})'
            )
        if learner.scaler.is_enabled() and learner.updates % 50 == 0 and learner.scaler.get_scale() < 1:
            self._stop(f'the loss scale of fp16 fell below 1 at step {learner.updates}: every gradient is infinite')

    def check_weights(self, epoch: int) -> None:
        """Stops where the last step broke the weights, which no loss has shown yet."""
        if self.learner.broken_weights():
            step = f'step {self.learner.updates} (epoch {epoch + 1})'
            self._stop(f'a weight or a running statistic is no longer finite after {step}')

    def _stop(self, what: str) -> None:
        raise NonFiniteError(
            f'stopped: {what}; {self.last_good}. A smaller optim.lr or optim.clip_grad may help.'
        ).of_all()

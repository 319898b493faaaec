"""Ends a run whose loss or weights became NaN or infinite, before a checkpoint could keep them."""

import dataclasses
import math
from typing import Any

import torch

from ..errors import NonFiniteError
from .build import updates_in
from .config import OptimConfig
from .distributed import World
from .learner import Learner


@dataclasses.dataclass
class EpochProgress:
    """Progress of the epoch that is being trained: what a checkpoint inside an epoch needs to continue.

    Attributes:
        batches: Batches of this process that are done.
        checked: How many of them have a finite loss that is in `loss_sum`.
        loss_sum: Sum of their losses, each a mean over the processes.
        last_loss: The latest of them.
        images: Images of all processes.
        seconds: Training time.
        waited: Part of it spent waiting for data.
        losses: Losses of the latest batches, still on the device and not checked yet.
    """

    batches: int = 0
    checked: int = 0
    loss_sum: float = 0.0
    last_loss: float = math.nan
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    losses: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def mean_loss(self) -> float | None:
        """Mean of the losses checked so far, None before the first."""
        return self.loss_sum / self.checked if self.checked else None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; the losses must have been checked."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields['losses']
        return fields


class NonFiniteGuard:
    """Checks losses, weights and the loss scale; every process comes to the same decision.

    Args:
        optim: Section of the recipe.
        learner: What is checked.
        world: The processes.

    Attributes:
        last_good: What an error says about the last good checkpoint.
    """

    def __init__(self, optim: OptimConfig, learner: Learner, world: World):
        self.optim, self.learner, self.world = optim, learner, world
        self.last_good = 'no epoch was finished yet'
        self.counted: tuple[int, int] | None = None  # epoch and step of the last bad step that was counted

    def check_losses(self, progress: EpochProgress, epoch: int, batches: int) -> None:
        """Average the latest losses over the processes and add them to the mean; stop at one that is not finite.

        Where optim.skip_nonfinite allows it, such a batch is not part of the mean: its step was skipped as well.
        Synchronizes with the device.

        Args:
            progress: Its latest losses are moved into the mean.
            epoch: Epochs done.
            batches: Batches per epoch.
        """
        if not progress.losses:
            return
        losses = self.world.sum(torch.stack(progress.losses)) / self.world.size
        first = progress.batches - len(progress.losses)
        progress.losses.clear()
        accum = self.optim.accum_steps
        for number, value in enumerate(losses.tolist(), start=first + 1):
            step = (epoch, (number - 1) // accum)
            if math.isfinite(value):
                progress.checked += 1
                progress.loss_sum += value
                progress.last_loss = value
            elif not self.optim.skip_nonfinite:
                update = epoch * updates_in(batches, accum) + step[1] + 1
                self._stop(f'the loss became {value} at step {update} (epoch {epoch + 1}, batch {number})')
            elif self.learner.scaler.is_enabled() and step != self.counted:
                self.learner.skipped, self.counted = self.learner.skipped + 1, step
        self.check_steps()

    def check_steps(self) -> None:
        """Stop where more steps were skipped than the recipe allows, or fp16's loss scale shows that all are bad."""
        learner, limit = self.learner, self.optim.skip_nonfinite
        if learner.skipped > limit > 0:
            self._stop(
                f'{learner.skipped} steps had a loss or a gradient that is NaN or infinite, the latest at step '
                f'{learner.updates} (optim.skip_nonfinite={limit})'
            )
        if learner.scaler.is_enabled() and learner.updates % 50 == 0 and learner.scaler.get_scale() < 1:
            self._stop(f'the loss scale of fp16 fell below 1 at step {learner.updates}: every gradient is infinite')

    def check_weights(self, epoch: int) -> None:
        """Stop where the last step broke the weights, which no loss has shown yet."""
        if self.learner.broken_weights():
            step = f'step {self.learner.updates} (epoch {epoch + 1})'
            self._stop(f'a weight or a running statistic is no longer finite after {step}')

    def _stop(self, what: str) -> None:
        raise NonFiniteError(
            f'stopped: {what}; {self.last_good}. A smaller optim.lr or optim.clip_grad may help.'
        ).of_all()

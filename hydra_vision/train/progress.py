"""How far an epoch has come: what a checkpoint inside an epoch needs to go on."""

import dataclasses
import math
from typing import Any

import torch


@dataclasses.dataclass
class Progress:
    """Of the epoch that is being trained.

    Attributes:
        batches: of this process that are done.
        checked: of these, how many have a finite loss that is in `loss_sum`.
        loss_sum: of their losses, each a mean over the processes.
        last_loss: the latest of them.
        images: of all processes.
        seconds: of training.
        waited: of these, waiting for data.
        losses: of the latest batches, still on the device and not yet looked at.
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
        """Mean of the losses looked at so far, None before the first."""
        return self.loss_sum / self.checked if self.checked else None

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint; the losses must have been looked at."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields['losses']
        return fields

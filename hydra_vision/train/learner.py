"""What learns: model, loss, optimizer, schedule, loss scale and moving average, and one update of all of them."""

from typing import Any

import torch
from timm.utils import dispatch_clip_grad
from torch import nn

from hydra_vision.train import build
from hydra_vision.train.config import Config
from hydra_vision.train.device import check_compile_mode, compile_model
from hydra_vision.train.errors import CheckpointError


class Learner:
    """Everything that an update changes.

    Args:
        config: the recipe.
        model: on its device.
        device: where the model is.
        amp: autocast type, None for none.
        updates_per_epoch: optimizer steps an epoch, for the schedule.

    Attributes:
        model: the plain model, whose `state_dict` is saved.
        task: timm's training task around it: images and targets to `{"loss": ..., "output": ...}`.
        forward: the model as validation calls it (compiled where the recipe says so).
        forward_ema: the averaged model as validation calls it, or None.
        epochs: length of the schedule, cool-down included.
        updates: optimizer steps done.
    """

    def __init__(
        self, config: Config, model: nn.Module, device: torch.device, amp: torch.dtype | None, updates_per_epoch: int
    ):
        self.config, self.model, self.device, self.amp = config, model, device, amp
        self.ema = build.create_ema(config, model)
        self.task = build.create_task(config, model, device)
        self.optimizer = build.create_optimizer(config, model)
        self.schedule, self.epochs = build.create_schedule(config, self.optimizer, updates_per_epoch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.updates = 0
        self.forward, self.forward_ema = model, None if self.ema is None else self.ema.module

    def compile(self) -> None:
        """Compiles what the recipe wants compiled; after `load_state`, so that weights are loaded into plain modules.

        Raises:
            ConfigError: an unknown mode.
        """
        if not self.config.run.torch_compile:
            return
        check_compile_mode(self.config)
        self.forward = self.task.compile(mode=self.config.run.compile_mode)
        if self.ema is not None:
            self.forward_ema = compile_model(self.ema.module, self.config)

    def backward(self, images: torch.Tensor, targets: torch.Tensor, group: int) -> torch.Tensor:
        """Adds the gradient of one batch.

        Args:
            images: (B, C, H, W) on the device.
            targets: class indices (B,), or their shares (B, classes).
            group: batches of this update, over which the loss is averaged.

        Returns:
            The loss, a float32 scalar on the device.
        """
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            loss = self.task(images, targets)["loss"]
        self.scaler.scale(loss / group).backward()
        return loss.detach().float()

    def update(self) -> None:
        """One optimizer step, and what follows from it."""
        optim = self.config.optim
        if optim.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), optim.clip_grad, mode=optim.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.updates)
        if self.schedule is not None:
            self.schedule.step_update(self.updates)

    def end_epoch(self, epochs: int) -> None:
        """Tells the schedule how many epochs are done."""
        if self.schedule is not None:
            self.schedule.step(epochs)

    @property
    def lr(self) -> float:
        """Current learning rate of the top layers."""
        return self.optimizer.param_groups[-1]["lr"]

    def broken_weights(self) -> bool:
        """Whether a weight is NaN or infinite."""
        return not bool(torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "updates": self.updates,
            "state_dict": self.model.state_dict(),
            "state_dict_ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any], epochs: int) -> None:
        """Takes over what a checkpoint holds; the schedule follows from the counters.

        Raises:
            CheckpointError: it does not fit.
        """
        settings = [{key: group[key] for key in group if key != "params"} for group in self.optimizer.param_groups]
        try:
            self.model.load_state_dict(state["state_dict"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["state_dict_ema"] or state["state_dict"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"the checkpoint does not fit {self.config.model.name}: {error}") from error
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)  # a setting that was changed on purpose holds, also after a resume
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.updates = state["updates"]
        self.end_epoch(epochs)
        if self.schedule is not None:
            self.schedule.step_update(self.updates)

"""What learns: model, loss, optimizer, schedule, loss scale and moving average, and one update of all of them."""

import contextlib
import itertools
import math
import warnings
from typing import Any

import torch
from timm.utils import dispatch_clip_grad, distribute_bn
from torch import nn

from hydra_vision.errors import CheckpointError, ConfigError
from hydra_vision.train import build
from hydra_vision.train.config import Config
from hydra_vision.train.device import check_compile_mode, compile_model
from hydra_vision.train.distributed import World
from hydra_vision.train.freeze import frozen_parts_to_eval
from hydra_vision.train.stats import total_norm


class Learner:
    """Everything that an update changes.

    Args:
        config: the recipe.
        model: on its device; the same weights on every process.
        device: where the model is.
        amp: autocast type, None for none.
        updates_per_epoch: optimizer steps an epoch, for the schedule.
        world: the processes that train it together.
        state: what `state()` gave, to go on from.
        epochs_done: that belong to `state`.

    Attributes:
        model: the plain model, whose `state_dict` is saved.
        task: timm's training task around it: images and targets to `{"loss": ..., "output": ...}`.
        forward: the model as validation calls it (compiled where the recipe says so).
        forward_ema: the averaged model as validation calls it, or None.
        epochs: length of the schedule, cool-down included.
        updates: optimizer steps done, skipped ones included.
        skipped: of these, how many were left out for gradients that are NaN or infinite.
        lr: learning rate of the top layers in the latest update.
        grad_norm: of the last update that measured it, before clipping.

    Raises:
        ConfigError: settings that do not fit the model or one another.
        CheckpointError: `state` does not fit.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        device: torch.device,
        amp: torch.dtype | None,
        updates_per_epoch: int,
        world: World | None = None,
        state: dict[str, Any] | None = None,
        epochs_done: int = 0,
    ):
        self.config, self.model, self.device, self.amp = config, model, device, amp
        self.world = world or World()
        self.sharded = config.distributed.strategy == 'fsdp' and self.world.size > 1
        if self.sharded and amp is torch.float16:
            raise ConfigError("distributed.strategy='fsdp' does not go with run.amp='fp16'; allowed: bf16, none")
        if state is not None:
            self._load(model, state['state_dict'])
        self.ema = build.create_ema(config, model)
        if state is not None and self.ema is not None:
            self._load(self.ema.module, state['state_dict_ema'] or state['state_dict'])
        if self.sharded:
            from hydra_vision.train.sharding import shard

            shard(model, device)
            if self.ema is not None:
                shard(self.ema.module, device)
        self.task = build.create_task(config, model, device)
        self.optimizer = build.create_optimizer(config, model)
        self.schedule, self.epochs = build.create_schedule(config, self.optimizer, updates_per_epoch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.updates, self.skipped, self.grad_norm, self.lr = 0, 0, math.nan, self._lr()
        if state is not None:
            self._restore(state, epochs_done)
        self.forward, self.forward_ema = model, None if self.ema is None else self.ema.module
        self._compile()
        if self.world.size > 1 and not self.sharded:
            device_ids = [device.index] if device.type == 'cuda' else None
            # said of the depthwise convolution's gradient, whose strides differ in a dimension of size 1 only
            warnings.filterwarnings('ignore', message='Grad strides do not match bucket view strides')
            self.task.prepare_distributed(device_ids=device_ids)
            if config.distributed.gradients == 'bf16':
                from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

                self.task.trainable_module.register_comm_hook(None, bf16_compress_hook)

    def _compile(self) -> None:
        """Compiles what the recipe wants compiled: after weights are loaded, before the processes are tied together."""
        if not self.config.run.torch_compile:
            return
        check_compile_mode(self.config)
        self.forward = self.task.compile(mode=self.config.run.compile_mode)
        if self.ema is not None:
            self.forward_ema = compile_model(self.ema.module, self.config)

    def train(self) -> None:
        """Training mode, but for what is frozen."""
        self.task.train()
        if self.config.model.freeze_backbone:
            frozen_parts_to_eval(self.model)

    def backward(self, images: torch.Tensor, targets: torch.Tensor, group: int, last: bool = True) -> torch.Tensor:
        """Adds the gradient of one batch.

        Args:
            images: (B, C, H, W) on the device.
            targets: class indices (B,), or their shares (B, classes).
            group: batches of this update, over which the loss is averaged.
            last: whether it is the last of them; only then processes exchange their gradients.

        Returns:
            The loss of this process, a float32 scalar on the device.
        """
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if last or self.sharded else self.task.no_sync():
            with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
                loss = self.task(images, targets)['loss']
            self.scaler.scale(loss / group).backward()
        return loss.detach().float()

    def update(self, measure: bool = False) -> None:
        """One optimizer step, and what follows from it.

        Args:
            measure: put the norm of the gradient into `grad_norm`; waits for the device.
        """
        optim = self.config.optim
        guarded = optim.skip_nonfinite > 0 and not self.scaler.is_enabled()  # fp16: the scaler leaves such steps out
        if optim.clip_grad is not None or measure or guarded:
            self.scaler.unscale_(self.optimizer)
        if measure or guarded:
            self.grad_norm = total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        self.updates += 1
        if guarded and not math.isfinite(self.grad_norm):
            self.skipped += 1
        else:
            if optim.clip_grad is not None:
                agc = optim.clip_mode == 'agc'  # which leaves the classifier out, as its paper and timm's script do
                parameters = self.task.get_clip_parameters(exclude_head=agc)
                dispatch_clip_grad(parameters, optim.clip_grad, mode=optim.clip_mode)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema is not None:
                self.ema.update(self.model, step=self.updates)
        self.optimizer.zero_grad(set_to_none=True)
        self.lr = self._lr()
        if self.schedule is not None:
            self.schedule.step_update(self.updates)

    def end_epoch(self, epochs: int) -> None:
        """Tells the schedule how many epochs are done."""
        if self.schedule is not None:
            self.schedule.step(epochs)

    def share_statistics(self) -> None:
        """Averages the running statistics of batch norms, which each process has of its own images."""
        if self.world.size > 1:
            for model in (self.model, *([] if self.ema is None else [self.ema.module])):
                distribute_bn(model, self.world.size, reduce=True)

    def _lr(self) -> float:
        """Learning rate of the top layers in the next update."""
        return self.optimizer.param_groups[-1]['lr']

    def param_norm(self) -> float:
        """Euclidean norm of all weights; waits for the device."""
        return total_norm(self.model.parameters())

    def broken_weights(self) -> bool:
        """Whether a weight, or a running statistic of a norm, is NaN or infinite, on any process."""
        statistics = (b for name, b in self.model.named_buffers() if name.endswith(('running_mean', 'running_var')))
        tensors = itertools.chain(self.model.parameters(), statistics)
        parts = [getattr(tensor, '_local_tensor', tensor).isfinite().all() for tensor in tensors]
        broken = (~torch.stack(parts).all()).float()
        return bool(self.world.sum(broken) > 0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it; whole tensors, so a collective call where the model is sharded."""
        state = {
            'updates': self.updates,
            'skipped': self.skipped,
            'state_dict': self.model.state_dict(),
            'state_dict_ema': None if self.ema is None else self.ema.module.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(),
        }
        if self.sharded:
            from hydra_vision.train.sharding import gathered

            return gathered(state)
        return state

    def _load(self, model: nn.Module, state: dict[str, torch.Tensor]) -> None:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f'the checkpoint does not fit {self.config.model.name}: {error}') from error

    def _restore(self, state: dict[str, Any], epochs_done: int) -> None:
        """Optimizer, scale and counters of a checkpoint; the schedule follows from the counters."""
        settings = [{key: group[key] for key in group if key != 'params'} for group in self.optimizer.param_groups]
        saved = state['optimizer']
        if self.sharded:
            from hydra_vision.train.sharding import scattered_optimizer

            saved = scattered_optimizer(saved, self.optimizer)
        try:
            self.optimizer.load_state_dict(saved)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f'the checkpoint does not fit {self.config.model.name}: {error}') from error
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            setting.pop('lookahead_step', None)  # timm's Lookahead counts its steps among the settings
            group.update(setting)  # a setting that was changed on purpose holds, also after a resume
        if self.scaler.is_enabled() and state['scaler']:
            self.scaler.load_state_dict(state['scaler'])
        self.updates, self.skipped = state['updates'], state['skipped']
        self.end_epoch(epochs_done)
        for update in (max(self.updates - 1, 0), self.updates):
            self.lr = self._lr()
            if self.schedule is not None:
                self.schedule.step_update(update)

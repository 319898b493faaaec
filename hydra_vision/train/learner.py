"""The training state: model, loss, optimizer, schedule, loss scale and moving average, and one step of all of them."""

import contextlib
import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from timm.utils import dispatch_clip_grad, distribute_bn
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from ..errors import CheckpointError, ConfigError, first_line
from . import build
from .config import Config
from .distributed import World, gather_whole, shard, shard_optimizer_state
from .stats import total_norm
from .tasks import create_task

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the CPU of rank 0, sharded or not


class Learner:
    """Everything that an optimizer step changes.

    Args:
        config: The recipe.
        model: On its device; the same weights on every process.
        device: Where the model is.
        amp: Autocast type, None for none.
        updates_per_epoch: Optimizer steps per epoch, for the schedule.
        world: The processes that train it together.

    Attributes:
        model: The plain model.
        task: timm's training task around it: images and targets to `{"loss": ..., "output": ...}`.
        forward: The model for validation (compiled if the recipe says so).
        forward_ema: The averaged model for validation, or None.
        epochs: Length of the schedule, cooldown included.
        updates: Optimizer steps done, skipped ones included.
        skipped: How many of them were skipped because of gradients that are NaN or infinite.
        lr: Learning rate of the top layers in the latest step.
        grad_norm: Of the last step that measured it, before clipping.

    Raises:
        ConfigError: Settings that do not fit the model or one another.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        device: torch.device,
        amp: torch.dtype | None,
        updates_per_epoch: int,
        world: World | None = None,
    ):
        self.config, self.model, self.device, self.amp = config, model, device, amp
        self.world = world or World()
        self.sharded = config.distributed.strategy == 'fsdp' and self.world.size > 1
        if self.sharded and amp is torch.float16:
            raise ConfigError("distributed.strategy='fsdp' does not support run.amp='fp16'; allowed: bf16, none")

        self.task = create_task(config, model, device)
        self.ema: nn.Module | None = None
        if config.ema.decay is not None:
            self.ema = self.task.setup_ema(config.ema.decay, use_warmup=config.ema.warmup).module
        if self.sharded:
            for module in (model, *([] if self.ema is None else [self.ema])):
                shard(module, device)
        self.optimizer = build.create_optimizer(config, model)
        self.schedule, self.epochs = build.create_schedule(config, self.optimizer, updates_per_epoch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.updates, self.skipped, self.grad_norm, self.lr = 0, 0, math.nan, self._next_lr()

        if config.run.torch_compile:
            build.check_compile_mode(config.run.compile_mode)
            # A graph per image size (data.progressive_sizes, validation): one for all sizes would be slower at each.
            self.task.compile(mode=config.run.compile_mode, dynamic=False)
            self.task.compile_ema(mode=config.run.compile_mode, dynamic=False)
        self.forward, self.forward_ema = self.task.get_eval_model(), self.task.get_eval_model(ema=True)
        if self.world.size > 1 and not self.sharded:
            self._distribute()

    def _distribute(self) -> None:
        """Wrap what is trained in DistributedDataParallel."""
        device_ids = [self.device.index] if self.device.type == 'cuda' else None
        # The depthwise convolution's gradient: its strides differ in a dimension of size 1 only.
        warnings.filterwarnings('ignore', message='Grad strides do not match bucket view strides')
        self.task.prepare_distributed(device_ids=device_ids)
        if self.config.distributed.gradients == 'bf16':
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            self.task.trainable_module.register_comm_hook(None, bf16_compress_hook)

    def train(self) -> None:
        """Training mode, except for what is frozen."""
        self.task.train()
        if self.config.model.freeze_backbone:
            build.frozen_parts_to_eval(self.model)

    def backward(self, images: torch.Tensor, targets: torch.Tensor, group: int, last: bool = True) -> torch.Tensor:
        """Add the gradient of one batch.

        Args:
            images: (B, C, H, W) on the device, or a NaFlex batch.
            targets: Class indices (B,), or soft targets (B, classes).
            group: Batches of this optimizer step, over which the loss is averaged.
            last: Whether it is the last of them; only then do processes exchange their gradients.

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
        """One optimizer step: clip, step, average, schedule.

        Args:
            measure: Put the norm of the gradient into `grad_norm`; synchronizes with the device.
        """
        optim = self.config.optim
        guarded = optim.skip_nonfinite > 0 and not self.scaler.is_enabled()  # fp16: the scaler skips such steps
        if optim.clip_grad is not None or measure or guarded:
            self.scaler.unscale_(self.optimizer)
        if measure or guarded:
            self.grad_norm = total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        self.updates += 1
        if guarded and not math.isfinite(self.grad_norm):
            self.skipped += 1
        else:
            if optim.clip_grad is not None:
                agc = optim.clip_mode == 'agc'  # which exempts the classifier, as its paper and timm's script do
                parameters = self.task.get_clip_parameters(exclude_head=agc)
                dispatch_clip_grad(parameters, optim.clip_grad, mode=optim.clip_mode)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.task.update_ema(step=self.updates)
        self.optimizer.zero_grad(set_to_none=True)
        self.lr = self._next_lr()
        if self.schedule is not None:
            self.schedule.step_update(self.updates)

    def end_epoch(self, epochs: int) -> None:
        """Tell the schedule how many epochs are done."""
        if self.schedule is not None:
            self.schedule.step(epochs)

    def share_statistics(self) -> None:
        """Average the running statistics of batch norms over the processes, which compute them on their own images."""
        if self.world.size > 1:
            for model in (self.model, *([] if self.ema is None else [self.ema])):
                distribute_bn(model, self.world.size, reduce=True)

    def param_norm(self) -> float:
        """Euclidean norm of all weights; synchronizes with the device."""
        return total_norm(self.model.parameters())

    def broken_weights(self) -> bool:
        """Whether a weight, or a running statistic of a norm, is NaN or infinite, on any process."""
        statistics = (b for name, b in self.model.named_buffers() if name.endswith(('running_mean', 'running_var')))
        tensors = itertools.chain(self.model.parameters(), statistics)
        parts = [getattr(tensor, '_local_tensor', tensor).isfinite().all() for tensor in tensors]
        broken = (~torch.stack(parts).all()).float()
        return bool(self.world.sum(broken) > 0)

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors, whether the model is sharded or not; a collective call, complete on rank 0."""
        # Not by PyTorch's get_optimizer_state_dict: it makes a step of an optimizer whose state seems empty, which that
        # of timm's Lookahead always does.
        optimizer = self.optimizer.state_dict()
        return {
            'updates': self.updates,
            'skipped': self.skipped,
            'state_dict': get_model_state_dict(self.model, options=_WHOLE),
            'state_dict_ema': None if self.ema is None else get_model_state_dict(self.ema, options=_WHOLE),
            'optimizer': gather_whole(optimizer) if self.sharded else optimizer,
            'scaler': self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], epochs_done: int) -> None:
        """Load what `state_dict` returned; the schedule follows from the counters.

        Args:
            state: Whole tensors, the same on every process.
            epochs_done: Epochs that belong to it.

        Raises:
            CheckpointError: It does not fit the model or the optimizer.
        """
        settings = [{key: group[key] for key in group if key != 'params'} for group in self.optimizer.param_groups]
        try:
            set_model_state_dict(self.model, state['state_dict'], options=_WHOLE)
            if self.ema is not None:
                set_model_state_dict(self.ema, state['state_dict_ema'] or state['state_dict'], options=_WHOLE)
            saved = state['optimizer']
            self.optimizer.load_state_dict(shard_optimizer_state(saved, self.optimizer) if self.sharded else saved)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f'the checkpoint does not fit {self.config.model.name}: {first_line(error)}'
            ) from error
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            setting.pop('lookahead_step', None)  # timm's Lookahead counts its steps among the settings
            group.update(setting)  # a setting that was changed on purpose holds, also after a resume
        if self.scaler.is_enabled() and state['scaler']:
            self.scaler.load_state_dict(state['scaler'])
        self.updates, self.skipped = state['updates'], state['skipped']
        self.end_epoch(epochs_done)
        for update in (max(self.updates - 1, 0), self.updates):
            self.lr = self._next_lr()
            if self.schedule is not None:
                self.schedule.step_update(update)

    def _next_lr(self) -> float:
        """Learning rate of the top layers in the next step."""
        return self.optimizer.param_groups[-1]['lr']

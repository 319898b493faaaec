"""Builds what a recipe describes around a model: weights, loss, optimizer, schedule, moving average, device."""

import math
import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import get_pretrained_cfg, load_state_dict
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask, TrainingTask
from timm.utils import ModelEmaV3
from torch import nn

from hydra_vision import Hydra  # importing the package registers the Hydra-ViT family with timm
from hydra_vision.errors import CheckpointError, ConfigError, first_line, nearest
from hydra_vision.mixers import Semiseparable
from hydra_vision.ops.dispatch import choose_backend
from hydra_vision.train.config import Config
from hydra_vision.train.distributed import World
from hydra_vision.train.freeze import freeze_backbone


def create_model(config: Config, num_classes: int, load_weights: bool = True) -> nn.Module:
    """The model of a recipe, on the CPU.

    Args:
        config: the recipe.
        num_classes: size of the head.
        load_weights: False leaves out the initial weights, where a checkpoint is about to replace them.

    Raises:
        ConfigError: an unknown name, or arguments that the model refuses.
        CheckpointError: initial weights that do not fit.
    """
    model = config.model
    if ':' not in model.name and not timm.is_model(model.name):  # 'hf-hub:...' and the like are looked up elsewhere
        raise ConfigError(f'unknown model.name={model.name!r}{nearest(model.name, timm.list_models())}')
    kwargs: dict[str, Any] = dict(model.kwargs)
    cfg = None if ':' in model.name else get_pretrained_cfg(model.name)
    if config.data.img_size is not None and cfg is not None and cfg.fixed_input_size:
        size = config.data.img_size
        kwargs['img_size'] = size if isinstance(size, int) else tuple(size)
    if config.data.progressive_sizes is not None and cfg is not None and cfg.fixed_input_size:
        kwargs.setdefault('dynamic_img_size', True)
    from_file = load_weights and model.checkpoint is not None
    head, weights = num_classes, {}
    if from_file:
        weights, head = _read_weights(model.checkpoint, cfg.classifier if cfg else 'head')
        kwargs['pretrained_cfg_overlay'] = {'state_dict': weights, 'num_classes': head}
        stem = weights.get(f'{cfg.first_conv}.weight') if cfg and isinstance(cfg.first_conv, str) else None
        if stem is not None and stem.ndim == 4:  # the channels of the file, which need not be those of the model's cfg
            kwargs['pretrained_cfg_overlay']['input_size'] = (stem.shape[1], *cfg.input_size[1:])
    drop = {key: getattr(model, key) for key in ('drop_rate', 'drop_path_rate') if getattr(model, key)}
    try:
        built = timm.create_model(
            model.name,
            pretrained=from_file or (load_weights and model.pretrained),
            num_classes=head,
            in_chans=model.in_chans,
            **drop,
            **kwargs,
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        given = ', '.join(f'{key}={value!r}' for key, value in {**drop, **kwargs}.items() if 'pretrained' not in key)
        text = f'cannot build {model.name} with {given or "its defaults"}: {error}'
        if from_file:
            raise CheckpointError(f'{text} (initial weights: {model.checkpoint})') from error
        raise ConfigError(text) from error
    if head != num_classes:  # built with the head of the file, so that timm refuses weights that do not all fit
        built.reset_classifier(num_classes)
    _check_size(config, built)
    if model.freeze_backbone:
        freeze_backbone(built, model.name)
    if from_file:
        built.initial_weights = _describe_start(model.checkpoint, weights, head, built)
    return built


def classes_in(path: str, name: str) -> int:
    """Number of classes that the head in a weight file knows, 0 without a head.

    Raises:
        CheckpointError: not a readable file.
    """
    cfg = None if ':' in name else get_pretrained_cfg(name)
    return _read_weights(path, cfg.classifier if cfg else 'head')[1]


def _describe_start(path: str, weights: dict[str, Any], head: int, model: nn.Module) -> str:
    """What became of the weights in a file, in words."""
    parts = [f'weights of {path}']
    if head != model.num_classes:
        parts.append(f'new head ({head} -> {model.num_classes} classes)')
    before, after = weights.get('pos_embed'), getattr(model, 'pos_embed', None)
    if before is not None and after is not None and before.shape != after.shape:
        parts.append(f'position embedding resampled ({before.shape[-2]} -> {after.shape[-2]} tokens)')
    return ', '.join(parts)


def create_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, its groups split by weight decay (none for biases, norms and `model.no_weight_decay()`) and layer.

    Raises:
        ConfigError: an unknown optimizer, or arguments that it refuses.
    """
    optim = config.optim
    kwargs = dict(optim.kwargs)
    kwargs |= {key: getattr(optim, key) for key in ('betas', 'eps') if getattr(optim, key) is not None}
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=optim.name,
            lr=scaled_lr(config),
            weight_decay=optim.weight_decay,
            layer_decay=optim.layer_decay,
            **kwargs,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f'cannot build optim.name={optim.name!r} with {kwargs}: {error}') from error
    if getattr(optimizer, 'is_second_order', False):
        raise ConfigError(
            f'optim.name={optim.name!r} needs gradients of gradients, which this trainer does not compute'
        )
    return optimizer


def scaled_lr(config: Config) -> float:
    """optim.lr in proportion to the images an update, where the recipe says what size it is meant for."""
    return config.optim.lr * lr_scale(config)


def lr_scale(config: Config) -> float:
    """Images an update over the number that the recipe's learning rates are meant for."""
    if config.optim.lr_batch_size is None:
        return 1.0
    return config.data.batch_size * config.optim.accum_steps / config.optim.lr_batch_size


def create_schedule(
    config: Config, optimizer: torch.optim.Optimizer, updates_per_epoch: int
) -> tuple[Scheduler | None, int]:
    """timm's scheduler and the number of epochs to train, cool-down included.

    Raises:
        ConfigError: arguments that the scheduler refuses.
    """
    schedule, scale = config.schedule, lr_scale(config)
    try:
        return create_scheduler_v2(
            optimizer,
            sched=schedule.name,
            num_epochs=schedule.epochs,
            warmup_epochs=schedule.warmup_epochs,
            warmup_lr=schedule.warmup_lr * scale,
            min_lr=schedule.min_lr * scale,
            cooldown_epochs=schedule.cooldown_epochs,
            step_on_epochs=not schedule.per_update,
            updates_per_epoch=updates_per_epoch,
            **schedule.kwargs,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f'cannot build schedule.name={schedule.name!r} with {schedule.kwargs}: {error}') from error


def create_loss(config: Config) -> nn.Module:
    """Training loss: soft targets where batches are mixed (the mixing smooths them), else smoothed or plain labels."""
    if config.mixes:
        loss: nn.Module = SoftTargetCrossEntropy()
    elif config.augment.smoothing:
        loss = LabelSmoothingCrossEntropy(config.augment.smoothing)
    else:
        loss = nn.CrossEntropyLoss()
    return ZLoss(loss, config.optim.z_loss) if config.optim.z_loss else loss


class ZLoss(nn.Module):
    """Adds `weight * mean(logsumexp(logits) ** 2)` to a loss: keeps logits from drifting (PaLM, arXiv 2204.02311).

    Args:
        loss: of logits (B, classes) and targets.
        weight: of the addition; 1e-4 in PaLM.
    """

    def __init__(self, loss: nn.Module, weight: float):
        super().__init__()
        self.loss, self.weight = loss, weight

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss(logits, targets) + self.weight * logits.float().logsumexp(dim=-1).square().mean()


def create_task(config: Config, model: nn.Module, device: torch.device) -> TrainingTask:
    """timm's training task: the model with its loss, images and targets to `{"loss": ..., "output": ...}`."""
    if config.distill.teacher is not None:
        from hydra_vision.train.distill import create_distillation

        return create_distillation(config, model, create_loss(config).to(device), device)
    return ClassificationTask(model, create_loss(config).to(device), device=device, verbose=False)


def create_ema(config: Config, model: nn.Module) -> ModelEmaV3 | None:
    """Moving average of the weights, on the model's device."""
    if config.ema.decay is None:
        return None
    return ModelEmaV3(model, decay=config.ema.decay, use_warmup=config.ema.warmup)


def pick_device(config: Config, world: World | None = None) -> torch.device:
    """The device that run.device names; with several processes on CUDA, each takes the one of its local rank.

    Raises:
        ConfigError: no such device here.
    """
    name = config.run.device
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    if world is not None and world.size > 1 and name.startswith('cuda'):
        if name != 'cuda':
            raise ConfigError(f'run.device={name!r} is one device for {world.size} processes; allowed: auto, cuda, cpu')
        if world.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f'process {world.local_rank} of this machine has no GPU: it has {torch.cuda.device_count()}; start '
                f'torchrun with --nproc-per-node {torch.cuda.device_count()}'
            )
        name = f'cuda:{world.local_rank}'
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if world is not None and world.size > 1 and device.type == 'cuda':
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f'run.device={name!r} is not available: {first_line(error)}; allowed: auto, cpu, cuda, ...'
        ) from error
    return device


def check_backend(model: nn.Module, device: torch.device) -> None:
    """Refuses a Hydra backend that cannot run, before the run starts.

    Raises:
        ConfigError: says what is missing.
    """
    for module in model.modules():
        if isinstance(module, (Hydra, Semiseparable)):
            try:
                choose_backend(module.backend, device)
            except (ValueError, RuntimeError) as error:
                raise ConfigError(str(error)) from error


def amp_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """Autocast type, or None for plain float32.

    Raises:
        ConfigError: a type that the device cannot train with.
    """
    amp = config.run.amp
    if amp == 'auto':
        amp = 'bf16' if device.type == 'cuda' and torch.cuda.is_bf16_supported() else 'none'
    if amp == 'fp16' and device.type != 'cuda':
        raise ConfigError(f"run.amp='fp16' needs CUDA, run.device is {device.type}; allowed there: none, bf16")
    return {'none': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}[amp]


def updates_in(batches: int, accum_steps: int) -> int:
    """Updates an epoch; the last one may hold fewer batches."""
    return math.ceil(batches / accum_steps)


def _check_size(config: Config, model: nn.Module) -> None:
    """Refuses an image size that patches do not tile: the patch convolution would leave out the rest in silence."""
    patch = getattr(getattr(model, 'patch_embed', None), 'patch_size', None)
    if patch is None or getattr(model.patch_embed, 'dynamic_img_pad', False):
        return
    patches = (patch, patch) if isinstance(patch, int) else patch
    sizes = {'img_size': config.data.img_size}
    sizes |= {f'progressive_sizes[{i}]': size for i, size in enumerate(config.data.progressive_sizes or ())}
    for key, size in sizes.items():
        sides = (size, size) if isinstance(size, int) else size
        if sides is not None and any(side % step for side, step in zip(sides, patches, strict=True)):
            raise ConfigError(
                f'data.{key}={size} is not valid for {config.model.name} with patches of {tuple(patches)}; '
                f'allowed: multiples of the patch'
            )


def _read_weights(path: str, classifier: str) -> tuple[dict[str, Any], int]:
    """The weights in a file, averaged ones before raw ones, and the number of classes of their head (0: no head)."""
    if not Path(path).expanduser().is_file():
        raise CheckpointError(f'model.checkpoint={path!r} is not a file')
    try:
        weights = load_state_dict(str(Path(path).expanduser()))
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f'model.checkpoint={path!r} cannot be read: {first_line(error)}') from error
    head = weights.get(f'{classifier}.weight')
    return weights, 0 if head is None else head.shape[0]

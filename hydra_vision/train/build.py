"""Builds what a recipe describes around a model: device, initial weights, optimizer, schedule."""

import inspect
import math
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.overrides import TorchFunctionMode

from .. import Hydra  # importing the package registers the Hydra-ViT family with timm
from .. import device as devices
from ..errors import CheckpointError, ConfigError, UserError, first_line, nearest
from ..io import to_path
from ..mixers import Mamba, Semiseparable
from ..ops.dispatch import choose_backend
from ..ops.selective_scan import choose_scan_backend
from ..weights import read_weights
from .config import Config, RunConfig
from .distributed import World

# Major compute capability -> numbers of tokens at which the bf16 backward pass of cuDNN's attention turns finite inputs
# into NaN (github.com/pytorch/pytorch/issues/196678, github.com/NVIDIA/cudnn-frontend/issues/1072), as seen with
# PyTorch 2.11 and cuDNN 9.19.
_CUDNN_NAN_TOKENS = {9: {64}}


# Device and precision


def pick_device(config: Config, world: World | None = None) -> torch.device:
    """The device that run.device names; with several processes on CUDA, each takes the one of its local rank.

    Raises:
        ConfigError: No such device here.
    """
    name = config.run.device
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    several = world is not None and world.size > 1 and name.startswith('cuda')
    if several:
        if name != 'cuda':
            raise ConfigError(f'run.device={name!r} is one device for {world.size} processes; allowed: auto, cuda, cpu')
        if world.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f'process {world.local_rank} of this machine has no GPU: it has {torch.cuda.device_count()}; start '
                f'torchrun with --nproc-per-node {torch.cuda.device_count()}'
            )
        name = f'cuda:{world.local_rank}'
    try:
        picked = devices.pick_device(name)
    except UserError as error:
        raise ConfigError(f'run.{error}') from error
    if several:
        torch.cuda.set_device(picked)
    return picked


def amp_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """Autocast type, or None for plain float32.

    Raises:
        ConfigError: A type that the device cannot train with.
    """
    if config.run.amp == 'fp16' and device.type != 'cuda':
        raise ConfigError(f"run.amp='fp16' needs CUDA, run.device is {device.type}; allowed there: none, bf16")
    return devices.amp_dtype(config.run.amp, device)


def configure_torch(run: RunConfig, device: torch.device) -> None:
    """Set the number of threads, and on CUDA: TF32 for float32 products and whether cuDNN's attention may run."""
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high' if run.tf32 else 'highest')
        torch.backends.cudnn.allow_tf32 = run.tf32
        torch.backends.cuda.enable_cudnn_sdp(run.cudnn_attention is not False)


def avoid_faulty_attention(
    model: nn.Module, input_size: tuple[int, int, int], device: torch.device, amp: torch.dtype | None
) -> str | None:
    """Disable cuDNN's attention where its gradients are known to be NaN at a length that the model runs.

    PyTorch prefers it on Hopper, where it is the fastest; flash attention takes its place.

    Args:
        model: On its device, not compiled.
        input_size: Channels, height, width of training images.
        device: Where the model is.
        amp: Autocast type, None for none.

    Returns:
        A line for the log, or None where nothing was disabled.
    """
    if device.type != 'cuda' or amp is None:
        return None
    faulty = _CUDNN_NAN_TOKENS.get(torch.cuda.get_device_capability(device)[0], set())
    found = sorted(faulty & attention_lengths(model, input_size, device, amp)) if faulty else []
    torch.backends.cuda.enable_cudnn_sdp(not found)
    if not found:
        return None
    return (
        f'attention by cuDNN is off: its gradients can be NaN at {", ".join(map(str, found))} tokens on this GPU '
        f'(PyTorch issue 196678); flash attention takes its place'
    )


@torch.no_grad()
def attention_lengths(
    model: nn.Module, input_size: tuple[int, int, int], device: torch.device, amp: torch.dtype | None = None
) -> set[int]:
    """Numbers of tokens in the calls of `scaled_dot_product_attention` in a forward pass of one image.

    Args:
        model: On its device; runs in evaluation mode.
        input_size: Channels, height, width.
        device: Where the model is.
        amp: Autocast type, None for none.
    """
    lengths = set()

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if function is F.scaled_dot_product_attention:
                lengths.add((args[0] if args else kwargs['query']).shape[-2])
            return function(*args, **kwargs)

    training = model.training
    model.eval()
    try:
        with Recorder(), torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            model(torch.zeros(1, *input_size, device=device))
    finally:
        model.train(training)
    return lengths


def place_model(model: nn.Module, run: RunConfig, device: torch.device) -> nn.Module:
    """The model on its device, in the memory format of the recipe."""
    return model.to(device=device, memory_format=torch.channels_last if run.channels_last else None)


def check_compile_mode(mode: str | None) -> None:
    """Check a mode of torch.compile before anything is compiled.

    Raises:
        ConfigError: An unknown mode.
    """
    try:
        torch.compile(nn.Identity(), mode=mode)
    except RuntimeError as error:
        raise ConfigError(f'run.compile_mode={mode!r} is not valid: {first_line(error)}') from error


def check_backend(model: nn.Module, device: torch.device) -> None:
    """Check that the backend of every mixer can run, before the run starts.

    Raises:
        ConfigError: Says what is missing.
    """
    for module in model.modules():
        try:
            if isinstance(module, (Hydra, Semiseparable)):
                choose_backend(module.backend, device)
            elif isinstance(module, Mamba):
                choose_scan_backend(module.backend, device)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(str(error)) from error


# Model


def create_model(config: Config, num_classes: int, load_weights: bool = True) -> nn.Module:
    """The model of a recipe, on the CPU.

    Args:
        config: The recipe.
        num_classes: Size of the head.
        load_weights: False skips the initial weights, where a checkpoint is about to replace them.

    Raises:
        ConfigError: An unknown name, or arguments that the model rejects.
        CheckpointError: Initial weights that do not fit.
    """
    model = config.model
    if ':' not in model.name and not timm.is_model(model.name):  # 'hf-hub:...' and the like are looked up elsewhere
        raise ConfigError(f'unknown model.name={model.name!r}{nearest(model.name, timm.list_models())}')
    kwargs: dict[str, Any] = dict(model.kwargs)
    cfg = None if ':' in model.name else get_pretrained_cfg(model.name)
    # ours take img_size whether their arguments tie them to it or not
    sized = cfg is not None and (cfg.fixed_input_size or timm.models.is_model_in_modules(model.name, {'hydra_vit'}))
    if config.data.img_size is not None and sized:
        size = config.data.img_size
        kwargs['img_size'] = size if isinstance(size, int) else tuple(size)
    if config.data.progressive_sizes is not None and sized:
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
    if head != num_classes:  # built with the head of the file, so that timm rejects weights that do not all fit
        built.reset_classifier(num_classes)
    _check_size(config, built)
    if model.freeze_backbone:
        freeze_backbone(built, model.name)
    if from_file:
        built.initial_weights = _describe_start(model.checkpoint, weights, head, built)
    return built


def classes_in(path: str, name: str) -> int:
    """Number of classes of the head in a weight file of the model `name`, 0 without a head.

    Raises:
        CheckpointError: Not a readable file.
    """
    cfg = None if ':' in name else get_pretrained_cfg(name)
    return _read_weights(path, cfg.classifier if cfg else 'head')[1]


def freeze_backbone(model: nn.Module, name: str) -> None:
    """Make only the classifier trainable, for a linear probe.

    Args:
        model: A timm classifier.
        name: Its name in the error message.

    Raises:
        ConfigError: A model without a classifier.
    """
    head = model.get_classifier() if hasattr(model, 'get_classifier') else None
    if not isinstance(head, nn.Module) or not any(True for _ in head.parameters()):
        raise ConfigError(f'model.freeze_backbone: {name} has no classifier to train')
    model.requires_grad_(False)
    head.requires_grad_(True)


def frozen_parts_to_eval(model: nn.Module) -> None:
    """Put frozen modules into evaluation mode: no dropout or stochastic depth, no new batch-norm statistics.

    To be called after every `train()`.
    """
    learning = {module for module in model.modules() if any(p.requires_grad for p in module.parameters())}
    for module in model.modules():
        if module not in learning:
            module.training = False


def _describe_start(path: str, weights: dict[str, Any], head: int, model: nn.Module) -> str:
    """What became of the weights in a file, in words."""
    parts = [f'weights of {path}']
    if head != model.num_classes:
        parts.append(f'new head ({head} -> {model.num_classes} classes)')
    before, after = weights.get('pos_embed'), getattr(model, 'pos_embed', None)
    if before is not None and after is not None and before.shape != after.shape:
        parts.append(f'position embedding resampled ({before.shape[-2]} -> {after.shape[-2]} tokens)')
    return ', '.join(parts)


def _check_size(config: Config, model: nn.Module) -> None:
    """Reject an image size that patches do not tile: the patch convolution would silently drop the rest."""
    patch = getattr(getattr(model, 'patch_embed', None), 'patch_size', None)
    if config.data.naflex_seq_len is not None:
        if patch is None or 'patch_valid' not in inspect.signature(model.forward).parameters:
            raise ConfigError(f'data.naflex_seq_len: {config.model.name} takes no patches; a Hydra-ViT does')
        return
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
    file = to_path(path, 'model.checkpoint')
    if not file.is_file():
        raise CheckpointError(f'model.checkpoint={path!r} is not a file')
    weights = read_weights(file)
    head = weights.get(f'{classifier}.weight')
    return weights, 0 if head is None else head.shape[0]


# Optimizer and schedule


def create_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, its groups split by weight decay (none for biases, norms and `model.no_weight_decay()`) and layer.

    Raises:
        ConfigError: An unknown optimizer, or arguments that it rejects.
    """
    optim = config.optim
    kwargs = dict(optim.kwargs)
    kwargs |= {key: getattr(optim, key) for key in ('betas', 'eps') if getattr(optim, key) is not None}
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=optim.name,
            lr=optim.lr * config.lr_scale,
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


def create_schedule(
    config: Config, optimizer: torch.optim.Optimizer, updates_per_epoch: int
) -> tuple[Scheduler | None, int]:
    """timm's scheduler and the number of epochs to train, cooldown included.

    Raises:
        ConfigError: Arguments that the scheduler rejects.
    """
    schedule = config.schedule
    try:
        return create_scheduler_v2(
            optimizer,
            sched=schedule.name,
            num_epochs=schedule.epochs,
            warmup_epochs=schedule.warmup_epochs,
            warmup_lr=schedule.warmup_lr * config.lr_scale,
            min_lr=schedule.min_lr * config.lr_scale,
            cooldown_epochs=schedule.cooldown_epochs,
            step_on_epochs=not schedule.per_update,
            updates_per_epoch=updates_per_epoch,
            **schedule.kwargs,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f'cannot build schedule.name={schedule.name!r} with {schedule.kwargs}: {error}') from error


def updates_in(batches: int, accum_steps: int) -> int:
    """Optimizer steps per epoch; the last one may accumulate fewer batches."""
    return math.ceil(batches / accum_steps)

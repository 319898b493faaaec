"""A semantic segmenter on a timm backbone: smp's decoder and metrics, timm's optimizer and schedule, a short loop."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import DataLoader

from ..errors import UserError, require
from ..train.randomness import random_state, set_random_state
from .smp import register_smp_encoder

__all__ = ['DIVISOR', 'Recipe', 'Scores', 'build_segmenter', 'evaluate', 'measure_speed', 'predict', 'train_segmenter']

# What the sides of an input must divide by: the coarsest map of the pyramid; DPT halves the backbone's map, too.
DIVISOR = 32


@dataclass(frozen=True)
class Recipe:
    """How a segmenter is trained."""

    epochs: int = 100
    batch_size: int = 16
    lr: float = 5e-4
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    warmup: float = 0.05  # share of the updates
    clip_grad: float = 1.0
    eval_every: int = 5  # epochs


@dataclass(frozen=True)
class Scores:
    """Over all pixels of a split that have a class; IoU is nan for a class that is neither there nor predicted."""

    miou: float
    accuracy: float
    iou: list[float]


def build_segmenter(
    model_name: str, decoder: str, num_classes: int, *, img_size: tuple[int, int], pretrained: bool = False, **kwargs
) -> nn.Module:
    """An smp model on a timm backbone.

    Args:
        model_name: an isotropic timm model.
        decoder: 'DPT', which takes its maps as they are, or any other smp architecture, through a feature pyramid.
        num_classes: channels of the output.
        img_size: height and width that training uses; others work too, unless dynamic_img_size=False.
        pretrained: load the backbone's weights.
        **kwargs: of the backbone.

    Raises:
        ImportError: smp is not installed.
        UserError: an unknown decoder or backbone.
    """
    smp = require('segmentation_models_pytorch', 'seg')
    known = sorted(cls.__name__ for cls in smp.MODEL_ARCHITECTURES_MAPPING.values())
    if decoder not in known:
        raise UserError(f'decoder {decoder!r}; allowed: {", ".join(known)}')
    kwargs = {'dynamic_img_size': True, 'img_size': img_size, **kwargs}
    try:
        if decoder == 'DPT':
            register_smp_encoder(model_name, **kwargs)  # checks name and arguments
            weights = 'imagenet' if pretrained else None
            return smp.DPT(
                f'tu-{model_name}',
                encoder_weights=weights,
                decoder_readout='ignore',
                classes=num_classes,
                num_classes=0,
                global_pool='',
                **kwargs,
            )
        encoder = register_smp_encoder(model_name, pretrained=pretrained, **kwargs)
    except ValueError as error:
        raise UserError(str(error)) from error
    return getattr(smp, decoder)(encoder, encoder_weights=None, classes=num_classes)


def predict(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits of images of any size: padded at the bottom and on the right to what the model divides, then cut back.

    (B, 3, H, W) -> (B, num_classes, H, W).
    """
    H, W = x.shape[-2:]
    padded = F.pad(x, (0, -W % DIVISOR, 0, -H % DIVISOR), mode='replicate')
    return model(padded)[..., :H, :W]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: DataLoader,
    *,
    num_classes: int,
    ignore_index: int,
    device: torch.device,
    amp: Optional[torch.dtype] = None,
) -> Scores:
    """Intersection over union from the pixels of the whole split (not the mean of images), by smp's metrics."""
    metrics = require('segmentation_models_pytorch', 'seg').metrics
    model.eval()
    sums = None
    for images, masks in batches:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            predicted = predict(model, images.to(device)).argmax(1)
        # outside 0 .. num_classes - 1, as smp wants it
        masks = masks.to(device).masked_fill(masks.to(device) == ignore_index, -1)
        stats = metrics.get_stats(predicted, masks, mode='multiclass', ignore_index=-1, num_classes=num_classes)
        stats = torch.stack([s.sum(0) for s in stats])  # (tp fp fn tn, classes)
        sums = stats if sums is None else sums + stats
    tp, fp, fn, tn = sums.unsqueeze(1).double().cpu()
    iou = metrics.iou_score(tp, fp, fn, tn, reduction='none', zero_division=float('nan'))[0]
    return Scores(
        miou=float(iou.nanmean()),
        accuracy=float(tp.sum() / (tp + fn).sum()),
        iou=[float(value) for value in iou],
    )


def train_segmenter(
    model: nn.Module,
    train: DataLoader,
    val: DataLoader,
    recipe: Recipe,
    *,
    num_classes: int,
    ignore_index: int,
    device: torch.device,
    amp: Optional[torch.dtype] = None,
    state: Optional[Mapping[str, Any]] = None,
    on_epoch: Callable[[dict[str, Any], Callable[[], dict[str, Any]]], None] = lambda row, state: None,
) -> list[dict[str, Any]]:
    """Train, and leave the model with the weights that were best on `val`.

    Args:
        model: from `build_segmenter`, on `device`.
        train: batches of float images (B, 3, H, W) and class numbers (B, H, W).
        val: likewise.
        recipe: the recipe.
        num_classes: number of classes.
        ignore_index: class number without loss.
        device: of the model.
        amp: autocast type; None for float32.
        state: of an interrupted training, to go on from; `recipe`, `model` and data must be the same. With
            num_workers=0 the result is that of a training without interruption.
        on_epoch: called with each row of the curve and a function that gives the state after it: numbers and tensors,
            for `torch.save`.

    Returns:
        The curve: epoch, loss, seconds of all epochs so far (without `on_epoch`), and where measured, val_miou and
        val_accuracy.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    backbone = model.encoder.model  # knows what must not decay; smp's wrapper does not pass it on
    spared = [f'encoder.model.{name}' for name in backbone.no_weight_decay()]
    groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=spared)
    optimizer = create_optimizer_v2(groups, opt='adamw', lr=recipe.lr)
    updates = recipe.epochs * len(train)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=updates,
        lr_min=recipe.min_lr,
        warmup_t=round(recipe.warmup * updates),
        warmup_lr_init=recipe.min_lr,
        t_in_epochs=False,
    )
    curve: list[dict[str, Any]] = []
    best, best_weights = -1.0, None
    seconds = 0.0
    if state is not None:
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        set_random_state(state['random'], device)
        curve, best, best_weights = list(state['curve']), state['best'], state['best_weights']
        seconds = curve[-1]['seconds']
    update = len(curve) * len(train)

    def now() -> dict[str, Any]:
        return {
            'updates': update,
            'curve': curve,
            'best': best,
            'best_weights': best_weights,
            'model': model.state_dict(),
            'optimizer': optimizer.state_dict(),
            'random': random_state(device),
        }

    for epoch in range(len(curve) + 1, recipe.epochs + 1):
        start = time.perf_counter()
        model.train()
        total = torch.zeros((), device=device)
        for images, masks in train:
            schedule.step_update(update)
            images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                logits = model(images)
            # not reduction='mean': that is nan for a batch in which no pixel has a class
            losses = F.cross_entropy(logits.float(), masks, ignore_index=ignore_index, reduction='sum')
            loss = losses / (masks != ignore_index).sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
            optimizer.step()
            total += loss.detach()
            update += 1
        row = {'epoch': epoch, 'loss': float(total) / len(train), 'val_miou': None, 'val_accuracy': None}
        if not torch.isfinite(total):
            raise FloatingPointError(f'the loss is {row["loss"]} in epoch {epoch}; try a lower lr')
        if epoch % recipe.eval_every == 0 or epoch == recipe.epochs:
            scores = evaluate(model, val, num_classes=num_classes, ignore_index=ignore_index, device=device, amp=amp)
            row |= {'val_miou': scores.miou, 'val_accuracy': scores.accuracy}
            if scores.miou > best:
                best = scores.miou
                best_weights = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
        seconds += time.perf_counter() - start
        row['seconds'] = seconds
        curve.append(row)
        on_epoch(row, now)
    if best_weights is not None:
        model.load_state_dict(best_weights)
    return curve


def measure_speed(
    model: nn.Module,
    *,
    size: tuple[int, int],
    batch_size: int,
    num_classes: int,
    device: torch.device,
    amp: Optional[torch.dtype] = None,
    calls: int = 20,
) -> dict[str, float]:
    """Images/s of a training step (forward, loss, backward) and of inference, and peak memory of training in MiB.

    On random images that are on the device already: what the model takes, without the loader. Peak memory is
    allocated memory and known on CUDA only.
    """
    from ..timing import clock_for

    x = torch.randn(batch_size, 3, *size, device=device)
    y = torch.randint(num_classes, (batch_size, *size), device=device)

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            return model(x)

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(forward().float(), y).backward()

    @torch.inference_mode()
    def infer() -> None:
        forward()

    clock, result = clock_for(device), {}
    for name, function, mode in (('train', step, True), ('inference', infer, False)):
        model.train(mode)
        for _ in range(3):  # compilation of kernels, allocation
            function()
        if name == 'train' and device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(device)
        result[f'{name}_images_per_second'] = batch_size * calls / clock(function, calls)
        if name == 'train' and device.type == 'cuda':
            result['train_peak_mib'] = torch.cuda.max_memory_allocated(device) / 2**20
    return result

"""Top-1, top-5 and loss of classifiers over a loader, and of the weights in a checkpoint (`--validate`)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from ..errors import DataError
from . import build, data, report, sources
from .checkpoint import load_weights
from .config import Config
from .distributed import World

Result = dict[str, float]


@torch.no_grad()  # not inference_mode: what a model caches here must be usable in training
def evaluate(
    models: Mapping[str, nn.Module],
    loader: Iterable,
    device: torch.device,
    amp: torch.dtype | None = None,
    channels_last: bool = False,
    on_batch: Callable[[int], None] | None = None,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, Result]:
    """Evaluate several models (raw and averaged weights, say) in one pass over the images.

    Args:
        models: Name -> classifier giving logits (B, classes); each is put into evaluation mode and back.
        loader: Batches of images (B, C, H, W) and class indices (B,); images with a negative index are not counted.
        device: Where the models are.
        amp: Autocast type, None for none.
        channels_last: NHWC memory format.
        on_batch: Called with the number of images of every batch, for progress.
        reduce: Sums a tensor over processes that share the images.

    Returns:
        For every model `top1` and `top5` in percent, `loss` (cross-entropy) and the number of `images`.
    """
    was_training = {name: model.training for name, model in models.items()}
    sums = {name: torch.zeros(4, dtype=torch.float64, device=device) for name in models}  # stays on the device
    for model in models.values():
        model.eval()
    for images, targets in loader:
        if not isinstance(images, dict):  # a NaFlex batch, which is there already
            images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        for name, model in models.items():
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                logits = model(images)
            sums[name] += _batch_sums(logits.float(), targets)
        if on_batch is not None:
            on_batch(len(targets))
    for name, model in models.items():
        model.train(was_training[name])
    if reduce is not None:
        sums = {name: reduce(total) for name, total in sums.items()}
    return {name: _result(*total.tolist()) for name, total in sums.items()}


def _batch_sums(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sums of loss, top-1 hits, top-5 hits and images over a batch, float64 (4,)."""
    counted = targets >= 0  # (B,)
    loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction='sum')
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
    hits = (best == targets[:, None]) & counted[:, None]
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), counted.sum()]).double()


def _result(loss: float, top1: float, top5: float, images: float) -> Result:
    count = max(images, 1.0)
    return {'top1': 100 * top1 / count, 'top5': 100 * top5 / count, 'loss': loss / count, 'images': int(images)}


def initial_state(config: Config, world: World) -> dict[str, Any]:
    """The part of a checkpoint that `validate` needs, of the initial weights of a recipe.

    Raises:
        ConfigError, CheckpointError, DataError: What does not fit.
    """
    _, split = sources.open_splits(config, train=False, world=world)
    num_classes = sources.count_classes(config, split)
    torch.manual_seed(config.run.seed)
    model = build.create_model(config, num_classes)
    return {
        **{'arch': config.model.name, 'num_classes': num_classes, 'classes': split.classes, 'epoch': 0},
        **{'state_dict': model.state_dict(), 'state_dict_ema': None},
    }


def validate(
    config: Config, state: Mapping[str, Any], console: Console, world: World | None = None
) -> dict[str, Result]:
    """Evaluate the raw and the averaged weights of a checkpoint on the validation split of a recipe.

    Args:
        config: The recipe.
        state: Of `load_checkpoint` or `initial_state`.
        console: Where progress is shown.
        world: The processes that share the images; each gets the results of all of them.

    Raises:
        CheckpointError: Weights that do not fit the model.
        DataError: Images of other classes.
    """
    world = world or World()
    device = build.pick_device(config, world)
    amp = build.amp_dtype(config, device)
    build.configure_torch(config.run, device)
    _, split = sources.open_splits(config, train=False, world=world)
    if split.classes is not None and len(split.classes) != state['num_classes']:
        raise DataError(f'{split.name} has {len(split.classes)} classes; the checkpoint has {state["num_classes"]}')
    warning = sources.check_classes(split, state['classes'])
    if warning is not None:
        console.print(warning, highlight=False, soft_wrap=True)
    if config.run.torch_compile:
        build.check_compile_mode(config.run.compile_mode)
    models: dict[str, nn.Module] = {}
    for name, key in (('raw', 'state_dict'), ('EMA', 'state_dict_ema')):
        if state[key] is None:
            continue
        model = build.create_model(config, state['num_classes'], load_weights=False)
        load_weights(model, state[key], config.model.name)
        build.check_backend(model, device)
        model = build.place_model(model, config.run, device)
        models[name] = torch.compile(model, mode=config.run.compile_mode) if config.run.torch_compile else model
    loader = data.val_loader(config, split, state['num_classes'], next(iter(models.values())), device, world)
    progress = report.RunProgress(console, state['epoch'], len(loader), 0)
    with progress.bar, progress.start_pass(state['epoch'] - 1, 'validate', len(loader)) as shown:
        batches = data.shared_batches(loader, world, lockstep=False)
        results = evaluate(models, batches, device, amp, config.run.channels_last, shown.advance, world.sum)
    report.report_unreadable(console, loader, world)
    return results

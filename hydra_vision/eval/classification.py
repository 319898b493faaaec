"""Top-1, top-5 and loss of classifiers over a loader."""

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from hydra_vision.streams import keep_on_stream

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
    """Evaluates several models (raw and averaged weights, say) in one pass over the images.

    Args:
        models: name -> classifier giving logits (B, classes); each is put into evaluation mode and back.
        loader: batches of images (B, C, H, W) and class indices (B,); images with a negative index are left out.
        device: where the models are.
        amp: autocast type, None for none.
        channels_last: NHWC memory format.
        on_batch: called with the number of images of every batch, for progress.
        reduce: adds up a tensor over processes that share the images.

    Returns:
        For every model `top1` and `top5` in percent, `loss` (cross-entropy) and the number of `images`.
    """
    was_training = {name: model.training for name, model in models.items()}
    sums = {name: torch.zeros(4, dtype=torch.float64, device=device) for name in models}  # stays on the device
    for model in models.values():
        model.eval()
    for images, targets in loader:
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        keep_on_stream(images, targets)
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

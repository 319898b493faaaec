"""Floating-point operations and unavoidable memory traffic of a model, counted on the meta device: nothing is computed.

Operations: ``torch.utils.flop_counter`` over one image. Matrix products with weights and convolutions are the
*projections*; products of activations (attention, the chunked form of the quasiseparable operator) are the *mixing*.
Depthwise convolutions count as convolutions; elementwise work, norms and softmax do not count. The backward pass of a
projection is two products of its size, that of the patch embedding one: its input is an image.

Counters that watch a model run on CUDA see less: a Triton kernel is no operator to them, and the global hooks of
``FlopCounterMode`` make a mixer call its convolution, ``fc_D`` and norm instead of the fused operator. Hence the meta
device and the backend 'chunked', whose products are the same in both forms.

Memory traffic, a lower bound in elements, for a perfect cache inside every stage and none between stages:

    a projection        forward: reads input and weight, writes output
                        backward: reads the output's gradient twice (for both products), input and weight, writes the
                        gradients of input (not for the patch embedding) and weight
    a token mixer       forward: reads what its first projection wrote, writes what its last projection reads
                        backward: reads both of that again (the output as its gradient), writes the input's gradient

Norms, activation functions, residuals and the loss are taken as free: fused into the stages around them.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['COUNTED', 'Counts', 'count_flops', 'count_model', 'create_model', 'family_models']

COUNTED = (
    'matrix products and convolutions of one image at the default size, multiply and add as one; the Hydra operator as '
    "the backend 'chunked' computes it; no elementwise work, norms or softmax"
)

_PROJECTIONS = ('mm', 'addmm', 'convolution')
Size = int | tuple[int, int]
# First and last projection of the token mixers that are known: timm's attention, the Hydra mixer.
_MIXER_ENDS = (('qkv', 'proj'), ('in_proj', 'out_proj'))


@dataclass(frozen=True)
class Counts:
    """One image, forward. Elements are what all stages of a kind read and write together."""

    parameters: int
    projection_flops: int
    mixing_flops: int
    stem_flops: int  # of the projections, the patch embedding's or stem's
    weights: int
    projection_reads: int
    projection_writes: int
    stem_reads: int
    mixer_reads: int
    mixer_writes: int

    @property
    def flops(self) -> int:
        return self.projection_flops + self.mixing_flops

    def gemm_flops(self, batch: int, training: bool) -> int:
        """Operations of the projections alone, which every implementation has to do."""
        one = 3 * self.projection_flops - self.stem_flops if training else self.projection_flops
        return batch * one

    def traffic(self, batch: int, itemsize: int, training: bool) -> int:
        """Bytes that every implementation has to move, see the top of this file."""
        elements = self.projection_reads + self.projection_writes + self.mixer_reads + self.mixer_writes
        weights = self.weights
        if training:
            elements += 2 * (self.projection_reads + self.projection_writes) - self.stem_reads
            elements += 2 * self.mixer_reads + self.mixer_writes
            weights *= 3
        return (batch * elements + weights) * itemsize


def family_models() -> list[str]:
    """The registered models of this package."""
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith('hydra_vision.')]


def create_model(name: str, img_size: Size | None = None, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` for an image size: given to the constructor where it has one, as transformers want it."""
    if img_size is None:
        return timm.create_model(name, **kwargs)
    try:
        return timm.create_model(name, img_size=img_size, **kwargs)
    except TypeError as error:
        if 'img_size' not in str(error):
            raise
        return timm.create_model(name, **kwargs)  # convolutional: any size


@cache
def count_model(name: str, img_size: Size | None = None) -> Counts:
    """Count one image of a model.

    Args:
        name: A timm model. Mixers that have backends are counted in their chunked form, whatever runs later.
        img_size: Side, or height and width, of the image; None for the model's default.
    """
    with torch.device('meta'):
        model = create_model(name, img_size).eval()
        channels, height, width = model.default_cfg['input_size']
        if img_size is not None:
            height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return count_flops(model, (channels, height, width))


def count_flops(model: nn.Module, input_size: tuple[int, int, int]) -> Counts:
    """Count one image.

    Args:
        model: In evaluation mode, on the meta device; mixers that have a backend are set to 'chunked'.
        input_size: Channels, height, width.
    """
    for module in model.modules():
        if hasattr(module, 'backend'):
            module.backend = 'chunked'
    images = torch.empty(1, *input_size, device='meta')
    sizes: dict[nn.Module, tuple[int, int]] = {}  # elements read and written

    def note(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        sizes[module] = (inputs[0].numel(), output.numel())

    for name, module in model.named_modules():
        # fc_D is part of what happens between the two ends of a mixer
        if isinstance(module, nn.Linear | nn.Conv2d) and getattr(module, 'groups', 1) == 1 and 'fc_D' not in name:
            module.register_forward_hook(note)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)

    by_operator = {str(op).rpartition('.')[2]: n for op, n in counter.get_flop_counts()['Global'].items()}
    projected = sum(n for op, n in by_operator.items() if op in _PROJECTIONS)
    stem = next((m for m in sizes if isinstance(m, nn.Conv2d)), None)  # hooks ran in order: the first is at the image
    mixers = [
        (getattr(module, first), getattr(module, last))
        for module in model.modules()
        for first, last in _MIXER_ENDS
        if getattr(module, first, None) in sizes and getattr(module, last, None) in sizes
    ]
    return Counts(
        parameters=sum(p.numel() for p in model.parameters()),
        projection_flops=projected,
        mixing_flops=sum(by_operator.values()) - projected,
        stem_flops=0 if stem is None else 2 * sizes[stem][1] * stem.weight[0].numel(),
        weights=sum(module.weight.numel() for module in sizes),
        projection_reads=sum(read for read, _ in sizes.values()),
        projection_writes=sum(written for _, written in sizes.values()),
        stem_reads=0 if stem is None else sizes[stem][0],
        mixer_reads=sum(sizes[first][1] for first, _ in mixers),
        mixer_writes=sum(sizes[last][0] for _, last in mixers),
    )

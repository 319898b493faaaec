"""Floating-point operations and unavoidable memory traffic of a model, counted on the meta device: nothing is computed.

Operations: ``torch.utils.flop_counter`` over one image. Matrix products with weights and convolutions are the
*projections*; products of activations (attention, the chunked form of the quasiseparable operator) are the *mixing*.
Depthwise convolutions count as convolutions; elementwise work, norms and softmax do not count.

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
from typing import Any, Optional

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['COUNTED', 'Counts', 'count_model', 'create_model', 'family_models']

COUNTED = (
    'matrix products and convolutions of one image at the default size, multiply and add as one; the Hydra operator in '
    'its linear-time chunked form; no elementwise work, norms or softmax'
)

_PROJECTIONS = ('mm', 'addmm', 'convolution', 'convolution_backward')
# First and last projection of the token mixers that are known: timm's attention, the Hydra mixer.
_MIXER_ENDS = (('qkv', 'proj'), ('in_proj', 'out_proj'))


@dataclass(frozen=True)
class Counts:
    """One image, one call: inference, or training (forward and backward)."""

    parameters: int
    projection_flops: int
    mixing_flops: int
    image_elements: int
    weight_elements: int

    @property
    def flops(self) -> int:
        return self.projection_flops + self.mixing_flops

    def traffic(self, batch: int, itemsize: int) -> int:
        """Bytes that a batch moves at least."""
        return (self.image_elements * batch + self.weight_elements) * itemsize


def family_models() -> list[str]:
    """The registered models of this package."""
    return timm.list_models(module='hydra_vit')


def create_model(name: str, img_size: Optional[int] = None, backend: Optional[str] = None) -> nn.Module:
    """``timm.create_model`` for an image size: given to the constructor where it has one, as transformers want it."""
    kwargs: dict[str, Any] = {} if backend is None else {'backend': backend}
    if img_size is None:
        return timm.create_model(name, **kwargs)
    try:
        return timm.create_model(name, img_size=img_size, **kwargs)
    except TypeError as error:
        if 'img_size' not in str(error):
            raise
        return timm.create_model(name, **kwargs)  # convolutional: any size


@cache
def count_model(name: str, img_size: Optional[int] = None, training: bool = False) -> Counts:
    """Count one image of a model.

    Args:
        name: A timm model. One of ours is counted in its chunked form, whatever runs later.
        img_size: Side of the image; None for the model's default.
        training: Forward and backward instead of forward.
    """
    with torch.device('meta'):
        model = create_model(name, img_size, 'chunked' if name.partition('.')[0] in family_models() else None)
        channels, height, width = model.default_cfg['input_size']
        if img_size is not None:
            height = width = img_size
        images = torch.empty(1, channels, height, width)
    model.train(training)
    sizes: dict[nn.Module, tuple[int, int]] = {}

    def note(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        sizes[module] = (inputs[0].numel(), output.numel())

    projections = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) and getattr(m, 'groups', 1) == 1]
    hooks = [m.register_forward_hook(note) for m in projections]
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        output = model(images)
        if training:
            output.sum().backward()
    for hook in hooks:
        hook.remove()

    by_operator = {str(op).rpartition('.')[2]: n for op, n in counter.get_flop_counts()['Global'].items()}
    projected = sum(n for op, n in by_operator.items() if op in _PROJECTIONS)
    elements = weights = 0
    for module, (read, written) in sizes.items():
        is_stem = isinstance(module, nn.Conv2d) and module.in_channels == channels  # its input needs no gradient
        elements += read * (1 if not training else 2 if is_stem else 3) + written * (3 if training else 1)
        weights += module.weight.numel() * (3 if training else 1)
    for module in model.modules():
        for first_name, last_name in _MIXER_ENDS:
            first, last = getattr(module, first_name, None), getattr(module, last_name, None)
            if first in sizes and last in sizes:
                elements += sizes[first][1] * (3 if training else 1) + sizes[last][0] * (2 if training else 1)
    return Counts(
        parameters=sum(p.numel() for p in model.parameters()),
        projection_flops=projected,
        mixing_flops=sum(by_operator.values()) - projected,
        image_elements=elements,
        weight_elements=weights,
    )

"""The effective receptive field: which pixels the feature of the middle patch depends on, and how much.

After Luo et al., https://arxiv.org/abs/1701.04128: the absolute gradient of the middle feature with respect to the
input, averaged over images, here of its projection on a random direction and summed over colours.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..features import image_features
from .figures import new_figure, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['effective_receptive_field', 'field_side', 'plot_receptive_fields']


def effective_receptive_field(model: nn.Module, x: Tensor, *, layers: Sequence[int] | None = None) -> Tensor:
    """Mean absolute gradient of the middle patch's feature with respect to the pixels.

    The feature is projected on a random direction, the same for every call. Its plain sum would not do: behind a
    LayerNorm that has not been trained it is zero for every image, and its gradient nothing but rounding.

    Args:
        model: A timm model in eval mode.
        x: Images (n, C, H, W).
        layers: One layer, as in `image_features`; None for the final features.

    Returns:
        (H, W), its maximum 1 (all zero only where the feature does not depend on the image).
    """
    field = torch.zeros(x.shape[2:], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for image in x:  # one at a time: constant memory
            pixels = image[None].clone().requires_grad_()
            y = image_features(model, pixels, pool='none', layers=layers)
            middle = y[0, :, y.shape[2] // 2, y.shape[3] // 2]
            direction = torch.randn(len(middle), generator=generator).to(middle)
            (gradient,) = torch.autograd.grad(middle @ direction, pixels)
            field += gradient[0].abs().sum(0).double().cpu()
    return (field / field.max().clamp_min(1e-300)).float()


def field_side(field: Tensor, share: float = 0.5, grid: tuple[int, int] = (1, 1)) -> float:
    """Side of a square around the middle patch that holds a share of the field, over the image's side.

    Args:
        field: (H, W) from `effective_receptive_field`.
        share: How much of its sum.
        grid: (h, w) of the patches. Of an even number none is in the middle of the image.

    Returns:
        0..1, of the part of the square that lies on the image; for a field that is the same everywhere, about
        sqrt(share).
    """
    H, W = field.shape
    total = field.double().sum()
    y, x = ((n // 2 + 0.5) * size / n for n, size in zip(grid, (H, W)))
    for step in range(1, 2 * max(H, W) + 1):
        top, bottom = (min(max(math.floor(y + sign * step / 2 + 0.5), 0), H) for sign in (-1, 1))
        left, right = (min(max(math.floor(x + sign * step / 2 + 0.5), 0), W) for sign in (-1, 1))
        if field[top:bottom, left:right].double().sum() >= share * total:
            return math.sqrt((bottom - top) * (right - left) / (H * W))
    return 1.0


def plot_receptive_fields(fields: Sequence[tuple[str, Tensor]], title: str, grid: tuple[int, int] = (1, 1)) -> 'Figure':
    """Fields with a name each next to each other on one logarithmic scale.

    Args:
        fields: (name, (H, W) field).
        title: Of the figure.
        grid: (h, w) of the patches.
    """
    figure, axes = new_figure(1, len(fields), title)
    for panel, (name, field) in zip(axes[0], fields):
        sides = ', '.join(f'{share:.0%} in {field_side(field, share, grid):.2f}' for share in (0.5, 0.9))
        values = field.clamp_min(1e-4).log10()
        shown = show(panel, values, f'{name}\n{sides} of the side', 'px', cmap='magma', vmin=-4, vmax=0)
    figure.colorbar(shown, ax=axes[0], fraction=0.046, pad=0.02, label='log10 of gradient / largest')
    return figure

"""Pictures of patch features: their principal components as colours, and how similar all patches are to one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FeatureError
from .figures import frame_patch, new_figure, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROUNDING = 1e-5  # of the largest feature: float32 has no more in sums of this length

__all__ = ['pca_rgb', 'plot_pca', 'plot_similarity', 'similarity_map']


def pca_rgb(features: Tensor) -> tuple[Tensor, Tensor]:
    """The first three principal components of patch features as red, green and blue, one basis for all images.

    Args:
        features: (n, D, h, w) Patch features of n images; n * h * w and D at least 3.

    Returns:
        Colours (n, h, w, 3) in 0..1: each component from its 1 % to its 99 % quantile (one that is not more than
        rounding stays dark); and the share of the variance that each component has, (3,).

    Raises:
        FeatureError: Too few patches or features.
    """
    n, D, h, w = features.shape
    if n * h * w < 3 or D < 3:
        raise FeatureError(f'{n * h * w} patches of {D} features have no three principal components')
    tokens = features.permute(0, 2, 3, 1).reshape(-1, D).double()
    noise = _ROUNDING * tokens.abs().max()
    tokens = tokens - tokens.mean(0)
    values, vectors = torch.linalg.eigh(tokens.T @ tokens)  # ascending
    basis = vectors[:, -3:].flip(1)
    # The sign of an eigenvector is arbitrary: its largest entry is positive, so that a picture can be drawn again.
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    components = tokens @ basis
    low, high = components.quantile(0.01, dim=0), components.quantile(0.99, dim=0)
    colours = ((components - low) / (high - low).clamp_min(noise).clamp_min(1e-12)).clamp(0, 1)
    share = values[-3:].flip(0) / values.sum().clamp_min(1e-12)
    return colours.reshape(n, h, w, 3).float(), share.float()


def similarity_map(features: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cosine similarity of every patch to one.

    Args:
        features: (n, D, h, w).
        patch: (row, column) in the first image.

    Returns:
        (n, h, w) in -1..1; 1 at the patch itself.

    Raises:
        FeatureError: A patch outside of the grid.
    """
    h, w = features.shape[2:]
    if not (0 <= patch[0] < h and 0 <= patch[1] < w):
        raise FeatureError(f'patch={patch} is outside of the grid; allowed: rows 0 to {h - 1}, columns 0 to {w - 1}')
    unit = F.normalize(features.float(), dim=1)
    return torch.einsum('ndhw,d->nhw', unit, unit[0, :, patch[0], patch[1]])


def plot_pca(pictures: Tensor, features: Tensor, captions: Sequence[str], title: str) -> 'Figure':
    """Images (n, H, W, 3) above the principal components of their features (n, D, h, w)."""
    colours, share = pca_rgb(features)
    shares = ', '.join(f'{value:.0%}' for value in share)
    figure, axes = new_figure(2, len(pictures), f'{title}\nred, green, blue: {shares} of the variance')
    for i, (picture, colour) in enumerate(zip(pictures, colours)):
        show(axes[0][i], picture, captions[i], 'px')
        show(axes[1][i], colour, 'principal components', 'patch')
    return figure


def plot_similarity(
    pictures: Tensor, features: Tensor, patch: tuple[int, int], captions: Sequence[str], title: str
) -> 'Figure':
    """Images above the similarity of their patches to one patch of the first image, which is framed."""
    maps = similarity_map(features, patch)
    figure, axes = new_figure(2, len(pictures), f'{title}\ncosine similarity to patch {patch} of the first image')
    lowest = min(float(maps.min()), 1 - 1e-3)  # a narrower scale would show rounding
    for i, (picture, values) in enumerate(zip(pictures, maps)):
        show(axes[0][i], picture, captions[i], 'px')
        shown = show(axes[1][i], values, 'similarity', 'patch', cmap='viridis', vmin=lowest, vmax=1)
    h, w = maps.shape[1:]
    frame_patch(axes[0][0], patch, (pictures.shape[1] / h, pictures.shape[2] / w))
    frame_patch(axes[1][0], patch, color='red')
    figure.colorbar(shown, ax=axes[1], fraction=0.046, pad=0.02)
    return figure

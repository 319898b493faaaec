"""Class activation maps through pytorch-grad-cam: which patches speak for a class."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import FeatureError, require
from .figures import new_figure, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['grad_cam', 'plot_grad_cam', 'reshape_transform', 'target_layer']


def reshape_transform(model: nn.Module, size: tuple[int, int], block: int = -1) -> Callable[[Tensor], Tensor]:
    """What pytorch-grad-cam calls `reshape_transform`: tokens to a map, for images that need not be square.

    Args:
        model: A Hydra-ViT (with any scan order and place of the class token), or a timm ViT.
        size: (H, W) of the images in px.
        block: Index of the block whose tokens are meant: scan orders may differ between blocks.

    Returns:
        Function from tokens (B, L, D) to a map (B, D, h, w), class and register tokens left out.

    Raises:
        FeatureError: A model without patches; an index out of range. The function raises where L does not fit.
    """
    embed = getattr(model, 'patch_embed', None)
    if not hasattr(embed, 'dynamic_feat_size') or not hasattr(model, 'blocks'):
        raise FeatureError(f'{type(model).__name__} has no tokens on a grid of patches')
    count = len(model.blocks)
    if not -count <= block < count:
        raise FeatureError(f'block={block} is out of range; allowed: {-count} to {count - 1}')
    h, w = embed.dynamic_feat_size(tuple(size))
    prefix = getattr(model, 'num_prefix_tokens', 0)
    order = torch.arange(prefix + h * w)
    if hasattr(model, 'token_order'):
        order = model.token_order(h, w, block % count)

    def to_map(tokens: Tensor) -> Tensor:
        if tokens.ndim != 3 or tokens.shape[1] != len(order):
            raise FeatureError(f'tokens {tuple(tokens.shape)}: {len(order)} of them fit images of {tuple(size)} px')
        return tokens[:, order[prefix:].to(tokens.device)].transpose(1, 2).reshape(len(tokens), -1, h, w)

    return to_map


def target_layer(model: nn.Module) -> nn.Module:
    """The layer to look at where none is asked for.

    For a model that averages its patches this is the last norm: nothing mixes patches behind it, so that the map
    splits the logit exactly. Behind the last mixer, the patches of a model that reads out its class token have no
    gradient: there it is the norm before that mixer.
    """
    return model.blocks[-1].norm1 if getattr(model, 'global_pool', '') == 'token' else model.norm


def grad_cam(
    model: nn.Module, x: Tensor, *, classes: Sequence[int] | None = None, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Grad-CAM (Selvaraju et al., https://arxiv.org/abs/1610.02391) of a classifier.

    Args:
        model: A Hydra-ViT or timm ViT with a head, in eval mode.
        x: Images (n, C, H, W).
        classes: A class for each image; None for the predicted ones.
        block: Look at this block's output; None for `target_layer`.

    Returns:
        Maps (n, H, W) in 0..1, and the classes (n,).

    Raises:
        FeatureError: No head, a class that the head does not have, a block out of range.
        MissingExtraError: pytorch-grad-cam is not installed.
    """
    cam = require('pytorch_grad_cam', 'explain')
    count = getattr(model, 'num_classes', 0)
    if count < 1:
        raise FeatureError(f'{type(model).__name__} has no classification head')
    if classes is not None and (len(classes) != len(x) or not all(0 <= each < count for each in classes)):
        raise FeatureError(f'classes={list(classes)} for {len(x)} images; allowed: one each, 0 to {count - 1}')
    to_map = reshape_transform(model, tuple(x.shape[2:]), -1 if block is None else block)
    layer = target_layer(model) if block is None else model.blocks[block]
    if classes is None:
        with torch.no_grad():
            classes = model(x).argmax(1).tolist()
    targets = [cam.utils.model_targets.ClassifierOutputTarget(each) for each in classes]
    with torch.enable_grad(), cam.GradCAM(model=model, target_layers=[layer], reshape_transform=to_map) as method:
        # gradients have to reach the layer although the weights are frozen
        maps = method(input_tensor=x.clone().requires_grad_(), targets=targets)
    return torch.from_numpy(maps), torch.tensor(classes)


def plot_grad_cam(
    pictures: Tensor, maps: Tensor, names: Sequence[str], captions: Sequence[str], title: str
) -> 'Figure':
    """Images (n, H, W, 3) above their maps (n, H, W), drawn over them; a class name each."""
    figure, axes = new_figure(2, len(pictures), title)
    for i, (picture, values) in enumerate(zip(pictures, maps)):
        show(axes[0][i], picture, captions[i], 'px')
        show(axes[1][i], picture.mean(-1), f'for class {names[i]}', 'px', cmap='gray', vmin=0, vmax=1)
        shown = show(axes[1][i], values, f'for class {names[i]}', 'px', cmap='jet', alpha=0.5, vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes[1], fraction=0.046, pad=0.02, label='relative to the largest')
    return figure

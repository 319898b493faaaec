"""What is taken out of a model: which layers, pooled how."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import FeatureError

__all__ = ['POOLS', 'check_layers', 'image_features']

POOLS = {
    'avg': 'mean of the patch tokens: (D,)',
    'max': 'maximum of the patch tokens: (D,)',
    'cls': 'the class token, for models that have one: (D,)',
    'tokens': 'all patch tokens, row by row: (h * w, D)',
    'none': 'the feature map as it is: (D, h, w)',
}


def check_layers(model: nn.Module, layers: Sequence[int] | None) -> tuple[int, ...] | None:
    """Layer indices as non-negative numbers, ascending.

    Args:
        model: A timm model.
        layers: Indices of what the model lists in `feature_info` (the blocks of a transformer, the stages of a
            CNN); negative ones count from the end. None: the model's final features.

    Raises:
        FeatureError: An index out of range or given twice; a model that cannot return single layers.
    """
    if layers is None:
        return None
    if not hasattr(model, 'forward_intermediates'):
        raise FeatureError(f'{type(model).__name__} cannot return single layers: leave out layers')
    count = len(model.feature_info)
    chosen = []
    for layer in layers:
        if not -count <= layer < count:
            raise FeatureError(
                f'layer {layer} is out of range; the model has layers 0 to {count - 1} (or -1 to {-count})'
            )
        chosen.append(layer % count)
    if not chosen or len(set(chosen)) < len(chosen):
        raise FeatureError(f'layers={list(layers)}; give at least one, and each one once')
    return tuple(sorted(chosen))


def image_features(model: nn.Module, x: Tensor, *, pool: str = 'avg', layers: Sequence[int] | None = None) -> Tensor:
    """Features of a batch of images, without prefix tokens (class or register tokens) unless asked for them.

    Without `layers` they are what the model hands to its pooling (`forward_features`, after the last norm). With
    `layers`, the output of each, after the model's last norm where the model can (DINO's evaluation does the same),
    joined along D in ascending order. `layers=(last,)` of an isotropic model equals no `layers`.

    Args:
        model: A timm model in eval mode.
        x: Images (B, C, H, W).
        pool: A key of `POOLS`.
        layers: As in `check_layers`.

    Returns:
        (B, D), (B, h * w, D) or (B, D, h, w).

    Raises:
        FeatureError: An unknown pool; 'cls' of a model without class token; layers of different grids that are not
            pooled.
    """
    if pool not in POOLS:
        raise FeatureError(f'pool={pool!r}; allowed: {", ".join(POOLS)}')
    if pool == 'cls' and not _has_class_token(model):
        others = ', '.join(name for name in POOLS if name != 'cls')
        raise FeatureError(f"pool = 'cls': {type(model).__name__} has no class token here; allowed: {others}")
    layers = check_layers(model, layers)
    maps = [_final(model, x, pool)] if layers is None else _intermediates(model, x, layers, pool)
    pooled = [_pool(y, pool) for y in maps]
    if len({tuple(y.shape[1:-1] if pool == 'tokens' else y.shape[2:]) for y in pooled}) > 1:
        raise FeatureError(f'layers={list(layers)} have different grids and cannot be joined with pool={pool!r}')
    return torch.cat(pooled, dim=-1 if pool == 'tokens' else 1)


def _has_class_token(model: nn.Module) -> bool:
    """Whether the first prefix token is one: models may have register tokens alone."""
    own = getattr(model, 'has_class_token', getattr(model, 'cls_token', None) is not None)
    return bool(own) and getattr(model, 'num_prefix_tokens', 0) > 0


def _final(model: nn.Module, x: Tensor, pool: str) -> Tensor:
    """Final features: a map (B, D, h, w), or the class token (B, D)."""
    y = model.forward_features(x)
    if y.ndim == 4:
        return y.permute(0, 3, 1, 2) if getattr(model, 'output_fmt', 'NCHW') == 'NHWC' else y
    if y.ndim != 3:
        raise FeatureError(f'{type(model).__name__}.forward_features gives {tuple(y.shape)}: neither tokens nor a map')
    if pool == 'cls':
        return y[:, 0]
    y = y[:, getattr(model, 'num_prefix_tokens', 0) :]
    h, w = _grid(model, x, y.shape[1])
    return y.transpose(1, 2).reshape(y.shape[0], -1, h, w)


def _grid(model: nn.Module, x: Tensor, tokens: int) -> tuple[int, int]:
    embed = getattr(model, 'patch_embed', None)
    if hasattr(embed, 'dynamic_feat_size'):
        h, w = embed.dynamic_feat_size(x.shape[-2:])
        if h * w == tokens:
            return h, w
    raise FeatureError(f'{type(model).__name__} gives {tokens} tokens that are no grid of patches')


def _intermediates(model: nn.Module, x: Tensor, layers: Sequence[int], pool: str) -> list[Tensor]:
    """Maps (B, D, h, w) or class tokens (B, D) of some layers."""
    prefix = {'return_prefix_tokens': True} if pool == 'cls' else {}
    try:
        outputs: list[Tensor | tuple[Tensor, Tensor]] = model.forward_intermediates(
            x, indices=list(layers), norm=True, stop_early=True, intermediates_only=True, output_fmt='NCHW', **prefix
        )
    except (AssertionError, TypeError) as error:  # how timm's models say what they do not offer
        raise FeatureError(f'{type(model).__name__} cannot return these layers: {error}') from error
    return [tokens[:, 0] for _, tokens in outputs] if prefix else outputs


def _pool(y: Tensor, pool: str) -> Tensor:
    if pool in ('cls', 'none'):
        return y
    tokens = y.flatten(2).transpose(1, 2)  # (B, h * w, D)
    if pool == 'avg':
        return tokens.mean(1)
    return tokens.amax(1) if pool == 'max' else tokens

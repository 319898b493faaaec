"""Batches of images of several sizes, padded to one number of patches or packed into one row: where tokens stand.

Each image is scanned as if it were alone: its own patches in scan order with the class token at its place among them,
then the padding. Padding may stand anywhere in the batch that comes in; it is moved to the end, where a mixer can leave
it out exactly (``Mixer.why_no_padding``). In a packed row there is none: the images stand one after the other, with
borders between them (``Mixer.why_no_packing``).
"""

from typing import Dict, Optional, Tuple, Union

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from ..ops.packed import check_cu_seqlens
from .scan_order import raster_index

__all__ = [
    'grid_coordinates',
    'naflex_inputs',
    'packed_row',
    'reorder_tokens',
    'sampled_pos_embed',
    'scan_positions',
    'tokens_of_sequences',
    'unpacked',
]

_FAR = 1 << 16  # above every row and column of a grid


def naflex_inputs(
    x: Union[Tensor, Dict[str, Tensor]],
    patch_coord: Optional[Tensor],
    patch_valid: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """x, patch_coord, patch_valid and cu_seqlens of what a model was called with; a dict has them all, as in timm's
    NaFlexVit. One of the last two is None.

    Raises:
        ValueError: Patches without coordinates, or shapes that do not fit.
    """
    if isinstance(x, dict):
        patch_coord, patch_valid = x.get('patch_coord', patch_coord), x.get('patch_valid', patch_valid)
        x, cu_seqlens = x['patches'], x.get('cu_seqlens', cu_seqlens)
    if cu_seqlens is not None and patch_valid is not None:
        raise ValueError('cu_seqlens, patch_valid: a packed row has no padding; give one of the two')
    if cu_seqlens is not None and x.ndim == 4:
        raise ValueError('cu_seqlens: images (B, C, H, W) stand in no row; give patches with patch_coord')
    if x.ndim != 4 and patch_coord is None:
        raise ValueError(f'patch_coord: patches of shape {tuple(x.shape)} need the (y, x) of each, (B, N, 2)')
    if patch_coord is not None:
        if x.ndim == 4:
            raise ValueError('patch_coord: images (B, C, H, W) have their own; leave it out')
        if patch_coord.shape != (*x.shape[:2], 2):
            raise ValueError(f'patch_coord has shape {tuple(patch_coord.shape)}; it must be {(*x.shape[:2], 2)}')
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, x, None)
        elif patch_valid is None:
            patch_valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return x, patch_coord, patch_valid, cu_seqlens


def tokens_of_sequences(cu_seqlens: Tensor, prefix: int = 0) -> Tensor:
    """(S, prefix + longest) Which tokens each of the S sequences of a row has, were they padded to one length."""
    lengths = cu_seqlens.diff() + prefix
    return torch.arange(int(lengths.max()), device=cu_seqlens.device) < lengths.unsqueeze(1)


def unpacked(x: Tensor, own: Tensor) -> Tensor:
    """A row (1, tokens, D) as (S, longest, D) with zeros behind shorter sequences; own: see `tokens_of_sequences`."""
    return x.new_zeros(*own.shape, x.shape[-1]).masked_scatter(own.unsqueeze(-1), x)


def packed_row(x: Tensor, own: Tensor) -> Tensor:
    """(S, longest, D) as a row (1, tokens, D), without what is behind the sequences."""
    return x[own].unsqueeze(0)


def grid_coordinates(height: int, width: int, device: torch.device) -> Tensor:
    """(1, height * width, 2) (y, x) of the patches of a grid by rows."""
    return torch.cartesian_prod(torch.arange(height, device=device), torch.arange(width, device=device)).unsqueeze(0)


def _grids(coord: Tensor, valid: Tensor) -> Tensor:
    """(B, 2) rows and columns of each image, of its valid patches."""
    return coord.masked_fill(~valid.unsqueeze(-1), 0).amax(1) + 1


def sampled_pos_embed(pos_embed: Tensor, grid_size: Tuple[int, int], coord: Tensor, valid: Tensor) -> Tensor:
    """A position embedding (1, L, D) resampled to the grid of each image, at its patches: (B, N, D)."""
    grids = [tuple(grid) for grid in _grids(coord, valid).tolist()]
    tables = {grid: resample_abs_pos_embed(pos_embed, list(grid), list(grid_size), num_prefix_tokens=0)[0]
              for grid in set(grids)}  # fmt: skip
    rows = []
    for grid, own, ok in zip(grids, coord, valid):
        rows.append(tables[grid][(own[:, 0] * grid[1] + own[:, 1]).masked_fill(~ok, 0)])
    return torch.stack(rows)


def _ranks(order: str, coord: Tensor, valid: Tensor) -> Tensor:
    """(B, N) A number for each patch, ascending in the scan order of its image."""
    y, x = coord.unbind(-1)
    if order == 'row':
        return y * _FAR + x
    if order == 'column':
        return x * _FAR + y
    grids = _grids(coord, valid)
    if order == 'snake':
        return y * _FAR + torch.where(y % 2 == 0, x, grids[:, 1:] - 1 - x)
    ranks = torch.zeros_like(y)
    for b, (height, width) in enumerate(grids.tolist()):
        place = y.new_empty(height * width)
        place[torch.tensor(raster_index(order, height, width), device=y.device)] = torch.arange(
            height * width, device=y.device
        )
        ranks[b] = place[(y[b] * width + x[b]).masked_fill(~valid[b], 0)]
    return ranks


def scan_positions(order: str, coord: Tensor, valid: Tensor, class_token_position: Optional[str]) -> Tensor:
    """Where each token stands in the sequence: (B, N), with a class token (B, 1 + N), its own place first.

    Args:
        order: One of `SCAN_ORDERS` but 'alternate'.
        coord: (B, N, 2) (y, x) of the patches.
        valid: (B, N) False at padding.
        class_token_position: 'first', 'middle' or 'last' among the valid patches; None without class token.
    """
    ranks = _ranks(order, coord, valid).masked_fill(~valid, _FAR * _FAR)
    positions = ranks.argsort(stable=True, dim=1).argsort(1)
    if class_token_position is None:
        return positions
    count = valid.sum(1, keepdim=True)
    at = {'first': torch.zeros_like(count), 'middle': count // 2, 'last': count}[class_token_position]
    return torch.cat([at, positions + (positions >= at)], dim=1)


def reorder_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x (B, L, D) -> x[b, index[b, i]]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

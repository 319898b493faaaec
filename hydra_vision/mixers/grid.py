"""Parameters that belong to the positions of a patch grid, resampled in two dimensions as position embeddings are.

Tokens are row-major over an (H, W) grid of patches; class and register tokens ("prefix tokens") stand before, after or
in the middle of them and keep their values.
"""

from typing import Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['GridSize', 'TokenGrid', 'amplitude', 'resample_axis', 'resample_offsets']

GridSize = Union[int, Tuple[int, int]]

PREFIX_POSITIONS = ('first', 'middle', 'last')


class TokenGrid:
    """Where the tokens of a sequence are: ``size`` = (H, W) patches and ``num_prefix_tokens`` others.

    Args:
        size: (H, W), or a number of tokens for a sequence that has no second dimension.
        num_prefix_tokens: Class and register tokens.
        prefix_position: Where they stand: 'first', 'middle' (after half of the patches, rounded down) or 'last'.

    Raises:
        ValueError: A size below 1, a negative number, an unknown position.
    """

    def __init__(self, size: GridSize, num_prefix_tokens: int = 0, prefix_position: str = 'first') -> None:
        self.size = (1, size) if isinstance(size, int) else tuple(map(_whole, size))
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f'grid_size={size}; it must be (H, W) or a number of tokens, each at least 1')
        if num_prefix_tokens < 0:
            raise ValueError(f'num_prefix_tokens={num_prefix_tokens}; it must not be negative')
        if prefix_position not in PREFIX_POSITIONS:
            raise ValueError(f'prefix_position={prefix_position!r}; allowed: {", ".join(map(repr, PREFIX_POSITIONS))}')
        self.num_prefix_tokens = num_prefix_tokens
        self.prefix_position = prefix_position

    @property
    def num_patches(self) -> int:
        return self.size[0] * self.size[1]

    @property
    def num_tokens(self) -> int:
        return self.num_patches + self.num_prefix_tokens

    def resized(self, size: GridSize) -> 'TokenGrid':
        """The same prefix tokens around another grid."""
        return TokenGrid(size, self.num_prefix_tokens, self.prefix_position)

    def from_num_tokens(self, num_tokens: int) -> Optional['TokenGrid']:
        """The square grid (for a sequence without a second dimension, the sequence) of so many tokens, or None."""
        patches = num_tokens - self.num_prefix_tokens
        if patches < 1:
            return None
        if self.size[0] == 1:
            return self.resized(patches)
        side = round(patches**0.5)
        return self.resized((side, side)) if side * side == patches else None

    @property
    def prefix_start(self) -> int:
        """Index of the first prefix token in the sequence."""
        return {'first': 0, 'middle': self.num_patches // 2, 'last': self.num_patches}[self.prefix_position]

    def tokens(self, t: Tensor, new: 'TokenGrid', dim: int = 0) -> Tensor:
        """``t`` with one entry per token along ``dim``, resampled to the tokens of ``new``: bicubic, antialiased."""
        if new.size == self.size:
            return t
        t = t.movedim(dim, -1)
        start, end = self.prefix_start, self.prefix_start + self.num_prefix_tokens
        patches = torch.cat([t[..., :start], t[..., end:]], dim=-1).unflatten(-1, self.size)
        patches = _interpolate(patches, new.size).flatten(-2)
        at = new.prefix_start
        t = torch.cat([patches[..., :at], t[..., start:end], patches[..., at:]], dim=-1)
        return t.movedim(-1, dim)

    def __repr__(self) -> str:
        prefix = f' and {self.num_prefix_tokens} prefix tokens' if self.num_prefix_tokens else ''
        return f'{self.size[0]} x {self.size[1]} patches{prefix}'


def _whole(n: Union[int, Tensor]) -> int:
    """An int; of torch.jit.trace, which has tensors for sizes, too. A symbol stays one."""
    return n if isinstance(n, torch.SymInt) else int(n)


def amplitude(old: TokenGrid, new: TokenGrid) -> float:
    """Factor of a resampled kernel whose mixer scales by L^-1/2: a sum over more tokens must not be a larger sum."""
    return (old.num_tokens / new.num_tokens) ** 0.5


def _interpolate(t: Tensor, size: Tuple[int, int]) -> Tensor:
    """(..., H, W) -> (..., *size), in float32 or wider."""
    lead = t.shape[:-2]
    wide = t if t.dtype == torch.float64 else t.float()
    out = F.interpolate(wide.reshape(1, -1, *t.shape[-2:]), size=size, mode='bicubic', antialias=True)
    return out.reshape(*lead, *size).to(t.dtype)


def resample_axis(t: Tensor, size: int, dim: int) -> Tensor:
    """``t`` resampled along one dimension."""
    if t.shape[dim] == size:
        return t
    return _interpolate(t.movedim(dim, -1).unsqueeze(-2), (1, size)).squeeze(-2).movedim(-1, dim)


def resample_offsets(t: Tensor, old: Tuple[int, int], new: Tuple[int, int]) -> Tensor:
    """Coefficients t[..., L-1 + (i-j)] of a Toeplitz matrix over row-major tokens, from one grid to another.

    The matrix gives every offset (dy, dx) on the grid a value, t at dy * W + dx. This kernel is resampled in two
    dimensions; the new coefficients are the Toeplitz matrix nearest to it (two offsets on a grid can share one offset
    along the sequence: their mean, weighted by how many pairs of tokens have each).

    Args:
        t: (..., 2 * H * W - 1).
        old: (H, W).
        new: (H', W').

    Returns:
        (..., 2 * H' * W' - 1), on the same grid ``t`` itself.
    """
    if old == new:
        return t

    def offsets(size: Tuple[int, int]) -> Tuple[Tensor, Tensor]:
        dy = torch.arange(1 - size[0], size[0], device=t.device)[:, None]
        dx = torch.arange(1 - size[1], size[1], device=t.device)[None, :]
        pairs = (size[0] - dy.abs()) * (size[1] - dx.abs())
        return dy * size[1] + dx + size[0] * size[1] - 1, pairs

    index, _ = offsets(old)
    kernel = _interpolate(t[..., index], (2 * new[0] - 1, 2 * new[1] - 1))
    index, pairs = offsets(new)
    index, pairs = index.flatten(), pairs.flatten().to(kernel.dtype)
    count = pairs.new_zeros(2 * new[0] * new[1] - 1).index_add(0, index, pairs)
    total = kernel.new_zeros(*t.shape[:-1], count.shape[0]).index_add(-1, index, kernel.flatten(-2) * pairs)
    return total / count

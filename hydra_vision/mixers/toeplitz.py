"""Toeplitz mixer: m_ij = t_{i-j}, by FFT."""

from typing import Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ..ops.reference import accumulation_dtype
from .base import MatrixMixer
from .grid import TokenGrid, amplitude, resample_offsets

__all__ = ['Toeplitz', 'toeplitz_matrix', 'toeplitz_product']


def toeplitz_matrix(t: Tensor) -> Tensor:
    """(..., 2L-1), coefficient of offset i-j at L-1 + i-j -> (..., L, L)."""
    L = (t.shape[-1] + 1) // 2
    i = torch.arange(L, device=t.device)
    return t[..., i[:, None] - i[None, :] + L - 1]


def toeplitz_product(t: Tensor, v: Tensor) -> Tensor:
    """Toeplitz matrix times v in O(L log L): no wrap-around, zero outside the sequence.

    Args:
        t: (..., C or 1, 2L-1), coefficient of offset i-j at L-1 + i-j.
        v: (..., C, L).

    Returns:
        (..., C, L), dtype of ``v``; computed in float32, for float64 in float64.
    """
    L = v.shape[-1]
    acc = accumulation_dtype(v.dtype)
    t = t.to(acc)
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():  # the exporter on top of traces has no FFT
        return (toeplitz_matrix(t) @ v.to(acc).unsqueeze(-1)).squeeze(-1).to(v.dtype)
    n = _fast_length(2 * L - 1)
    # a circulant of this size: offsets 0 ... L-1, places without use, offsets -(L-1) ... -1
    unused = t.new_zeros(*t.shape[:-1], n - (2 * L - 1))
    circulant = torch.cat([t[..., L - 1 :], unused, t[..., : L - 1]], dim=-1)
    spectrum = torch.fft.rfft(v.to(acc), n=n) * torch.fft.rfft(circulant, n=n)
    return torch.fft.irfft(spectrum, n=n)[..., :L].to(v.dtype)


def _fast_length(n: int) -> int:
    """The next even length without a prime factor above 7: the lengths that FFT libraries have fast code for.

    Of a symbolic n, which is odd, only the next even one: the graph must not depend on its factors.
    """
    if isinstance(n, torch.SymInt):
        return n + 1
    n = int(n)  # torch.jit.trace has tensors for sizes
    while True:
        n += n % 2
        rest = n
        for factor in (2, 3, 5, 7):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return n
        n += 2


class Toeplitz(MatrixMixer):
    """m_ij = t_{i-j} * L^-1/2 / 2, one matrix per head.

    Data-dependent: the coefficients of offsets 0 ... L-1 and of 0, -1 ... -(L-1) are two more columns of the tokens,
    convolved like v. Any length. Data-independent: 2L - 1 parameters per head; at another grid the kernel over (dy, dx)
    is resampled in two dimensions (``resample_offsets``), without prefix tokens, which have no place on the grid.

    The released module computes t_{i-j+1}, with the last coefficient wrapped around, and swaps tokens with the channels
    of a head (it runs for L = headdim only); this is the definition.

    Args:
        d_model: Width of the tokens.
        data_dependent: Coefficients from the tokens, or parameters.
        **wrapper: As in ``MatrixMixer``.
    """

    def __init__(self, d_model: int, *, data_dependent: bool = True, device=None, dtype=None, **wrapper) -> None:
        super().__init__(d_model, data_dependent, device=device, dtype=dtype, **wrapper)
        self._build(2 * self.nheads if data_dependent else 0)
        if not data_dependent:
            length = 2 * self.tokens.num_tokens - 1
            self.t = nn.Parameter(torch.empty(self.nheads, length, device=device, dtype=dtype))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters that this module owns itself."""
        if not self.data_dependent:
            nn.init.xavier_uniform_(self.t)

    def grid_parameters(self) -> Tuple[str, ...]:
        return () if self.data_dependent else ('t',)

    def resample(self, name: str, value: Tensor, old: TokenGrid, new: TokenGrid) -> Tensor:
        if old.size != new.size and old.num_prefix_tokens:
            raise ValueError(
                f'Toeplitz: from {old} to {new}; a coefficient that also stands for the offset to a class token cannot '
                'be resampled over the grid'
            )
        return resample_offsets(value, old.size, new.size) * amplitude(old, new)

    def old_tokens(self, name: str, value: Tensor) -> Optional[TokenGrid]:
        return self.tokens.from_num_tokens((value.shape[-1] + 1) // 2)

    def _coefficients(self, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        """(B or 1, H, 2L-1), scaled."""
        if not self.data_dependent:
            return 0.5 * tokens.num_tokens**-0.5 * self._at('t', tokens).unsqueeze(0)
        ahead, behind = (
            extras.to(accumulation_dtype(extras.dtype)).transpose(-1, -2).unflatten(1, (2, self.nheads)).unbind(1)
        )
        t = torch.cat([behind[..., 1:].flip(-1), ahead], dim=-1)
        return 0.5 * extras.shape[1] ** -0.5 * t

    def mix(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        t = self._coefficients(extras, tokens).unsqueeze(2)  # (B, H, 1, 2L-1)
        return toeplitz_product(t, v.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def dense(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        return toeplitz_matrix(self._coefficients(extras, tokens))

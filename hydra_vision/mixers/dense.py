"""Mixers without structure to exploit in the data: a free matrix, and the Fourier matrix."""

import math
from typing import Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ..ops.reference import accumulation_dtype
from .base import MatrixMixer, apply_matrix
from .grid import TokenGrid, amplitude

__all__ = ['Dense', 'Fourier']


class Dense(MatrixMixer):
    """m_ij = M[h, i, j] L^-1/2: L^2 parameters per head, resampled over the grid in both i and j.

    Args:
        d_model: Width of the tokens.
        **wrapper: As in ``MatrixMixer``; ``grid_size`` is needed.
    """

    position_parameters = 'always'

    def __init__(self, d_model: int, *, device=None, dtype=None, **wrapper) -> None:
        super().__init__(d_model, False, device=device, dtype=dtype, **wrapper)
        self._build()
        L = self.tokens.num_tokens
        self.M = nn.Parameter(torch.empty(self.nheads, L, L, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters that this module owns itself."""
        nn.init.xavier_normal_(self.M)

    def grid_parameters(self) -> Tuple[str, ...]:
        return ('M',)

    def resample(self, name: str, value: Tensor, old: TokenGrid, new: TokenGrid) -> Tensor:
        return old.tokens(old.tokens(value, new, dim=1), new, dim=2) * amplitude(old, new)

    def old_tokens(self, name: str, value: Tensor) -> Optional[TokenGrid]:
        return self.tokens.from_num_tokens(value.shape[-1])

    def mix(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        return apply_matrix(self.dense(v, extras, tokens), v)

    def dense(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        return (self._at('M', tokens) * tokens.num_tokens**-0.5).unsqueeze(0)


class Fourier(MatrixMixer):
    """m_ij = L^-1/2 cos(2 pi i j / L), the same for every head and image, by FFT: O(L log L), any length.

    The cosine alone has rank L // 2 + 1: it cannot tell a sequence from its mirror image. ``kernel='hartley'`` takes
    cos + sin, which is orthogonal and has full rank.

    Args:
        d_model: Width of the tokens.
        kernel: 'cosine', as released, or 'hartley'.
        **wrapper: As in ``MatrixMixer``.
    """

    position_parameters = 'never'

    def __init__(self, d_model: int, *, kernel: str = 'cosine', device=None, dtype=None, **wrapper) -> None:
        if kernel not in ('cosine', 'hartley'):
            raise ValueError(f"kernel={kernel!r}; allowed: 'cosine', 'hartley'")
        super().__init__(d_model, False, device=device, dtype=dtype, **wrapper)
        self.kernel = kernel
        self._build()

    def mix(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():  # the exporter on top of traces has no FFT
            return apply_matrix(self.dense(v, extras, tokens), v)
        spectrum = torch.fft.fft(v.to(accumulation_dtype(v.dtype)), dim=1, norm='ortho')
        y = spectrum.real - spectrum.imag if self.kernel == 'hartley' else spectrum.real
        return y.to(v.dtype)

    def dense(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        L = v.shape[1]
        i = torch.arange(L, device=v.device)
        angle = (i[:, None] * i[None, :] % L).to(accumulation_dtype(v.dtype)) * (2 * math.pi / L)
        M = angle.cos() + angle.sin() if self.kernel == 'hartley' else angle.cos()
        return (M * L**-0.5).expand(1, self.nheads, L, L)

"""Mixers whose entry m_ij compares a query of token i with a key of token j: base class, and the low-rank one."""

from typing import Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from .base import MatrixMixer
from .grid import TokenGrid, amplitude

__all__ = ['LowRank', 'QueryKeyMixer']


class QueryKeyMixer(MatrixMixer):
    """Queries and keys (H, qk_dim per token): columns of the tokens, convolved like v, or parameters (L, H, qk_dim).

    As parameters they are resampled to another grid like position embeddings.

    Args:
        d_model: Width of the tokens.
        qk_dim: Width d of a query; of all heads 16 in the paper's ablation.
        data_dependent: Queries and keys from the tokens, or parameters.
        **wrapper: As in ``MatrixMixer``.
    """

    def __init__(
        self, d_model: int, qk_dim: int = 16, *, data_dependent: bool = True, device=None, dtype=None, **wrapper
    ) -> None:
        super().__init__(d_model, data_dependent, device=device, dtype=dtype, **wrapper)
        if qk_dim < 1:
            raise ValueError(f'qk_dim={qk_dim}; it must be at least 1')
        self.qk_dim = qk_dim
        self._build(2 * self.nheads * qk_dim if data_dependent else 0)
        if not data_dependent:
            shape = (self.tokens.num_tokens, self.nheads, qk_dim)
            self.q = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.k = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters that this module owns itself."""
        if not self.data_dependent:
            nn.init.xavier_normal_(self.q)
            nn.init.xavier_normal_(self.k)

    def grid_parameters(self) -> Tuple[str, ...]:
        return () if self.data_dependent else ('q', 'k')

    def resample(self, name: str, value: Tensor, old: TokenGrid, new: TokenGrid) -> Tensor:
        return old.tokens(value, new)

    def queries_and_keys(self, extras: Tensor, tokens: Optional[TokenGrid]) -> Tuple[Tensor, Tensor]:
        """q, k (B or 1, H, L, qk_dim)."""
        if self.data_dependent:
            q, k = extras.unflatten(-1, (2, self.nheads, self.qk_dim)).unbind(2)
        else:
            q, k = (self._at(name, tokens).unsqueeze(0) for name in ('q', 'k'))
        return q.transpose(1, 2), k.transpose(1, 2)

    def extra_repr(self) -> str:
        return f'qk_dim={self.qk_dim}, {super().extra_repr()}'


class LowRank(QueryKeyMixer):
    """m_ij = q_i . k_j (L d)^-1/2: linear attention without normaliser. Linear in L: k^T v first."""

    def resample(self, name: str, value: Tensor, old: TokenGrid, new: TokenGrid) -> Tensor:
        value = old.tokens(value, new)
        return value * amplitude(old, new) if name == 'k' else value

    def _scale(self, L: int) -> float:
        return (L * self.qk_dim) ** -0.5

    def mix(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        q, k = self.queries_and_keys(extras, tokens)
        k = k * self._scale(v.shape[1])
        if not self.data_dependent:  # one q and k for all images
            state = torch.einsum('hjd,bjhp->bhdp', k[0].to(v.dtype), v)
            return torch.einsum('hid,bhdp->bihp', q[0].to(v.dtype), state)
        state = k.mT @ v.transpose(1, 2)  # (B, H, d, P)
        return (q @ state).transpose(1, 2)

    def dense(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        q, k = self.queries_and_keys(extras, tokens)
        return q @ k.mT * self._scale(v.shape[1])

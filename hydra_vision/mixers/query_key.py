"""Mixers whose entry m_ij compares a query of token i with a key of token j: base class, and the low-rank one."""

from typing import ClassVar, Optional, Tuple, Union

import torch
import torch.nn as nn
from torch import Tensor

from ..ops.reference import accumulation_dtype
from .base import MatrixMixer, Patterns
from .grid import TokenGrid, amplitude

__all__ = ['LowRank', 'QueryKeyMixer']

_CHUNK = 64  # tokens of a chunk in the causal low-rank product


class QueryKeyMixer(MatrixMixer):
    """Queries and keys (H, qk_dim per token): columns of the tokens, convolved like v, or parameters (L, H, qk_dim).

    As parameters they are resampled to another grid like position embeddings. From tokens, keys and values may be those
    of a memory: ``forward(u, memory=...)``; the residual and the gate stay those of u.

    Args:
        d_model: Width of the tokens.
        qk_dim: Width d of a query; of all heads 16 in the paper's ablation.
        data_dependent: Queries and keys from the tokens, or parameters.
        causal: M is lower triangular (ours), with a causal convolution. A scale that depends on the number of tokens
            counts, in row i, those up to i.
        conv: As in ``GatedMixer``; None for 'causal' where the matrix is, else 'centred'.
        **wrapper: As in ``MatrixMixer``.
    """

    patterns: ClassVar[Patterns] = {'noncausal self': {}, 'causal self': {'causal': True}}

    def __init__(
        self,
        d_model: int,
        qk_dim: int = 16,
        *,
        data_dependent: bool = True,
        causal: bool = False,
        conv: Optional[str] = None,
        device=None,
        dtype=None,
        **wrapper,
    ) -> None:
        conv = ('causal' if causal else 'centred') if conv is None else conv
        super().__init__(d_model, data_dependent, conv=conv, device=device, dtype=dtype, **wrapper)
        self.causal = causal
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

    def _scale(self, extras: Tensor, L: int) -> Union[float, Tensor]:
        """(L d)^-1/2; where causal, (i + 1 tokens d)^-1/2 of each row i, (L, 1)."""
        if not self.causal:
            return (L * self.qk_dim) ** -0.5
        counts = torch.arange(1, L + 1, device=extras.device, dtype=accumulation_dtype(extras.dtype)).unsqueeze(1)
        return (counts * self.qk_dim) ** -0.5

    def extra_repr(self) -> str:
        text = f'qk_dim={self.qk_dim}, {super().extra_repr()}'
        return f'{text}, causal=True' if self.causal else text


class LowRank(QueryKeyMixer):
    """m_ij = q_i . k_j (L d)^-1/2: linear attention without normaliser. Linear in L: k^T v first."""

    def resample(self, name: str, value: Tensor, old: TokenGrid, new: TokenGrid) -> Tensor:
        value = old.tokens(value, new)
        return value * amplitude(old, new) if name == 'k' else value

    patterns: ClassVar[Patterns] = {
        **QueryKeyMixer.patterns,
        'noncausal cross': {},
        'causal cross': {'causal': True},
    }

    def mix_memory(self, extras: Tensor, v: Tensor, extras_memory: Tensor) -> Tensor:
        if not self.data_dependent:
            return super().mix_memory(extras, v, extras_memory)
        q, _ = self.queries_and_keys(extras, None)
        _, k = self.queries_and_keys(extras_memory, None)
        state = (k * (v.shape[1] * self.qk_dim) ** -0.5).transpose(-1, -2) @ v.transpose(1, 2)
        return (q @ state).transpose(1, 2)

    def mix(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        q, k = self.queries_and_keys(extras, tokens)
        if self.causal:
            y = _causal_product(*(t.to(v.dtype) for t in (q, k)), v.transpose(1, 2))
            return (y * self._scale(v, v.shape[1])).to(v.dtype).transpose(1, 2)
        k = k * self._scale(v, v.shape[1])
        if not self.data_dependent:  # one q and k for all images
            state = torch.einsum('hjd,bjhp->bhdp', k[0].to(v.dtype), v)
            return torch.einsum('hid,bhdp->bihp', q[0].to(v.dtype), state)
        state = k.transpose(-1, -2) @ v.transpose(1, 2)  # (B, H, d, P)
        return (q @ state).transpose(1, 2)

    def dense(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        q, k = self.queries_and_keys(extras, tokens)
        M = q @ k.transpose(-1, -2) * self._scale(v, v.shape[1])
        return torch.tril(M) if self.causal else M


def _causal_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Lower triangle of q k^T times v, chunk by chunk: linear in L. q, k (B or 1, H, L, d), v (B, H, L, P)."""
    L = v.shape[2]
    Q = min(_CHUNK, L)
    padding = -L % Q
    q, k, v = (torch.nn.functional.pad(t, (0, 0, 0, padding)).unflatten(2, (-1, Q)) for t in (q, k, v))
    states = k.transpose(-1, -2) @ v  # (B, H, chunks, d, P)
    before = states.cumsum(2) - states
    y = torch.tril(q @ k.transpose(-1, -2)) @ v + q @ before
    return y.flatten(2, 3)[:, :, :L]

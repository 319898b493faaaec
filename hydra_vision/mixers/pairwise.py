"""Cauchy and Vandermonde mixers: m_ij is a sum over d of a nonlinear function of token i's query and token j's key.

The (B, H, L, L) matrix is formed, one term of the sum at a time: neither direction of the computation ever holds
(B, H, d, L, L). Queries, keys and the sum are float32 (float64 for float64 input) whatever the dtype of the tokens.
"""

import math
from typing import Optional, Set, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ..ops.reference import accumulation_dtype
from .base import apply_matrix
from .grid import TokenGrid, amplitude
from .query_key import QueryKeyMixer

__all__ = ['Cauchy', 'Vandermonde']


def _columns(x: Tensor) -> Tuple[Tensor, ...]:
    """The d columns (..., L) of x (..., L, d), contiguous: read with stride d, sums of pairs take twice the time."""
    return x.movedim(x.ndim - 1, 0).contiguous().unbind()


def _sum_of_reciprocals(a: Tensor, b: Tensor) -> Tensor:
    """M[..., i, j] = sum_d 1 / (a[..., i, d] + b[..., j, d])."""
    M: Optional[Tensor] = None
    for a_d, b_d in zip(_columns(a), _columns(b)):
        term = (a_d[..., :, None] + b_d[..., None, :]).reciprocal_()
        M = term if M is None else M.add_(term)
    return M


def _sum_of_cosines(frequency: Tensor) -> Tensor:
    """M[..., i, j] = sum_d cos(frequency[..., i, d] * j)."""
    L = frequency.shape[-2]
    j = torch.arange(L, device=frequency.device, dtype=frequency.dtype)
    M: Optional[Tensor] = None
    for d in range(frequency.shape[-1]):
        term = (frequency[..., :, None, d] * j).cos_()
        M = term if M is None else M.add_(term)
    return M


class _SumOfReciprocals(torch.autograd.Function):
    """``_sum_of_reciprocals``, with a gradient that holds one term at a time."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _sum_of_reciprocals(a, b)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        grad_a, grad_b = [], []
        for a_d, b_d in zip(_columns(a), _columns(b)):
            term = (a_d[..., :, None] + b_d[..., None, :]).pow_(-2).mul_(grad)
            grad_a.append(term.sum(-1))
            grad_b.append(term.sum(-2))
        return -torch.stack(grad_a, -1), -torch.stack(grad_b, -1)


class _SumOfCosines(torch.autograd.Function):
    """``_sum_of_cosines``, with a gradient that holds one term at a time."""

    @staticmethod
    def forward(ctx, frequency: Tensor) -> Tensor:
        ctx.save_for_backward(frequency)
        return _sum_of_cosines(frequency)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (frequency,) = ctx.saved_tensors
        j = torch.arange(frequency.shape[-2], device=frequency.device, dtype=frequency.dtype)
        grad = grad * j
        terms = [(frequency[..., :, None, d] * j).sin_().mul_(grad).sum(-1) for d in range(frequency.shape[-1])]
        return -torch.stack(terms, -1)


class _PairwiseMixer(QueryKeyMixer):
    """M is formed; queries and keys have no SiLU."""

    silu_extras = False

    def mix(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        return apply_matrix(self.dense(v, extras, tokens), v)

    def _wide(self, extras: Tensor, tokens: Optional[TokenGrid]) -> Tuple[Tensor, Tensor]:
        q, k = self.queries_and_keys(extras, tokens)
        acc = accumulation_dtype(q.dtype)
        return q.to(acc), k.to(acc)


class Cauchy(_PairwiseMixer):
    """m_ij = (L d)^-1/2 sum_d 1 / (exp(q_id) + exp(k_jd) + 2c + 1e-8); c learned from 0.5, or 0 where data-independent.

    A learned c below zero counts as zero: the denominator stays positive.
    """

    def __init__(
        self, d_model: int, qk_dim: int = 16, *, data_dependent: bool = True, device=None, dtype=None, **kwargs
    ) -> None:
        super().__init__(d_model, qk_dim, data_dependent=data_dependent, device=device, dtype=dtype, **kwargs)
        if data_dependent:
            self.c = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, 'c'):
            nn.init.constant_(self.c, 0.5)

    def no_weight_decay(self) -> Set[str]:
        return super().no_weight_decay() | ({'c'} if self.data_dependent else set())

    def resample(self, name: str, value: Tensor, old: TokenGrid, new: TokenGrid) -> Tensor:
        # 1 / (e^(q - log s) + e^(k - log s)) = s / (e^q + e^k)
        return old.tokens(value, new) - math.log(amplitude(old, new))

    def dense(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        a, b = (t.exp() for t in self._wide(extras, tokens))
        if self.data_dependent:
            a = a + 2 * self.c.to(a.dtype).clamp(min=0)
        M = _sum_of_reciprocals if torch.jit.is_tracing() else _SumOfReciprocals.apply  # a trace could not be saved
        M = M(a + 1e-8, b) * self._scale(v, v.shape[1])
        return torch.tril(M) if self.causal else M


class Vandermonde(_PairwiseMixer):
    """m_ij = (2 L d)^-1/2 sum_d [cos(2 pi eps q_id j) - cos(2 pi eps k_jd i)], eps = 1e-3.

    Data-independent: the same entry with parameters q and k, drawn from a standard normal distribution, as the columns
    of tokens are at first. The released data-independent module mixes nothing and its gradient is zero; this one is the
    definition. It cannot be resampled to another grid: its powers count tokens along the sequence.
    """

    eps = 1e-3

    def reset_parameters(self) -> None:
        if not self.data_dependent:
            nn.init.normal_(self.q)
            nn.init.normal_(self.k)

    def resample(self, name: str, value: Tensor, old: TokenGrid, new: TokenGrid) -> Tensor:
        if old.size != new.size:
            raise ValueError(
                f'Vandermonde: parameters for {old} cannot be resampled to {new}; data_dependent=True takes any size'
            )
        return value

    def dense(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        q, k = (2 * math.pi * self.eps * t for t in self._wide(extras, tokens))
        total = _sum_of_cosines if torch.jit.is_tracing() else _SumOfCosines.apply  # a trace could not be saved
        M = total(q) - total(k).transpose(-1, -2)
        M = M * (self._scale(v, v.shape[1]) * 2**-0.5)
        return torch.tril(M) if self.causal else M

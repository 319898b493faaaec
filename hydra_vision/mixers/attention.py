"""Attention as a matrix mixer, and timm's own attention as the control."""

from typing import ClassVar, Dict, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Attention as TimmAttention
from torch import Tensor

from ..ops.reference import accumulation_dtype
from .base import PATTERNS, Mixer, Patterns, apply_matrix
from .grid import TokenGrid
from .monarch import MonarchLinear
from .query_key import QueryKeyMixer

__all__ = ['Attention', 'VitAttention']


class Attention(QueryKeyMixer):
    """m_ij = softmax_j(q_i . k_j d^-1/2), by ``scaled_dot_product_attention``.

    Data-independent: softmax over parameters, one matrix for all images. ``causal`` and ``memory`` as in
    ``QueryKeyMixer``.

    Args:
        d_model: Width of the tokens.
        qk_dim: Width d of a query; None for headdim, which flash kernels need (the paper's ablation has 16).
        data_dependent: Queries and keys from the tokens, or parameters.
        headdim: As in ``MatrixMixer``.
        **wrapper: As in ``QueryKeyMixer``.
    """

    silu_extras = False
    maskable = True
    patterns: ClassVar[Patterns] = {
        **QueryKeyMixer.patterns,
        'noncausal cross': {},
        'causal cross': {'causal': True},
    }

    def __init__(
        self,
        d_model: int,
        qk_dim: Optional[int] = None,
        *,
        data_dependent: bool = True,
        headdim: int = 64,
        device=None,
        dtype=None,
        **wrapper,
    ) -> None:
        super().__init__(
            d_model,
            headdim if qk_dim is None else qk_dim,
            data_dependent=data_dependent,
            headdim=headdim,
            device=device,
            dtype=dtype,
            **wrapper,
        )

    def mix(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid], valid: Optional[Tensor] = None) -> Tensor:
        if self.data_dependent:
            q, k = self.queries_and_keys(extras, tokens)
            keys = None if valid is None or self.causal else valid[:, None, None]  # causal: padding comes last
            y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), keys, is_causal=self.causal)
            return y.transpose(1, 2)
        return apply_matrix(self.dense(v, extras, tokens), v)

    def dense(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        return _softmax_scores(*self.queries_and_keys(extras, tokens), self.causal)

    def mix_memory(self, extras: Tensor, v: Tensor, extras_memory: Tensor) -> Tensor:
        if not self.data_dependent:
            return super().mix_memory(extras, v, extras_memory)
        q, _ = self.queries_and_keys(extras, None)
        _, k = self.queries_and_keys(extras_memory, None)
        return F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2)


class VitAttention(Mixer, TimmAttention):
    """timm's ``Attention`` with a ``matrix``: what a ViT block has, for comparison. No convolution, no gate.

    In a model with ``mlp_ratio=4`` and ``pos_embed='learn'`` the block is timm's ViT block. ``forward`` is timm's: its
    ``is_causal`` and ``attn_mask`` are there; ``cross`` attends to a memory.

    Args:
        d_model: Width of the tokens.
        num_heads: Heads; None for ``d_model / headdim``.
        headdim: Width per head.
        qkv_bias: Bias of the first projection, as in ViT.
        proj_bias: Bias of the last projection.
        projection: 'dense', or 'monarch' for projections of two block-diagonal factors (``MonarchLinear``).
        blocks: Of each factor.

    Raises:
        ValueError: Without ``num_heads``, a ``headdim`` that does not divide ``d_model``; another ``projection``.
    """

    scriptable = True
    patterns: ClassVar[Patterns] = {pattern: {} for pattern in PATTERNS}

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: Optional[int] = None,
        headdim: int = 64,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        projection: str = 'dense',
        blocks: int = 4,
        device=None,
        dtype=None,
    ) -> None:
        if headdim < 1 or (num_heads is None and d_model % headdim):
            raise ValueError(f'headdim={headdim} does not divide d_model={d_model}; give num_heads')
        if projection not in ('dense', 'monarch'):
            raise ValueError(f"projection={projection!r}; allowed: 'dense', 'monarch'")
        num_heads = d_model // headdim if num_heads is None else num_heads
        if num_heads < 1:
            raise ValueError(f'num_heads={num_heads}; it must be at least 1')
        super().__init__(
            d_model,
            num_heads=num_heads,
            attn_head_dim=headdim,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            device=device,
            dtype=dtype,
        )
        self.d_model, self.nheads, self.headdim = d_model, num_heads, headdim
        if projection == 'monarch':
            width, dd = num_heads * headdim, {'device': device, 'dtype': dtype}
            self.qkv = Concatenated(MonarchLinear(d_model, width, blocks, bias=qkv_bias, **dd) for _ in range(3))
            self.proj = MonarchLinear(width, d_model, blocks, bias=proj_bias, **dd)
            self.scriptable = False

    @torch.jit.ignore
    def why_no_padding(self) -> Optional[str]:
        return None

    @torch.jit.ignore
    def padding_arguments(self, valid: Tensor) -> Dict[str, Tensor]:
        return {'attn_mask': valid[:, None, None]}

    @torch.jit.ignore
    def why_no_packing(self) -> Optional[str]:
        return None

    @torch.jit.ignore
    def packing_arguments(self, cu_seqlens: Tensor) -> Dict[str, Tensor]:
        segments = torch.repeat_interleave(cu_seqlens.diff())
        return {'attn_mask': (segments[:, None] == segments)[None, None]}

    @torch.jit.ignore
    def cross(self, u: Tensor, memory: Tensor) -> Tensor:
        """Attention of the tokens u (B, L, d_model) to a memory (B, any length, d_model), with the same parameters."""
        q = self.qkv(u).unflatten(-1, (3, self.num_heads, -1))[:, :, 0].transpose(1, 2)
        k, v = self.qkv(memory).unflatten(-1, (3, self.num_heads, -1))[:, :, 1:].permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    @torch.jit.ignore
    def matrix(self, u: Tensor) -> Tensor:
        """softmax(q k^T) (B, H, L, L) that this module applies to its v. float32, for float64 input float64."""
        qkv = self.qkv(u).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return _softmax_scores(q, k)


class Concatenated(nn.ModuleList):
    """The outputs of its modules for one input, side by side."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features)."""
        return torch.cat([module(x) for module in self], dim=-1)


def _softmax_scores(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    acc = accumulation_dtype(q.dtype)
    scores = q.to(acc) @ k.to(acc).transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, float('-inf'))
    return scores.softmax(-1, dtype=acc)  # autocast narrows products

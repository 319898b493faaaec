"""MonarchAttention: softmax attention projected on the Monarch matrices, without training, in O(L sqrt(L) P).

Yaras, Xu, Abillama, Lee, Balzano, "MonarchAttention: Zero-Shot Conversion to Fast, Hardware-Aware Structured
Attention", NeurIPS 2025, https://arxiv.org/abs/2505.18698. The problem is the paper's; the updates below are derived
from it here and were not compared with the paper's code.

A row of softmax(S) is the distribution a that maximises <a, S> + H(a), H being the entropy. With L = m b, query (l, j)
and key (k, i) for block and place in it, the distributions are restricted to

    M[(l, j), (k, i)] = L[j, l, k] R[k, j, i]      sum_k L[j, l, k] = sum_i R[k, j, i] = 1

and the sum of all rows' objectives is maximised in R and L in turns, each in closed form:

    R[k, j, :] = softmax_i( sum_l L[j, l, k] S[(l, j), (k, i)] / sum_l L[j, l, k] )
    L[j, l, :] = softmax_k( sum_i R[k, j, i] S[(l, j), (k, i)] + H(R[k, j, :]) )

from L[j] = identity on. S = Q K^T is not needed: both sums are of queries, or of keys, first. Prefix tokens are ours:
as keys, each is a block of its own, as queries they are dense.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import accumulation_dtype

__all__ = ['monarch_attention', 'monarch_attention_matrix']


def monarch_attention(
    q: Tensor, k: Tensor, v: Tensor, block: int, steps: int = 1, num_prefix_tokens: int = 0
) -> Tensor:
    """Attention with weights M in place of softmax(q k^T / sqrt(P)).

    Args:
        q: (B, H, L, P), prefix tokens first.
        k: (B, H, L, P).
        v: (B, H, L, P).
        block: b, of the tokens behind the prefix; the last block may be shorter.
        steps: How often R and L are updated.
        num_prefix_tokens: Tokens at the start that are dense.

    Returns:
        (B, H, L, P), dtype of v.
    """
    n = num_prefix_tokens
    patches = q.shape[2] - n
    dense = F.scaled_dot_product_attention(q[:, :, :n], k, v)
    if patches == 0:
        return dense
    blocks_of_v = _blocks(v[:, :, n:], block)
    L, R = _factors(q, k, block, steps, n)
    y = torch.einsum('bhjlk,bhkjp->bhljp', L[..., : R.shape[2]].to(v.dtype), R.to(v.dtype) @ blocks_of_v)
    if n:
        y = y + torch.einsum('bhjln,bhnp->bhljp', L[..., R.shape[2] :].to(v.dtype), v[:, :, :n])
    return torch.cat([dense, y.flatten(2, 3)[:, :, :patches]], 2)


def monarch_attention_matrix(q: Tensor, k: Tensor, block: int, steps: int = 1, num_prefix_tokens: int = 0) -> Tensor:
    """The weights (B, H, L, L) that ``monarch_attention`` applies, for tests and pictures."""
    eye = torch.eye(q.shape[2], dtype=q.dtype, device=q.device).expand(*q.shape[:3], -1)
    return monarch_attention(q, k, eye, block, steps, num_prefix_tokens)


def _blocks(t: Tensor, block: int) -> Tensor:
    """(B, H, L, P) -> (B, H, m, b, P), zeros behind the last token."""
    return F.pad(t, (0, 0, 0, -t.shape[2] % block)).unflatten(2, (-1, block))


def _factors(q: Tensor, k: Tensor, block: int, steps: int, n: int) -> tuple[Tensor, Tensor]:
    """L (B, H, b, m, m + n), the prefix keys last, and R (B, H, m, b, b)."""
    acc, patches = accumulation_dtype(q.dtype), q.shape[2] - n
    q = q.to(acc) * q.shape[-1] ** -0.5
    prefix, k = k[:, :, :n].to(acc), _blocks(k[:, :, n:].to(acc), block)
    q = _blocks(q[:, :, n:], block)
    m = q.shape[2]
    there = (torch.arange(m * block, device=q.device) < patches).view(m, block)
    L = torch.eye(m, dtype=acc, device=q.device).expand(*q.shape[:2], block, m, m)
    to_prefix = torch.einsum('bhljp,bhnp->bhjln', q, prefix)
    for _ in range(steps):
        own = L[..., :m] * there.T.unsqueeze(-1)  # queries behind the last one have no say
        total = own.sum(-2).transpose(-1, -2).unsqueeze(-1)  # (B, H, m, b, 1)
        asked = torch.einsum('bhjlk,bhljp->bhkjp', own, q) / total.clamp(min=torch.finfo(acc).tiny)
        R = (asked @ k.mT).masked_fill(~there.unsqueeze(1), float('-inf')).softmax(-1)
        entropy = torch.special.entr(R).sum(-1)  # (B, H, m, b)
        scores = torch.einsum('bhljp,bhkjp->bhjlk', q, R @ k) + entropy.transpose(-1, -2).unsqueeze(-2)
        L = torch.cat([scores, to_prefix], -1).softmax(-1)
    return L, R

"""SCOUT: softmax attention to checkpoints, one per segment of the sequence, on tokens that a linear mixer has enriched.

Paper: Jafari, Fan, Jamialahmadi, Farinneya, Chen, Tahaei, "SCOUT", 2025, https://arxiv.org/abs/2509.00935, and its code
ArefJafari/SCOUT, both for language: causal, one checkpoint after every ``segment`` tokens. Everything that is about
images is ours, not the paper's: attention in both directions, means of segments as checkpoints, segments on the patch
grid, their default size, class tokens as checkpoints. A layer of the paper is two blocks with an MLP each, the second
of which has ``CheckpointAttention``: ``mixer=('hydra', 'checkpoint')``. ``Scout``, the two in one mixer, is ours.
"""

from typing import Any, ClassVar, Mapping, Optional, Set, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..ops.dispatch import is_exporting
from ..ops.reference import accumulation_dtype
from .base import Mixer, Patterns, check_arguments, check_sizes, keyword_arguments, rms_norm
from .grid import GridSize, TokenGrid
from .hydra import Hydra
from .mamba import Mamba, Vim
from .semiseparable import Semiseparable

__all__ = ['CheckpointAttention', 'Scout']

CHECKPOINTS = ('mean', 'last')
LINEAR_MIXERS = {'hydra': Hydra, 'mamba': Mamba, 'semiseparable': Semiseparable, 'vim': Vim}


class RMSNorm(nn.RMSNorm):
    """PyTorch's, in operators that every exporter knows."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class CheckpointAttention(Mixer):
    """Exact softmax attention of each token i to itself and to the checkpoints C, one softmax over both.

        y_i = sum_{j in {i} + C} softmax_j(q_i . k_j headdim^-1/2) v_j

    A segment's checkpoint is its last token, or the mean of its keys and of its values. Prefix tokens are checkpoints
    themselves and stand in no segment. Tokens behind the last whole segment of ``segment`` tokens have no checkpoint; a
    segment on the grid is smaller at its edge. A sequence shorter than a segment has none: y = v.

    L S scores for S checkpoints. Where a fused attention returns its log-sum-exp (on the CPU, and on CUDA in half
    precision), the token itself is merged into its result exactly and the scores are never held; elsewhere, and where
    causal, they are.

    Args:
        d_model: Width of the tokens.
        headdim: Width of a head; divides ``d_model``.
        checkpoint: 'mean' of a segment (ours), or its 'last' token, as released.
        segment: Tokens per segment, as released; (r, r) patches of the grid (ours; needs ``grid_size``); or 'sqrt'
            (ours) for the integer nearest to the square root of the number of patches: O(L^1.5).
        causal: Token i sees only checkpoints of segments that end before it, as released.
        qkv_bias: Bias of the first projection.
        proj_bias: Bias of the last projection.
        grid_size: (H, W) patches, with ``segment=(r, r)`` only; at another size ``forward`` is given the grid.
        num_prefix_tokens: Class and register tokens.
        prefix_position: Where they stand: 'first', 'middle' or 'last'.

    Raises:
        ValueError: A value that is not allowed; a ``grid_size`` that is missing or has no use.
    """

    patterns: ClassVar[Patterns] = {'noncausal self': {}, 'causal self': {'causal': True}}

    def __init__(
        self,
        d_model: int,
        *,
        headdim: int = 64,
        checkpoint: str = 'mean',
        segment: Union[int, str, Tuple[int, int]] = 'sqrt',
        causal: bool = False,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        grid_size: Optional[GridSize] = None,
        num_prefix_tokens: int = 0,
        prefix_position: str = 'first',
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, headdim=headdim)
        if d_model % headdim:
            raise ValueError(f'headdim={headdim} does not divide d_model={d_model}')
        if checkpoint not in CHECKPOINTS:
            raise ValueError(f'checkpoint={checkpoint!r}; allowed: {", ".join(map(repr, CHECKPOINTS))}')
        self.segment = _checked_segment(segment)
        self.takes_grid = self.needs_row_order = isinstance(self.segment, tuple)
        if self.takes_grid != (grid_size is not None):
            problem = 'needs grid_size=(H, W)' if self.takes_grid else 'has no use for it'
            raise ValueError(f'grid_size={grid_size}: segment={segment!r} {problem}')
        self.d_model, self.headdim, self.nheads = d_model, headdim, d_model // headdim
        self.checkpoint, self.causal = checkpoint, causal
        self.tokens = TokenGrid(1 if grid_size is None else grid_size, num_prefix_tokens, prefix_position)
        dd = {'device': device, 'dtype': dtype}
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=qkv_bias, **dd)
        self.proj = nn.Linear(d_model, d_model, bias=proj_bias, **dd)

    @classmethod
    def layout_arguments(cls, kwargs: Mapping[str, Any]) -> Tuple[str, ...]:
        on_grid = isinstance(kwargs.get('segment'), (list, tuple))
        return (('grid_size',) if on_grid else ()) + ('num_prefix_tokens', 'prefix_position')

    def forward(self, u: Tensor, grid: Optional[Tuple[int, int]] = None) -> Tensor:
        """Mix the tokens.

        Args:
            u: Tokens (B, L, d_model).
            grid: (H, W) of the patches where they are not those of ``grid_size``.

        Returns:
            (B, L, d_model).

        Raises:
            ValueError: L or ``grid`` does not fit.
        """
        tokens = self._tokens_of(u.shape[1], grid)
        q, k, v = self._heads(u)
        k_c, v_c = self._checkpoints(k, tokens), self._checkpoints(v, tokens)
        if k_c.shape[2] == 0:
            y = v
        elif not self.causal and _fused_runs(q):
            y = _MergedAttention.apply(q, k, v, k_c.contiguous(), v_c.contiguous(), self._own_rows(u, tokens))
        else:
            weights = self._weights(q, k, k_c, self._mask(u, tokens), self._own_rows(u, tokens)).to(v.dtype)
            y = weights[..., :1] * v + weights[..., 1:] @ v_c
        return self.proj(y.transpose(1, 2).flatten(2))

    @torch.jit.ignore
    def matrix(self, u: Tensor, grid: Optional[Tuple[int, int]] = None) -> Tensor:
        """The weights (B, H, L, L) that this module applies to its v, for tests and pictures: O(L^2) memory.

        A column is zero where its token belongs to no checkpoint, but for the diagonal; the weight of a mean is spread
        over its segment. float32, for float64 input float64.
        """
        tokens = self._tokens_of(u.shape[1], grid)
        q, k, _ = self._heads(u)
        acc = accumulation_dtype(q.dtype)
        members = self._checkpoints(torch.eye(u.shape[1], dtype=acc, device=u.device).expand(1, 1, -1, -1), tokens)
        k_c = self._checkpoints(k, tokens)
        weights = self._weights(q, k, k_c, self._mask(u, tokens), self._own_rows(u, tokens))
        with torch.autocast(u.device.type, enabled=False):
            return torch.diag_embed(weights[..., 0]) + weights[..., 1:] @ members

    def _heads(self, u: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, L, P)."""
        return self.qkv(u).unflatten(-1, (3, self.nheads, self.headdim)).permute(2, 0, 3, 1, 4).unbind(0)

    def _tokens_of(self, L: int, grid: Optional[Tuple[int, int]]) -> TokenGrid:
        """The tokens of this input."""
        if not self.takes_grid:
            if grid is not None:
                raise ValueError(f'{type(self).__name__}: grid={grid}; segment={self.segment!r} has no use for a grid')
            if self.tokens.num_prefix_tokens >= L:
                raise ValueError(
                    f'{type(self).__name__}: L={L} tokens; it must be more than '
                    f'num_prefix_tokens={self.tokens.num_prefix_tokens}'
                )
            return self.tokens.resized((1, L - self.tokens.num_prefix_tokens))
        tokens = self.tokens if grid is None else self.tokens.resized(grid)
        if tokens.num_tokens != L:
            raise ValueError(f'{type(self).__name__}: L={L} tokens; {tokens} are {tokens.num_tokens}')
        return tokens

    def _segment_length(self, tokens: TokenGrid) -> int:
        return max(1, round(tokens.num_patches**0.5)) if self.segment == 'sqrt' else self.segment

    def _checkpoints(self, t: Tensor, tokens: TokenGrid) -> Tensor:
        """t (B, H, L, P) at the checkpoints: prefix tokens, then segments. (B, H, S, P)."""
        start = tokens.prefix_start
        end = start + tokens.num_prefix_tokens
        if self.checkpoint == 'last':
            found = t.index_select(2, self._last_tokens(t, tokens))
        else:
            patches = torch.cat([t[:, :, :start], t[:, :, end:]], dim=2) if end > start else t
            if self.takes_grid:
                maps = patches.unflatten(2, tokens.size).flatten(0, 1).movedim(3, 1)  # (B H, P, rows, columns)
                maps = F.avg_pool2d(maps, self.segment, ceil_mode=True, count_include_pad=False)
                heads = int(t.shape[1])  # a number for a trace; ``matrix`` has one head
                found = maps.flatten(2).transpose(-1, -2).unflatten(0, (-1, heads))
            else:
                s = self._segment_length(tokens)
                S = tokens.num_patches // s
                found = patches[:, :, : S * s].unflatten(2, (S, s)).mean(3) if S else patches[:, :, :0]
        return torch.cat([t[:, :, start:end], found], dim=2) if end > start else found

    def _last_tokens(self, t: Tensor, tokens: TokenGrid) -> Tensor:
        """(segments,) Index in the sequence of the last token of each segment."""
        if self.takes_grid:
            (H, W), (r, c) = tokens.size, self.segment
            rows = torch.arange(r - 1, H + r - 1, r, device=t.device).clamp(max=H - 1)
            columns = torch.arange(c - 1, W + c - 1, c, device=t.device).clamp(max=W - 1)
            index = (rows.unsqueeze(1) * W + columns).flatten()
        else:
            s = self._segment_length(tokens)
            index = torch.arange(tokens.num_patches // s, device=t.device) * s + (s - 1)
        return index + tokens.num_prefix_tokens * (index >= tokens.prefix_start)

    def _prefix(self, t: Tensor, tokens: TokenGrid) -> Tensor:
        return torch.arange(tokens.num_prefix_tokens, device=t.device) + tokens.prefix_start

    def _own_rows(self, t: Tensor, tokens: TokenGrid) -> Tensor:
        """(L,) Whether a token is a checkpoint that it sees: it must not count itself twice."""
        if self.causal:  # a token sees earlier checkpoints only
            return torch.zeros(tokens.num_tokens, dtype=torch.bool, device=t.device)
        if self.checkpoint == 'last':
            own = torch.zeros(tokens.num_tokens, dtype=torch.bool, device=t.device)
            return own.index_fill(0, torch.cat([self._prefix(t, tokens), self._last_tokens(t, tokens)]), 1)
        if self.takes_grid:  # the mean of a segment of one token is that token
            (rows, columns), (r, c) = tokens.size, self.segment
            y, x = torch.arange(rows, device=t.device), torch.arange(columns, device=t.device)
            alone_y = y // r * r == rows - 1 if r > 1 else y >= 0  # a segment that begins in the last row
            alone_x = x // c * c == columns - 1 if c > 1 else x >= 0
            own = (alone_y.unsqueeze(1) & alone_x).flatten()
        else:
            fill = torch.ones if self._segment_length(tokens) == 1 else torch.zeros
            own = fill(tokens.num_patches, dtype=torch.bool, device=t.device)
        start, prefix = tokens.prefix_start, self._prefix(t, tokens) >= 0
        return torch.cat([own[:start], prefix, own[start:]])

    def _mask(self, t: Tensor, tokens: TokenGrid) -> Optional[Tensor]:
        """(L, S) Whether token i sees checkpoint m; None where it sees all of them."""
        if not self.causal:
            return None
        ends = torch.cat([self._prefix(t, tokens), self._last_tokens(t, tokens)])
        return torch.arange(tokens.num_tokens, device=t.device).unsqueeze(1) > ends

    def _weights(self, q: Tensor, k: Tensor, k_c: Tensor, mask: Optional[Tensor], own: Tensor) -> Tensor:
        """(B, H, L, 1 + S) Softmax over the token itself and the checkpoints, in float32 or wider."""
        acc = accumulation_dtype(q.dtype)
        q, k, k_c = (t.to(acc) for t in (q, k, k_c))
        scores = (q @ k_c.transpose(-1, -2)).to(acc)
        if mask is not None:
            scores = scores.masked_fill(~mask, float('-inf'))
        itself = (q * k).sum(-1).masked_fill(own, float('-inf'))
        scores = torch.cat([itself.unsqueeze(-1), scores], dim=-1) * self.headdim**-0.5
        return scores.softmax(-1, dtype=acc)

    def extra_repr(self) -> str:
        text = f'headdim={self.headdim}, nheads={self.nheads}, checkpoint={self.checkpoint!r}, segment={self.segment!r}'
        return f'{text}, causal=True' if self.causal else text


class Scout(Mixer):
    """A linear mixer, and checkpoint attention on what it has enriched, as one mixer (ours: the paper has two blocks).

        a = linear(u)
        y = a + CheckpointAttention(RMSNorm(u + a))

    The paper's residual carries the block's own input into the second norm; here u is that input after the block's
    norm.

    Args:
        d_model: Width of the tokens.
        linear: Mixer that enriches the tokens: 'hydra', 'semiseparable', 'mamba' or 'vim'.
        linear_kwargs: Its arguments but for ``expand`` and ``headdim``.
        expand: Of the linear mixer.
        headdim: Width of a head, of the attention and, where it has heads, of the linear mixer.
        checkpoint: As in ``CheckpointAttention``.
        segment: As in ``CheckpointAttention``.
        grid_size: As in ``CheckpointAttention``.
        num_prefix_tokens: As in ``CheckpointAttention``.
        prefix_position: As in ``CheckpointAttention``.

    Raises:
        ValueError: A value that is not allowed.
        TypeError: A key of ``linear_kwargs`` that the linear mixer does not take.
    """

    def __init__(
        self,
        d_model: int,
        *,
        linear: str = 'hydra',
        linear_kwargs: Optional[Mapping[str, Any]] = None,
        expand: float = 2,
        headdim: int = 64,
        checkpoint: str = 'mean',
        segment: Union[int, str, Tuple[int, int]] = 'sqrt',
        grid_size: Optional[GridSize] = None,
        num_prefix_tokens: int = 0,
        prefix_position: str = 'first',
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if linear not in LINEAR_MIXERS:
            raise ValueError(f'linear={linear!r}; allowed: {", ".join(map(repr, LINEAR_MIXERS))}')
        if not isinstance(linear_kwargs, (Mapping, type(None))):
            raise TypeError(f'linear_kwargs={linear_kwargs!r}; it must be a dict')
        cls, given = LINEAR_MIXERS[linear], dict(linear_kwargs or {})
        check_arguments(f'linear={linear!r}', cls, given)
        for name in ('expand', 'headdim'):
            if name in given:
                raise ValueError(f'linear_kwargs has {name}={given[name]}; it is an argument of its own')
        dd = {'device': device, 'dtype': dtype}
        self.d_model = d_model
        if 'headdim' in keyword_arguments(cls):
            given['headdim'] = headdim
        self.linear = cls(d_model, expand=expand, **given, **dd)
        if self.linear.takes_grid:
            raise ValueError(f'linear_kwargs={linear_kwargs!r}: the linear mixer must depend on the data')
        self.norm = RMSNorm(d_model, eps=1e-6, **dd)
        self.attention = CheckpointAttention(
            d_model,
            headdim=headdim,
            checkpoint=checkpoint,
            segment=segment,
            grid_size=grid_size,
            num_prefix_tokens=num_prefix_tokens,
            prefix_position=prefix_position,
            **dd,
        )
        self.takes_grid, self.needs_row_order = self.attention.takes_grid, self.attention.needs_row_order

    @classmethod
    def layout_arguments(cls, kwargs: Mapping[str, Any]) -> Tuple[str, ...]:
        return CheckpointAttention.layout_arguments(kwargs)

    @property
    def tokens(self) -> TokenGrid:
        return self.attention.tokens

    def set_input_size(self, grid_size: GridSize) -> None:
        self.attention.set_input_size(grid_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return {f'linear.{name}' for name in self.linear.no_weight_decay()}

    def forward(self, u: Tensor, grid: Optional[Tuple[int, int]] = None) -> Tensor:
        """Mix the tokens u (B, L, d_model). Arguments and errors as in ``CheckpointAttention``."""
        a = self.linear(u)
        return a + self.attention(self.norm(u + a), grid)

    @torch.jit.ignore
    def matrix(self, u: Tensor, grid: Optional[Tuple[int, int]] = None) -> Tensor:
        """The attention's weights (B, H, L, L): the composition is not one matrix."""
        return self.attention.matrix(self.norm(u + self.linear(u)), grid)


def _checked_segment(segment: Any) -> Union[int, str, Tuple[int, int]]:
    if segment == 'sqrt' or (isinstance(segment, int) and not isinstance(segment, bool) and segment >= 1):
        return segment
    if isinstance(segment, (list, tuple)) and len(segment) == 2 and all(isinstance(n, int) and n >= 1 for n in segment):
        return tuple(segment)
    raise ValueError(f"segment={segment!r}; allowed: a number of tokens, (r, r) patches, each at least 1, or 'sqrt'")


def _fused_runs(q: Tensor) -> bool:
    """Whether a fused attention that returns its log-sum-exp runs on q here."""
    if torch.jit.is_tracing() or is_exporting():
        return False
    if q.device.type == 'cpu':
        return True
    if q.device.type != 'cuda' or torch.version.hip is not None or not torch.backends.cuda.flash_sdp_enabled():
        return False
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0)


class _MergedAttention(torch.autograd.Function):
    """Attention of q to k_c and, in the same softmax, of each token to its own k.

    Forward: with the log-sum-exp l of the scores of k_c, the token's own score z and total = log(exp l + exp z), the
    result is exp(l - total) times the attention to k_c plus exp(z - total) v. Backward: attention's own backward pass
    recomputes its weights as exp(score - log-sum-exp), so that given the result and the total of the whole softmax it
    returns the gradients of this part of it.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, k_c: Tensor, v_c: Tensor, own: Tensor) -> Tensor:
        attended, lse, rng = _attention(q, k_c, v_c)
        itself = _own_scores(q, k, own)
        total = torch.logaddexp(lse, itself)
        y = torch.exp(itself - total).unsqueeze(-1) * v + torch.exp(lse - total).unsqueeze(-1) * attended
        y = y.to(v.dtype)
        ctx.save_for_backward(q, k, v, k_c, v_c, own, y, total, *rng)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        q, k, v, k_c, v_c, own, y, total, *rng = ctx.saved_tensors
        grad = grad.contiguous()
        grad_q, grad_k_c, grad_v_c = _attention_backward(grad, q, k_c, v_c, y, total, rng)
        weight = torch.exp(_own_scores(q, k, own) - total).unsqueeze(-1)
        wide = grad.to(total.dtype)
        slope = weight * (wide * (v.to(total.dtype) - y.to(total.dtype))).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
        grad_q = (grad_q + slope * k).to(q.dtype)
        return grad_q, (slope * q).to(k.dtype), (weight * wide).to(v.dtype), grad_k_c, grad_v_c, None


def _own_scores(q: Tensor, k: Tensor, own: Tensor) -> Tensor:
    """(B, H, L) Score of each token with itself; -inf where it is a checkpoint, which has it already."""
    acc = accumulation_dtype(q.dtype)
    return ((q.to(acc) * k.to(acc)).sum(-1) * q.shape[-1] ** -0.5).masked_fill(own, float('-inf'))


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tuple[Tensor, Tensor, Tuple[Tensor, ...]]:
    """Attention, its log-sum-exp (B, H, L), and the random state that its backward asks for."""
    if q.device.type == 'cpu':
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return y, lse, ()
    y, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return y, lse, (seed, offset)


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, rng: Tuple[Tensor, ...]
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, of a softmax that has them among others: result y and log-sum-exp are those of all."""
    if q.device.type == 'cpu':
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, y, lse, 0.0, False)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, y, lse, None, None, q.shape[2], k.shape[2], 0.0, False, *rng
    )

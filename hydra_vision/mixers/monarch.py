"""Monarch matrices over the patch grid, and Monarch Mixer: its gated long convolution and its block-diagonal MLP.

Paper: Fu et al., "Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture", NeurIPS 2023,
https://arxiv.org/abs/2310.12109; Dao et al., "Monarch", ICML 2022, https://arxiv.org/abs/2204.00595.
"""

import math
from typing import Callable, Optional, Set, Tuple

import torch
import torch.nn as nn
from timm.layers import trunc_normal_
from torch import Tensor

from ..ops.reference import accumulation_dtype
from .base import MatrixMixer, check_sizes, convolved
from .grid import TokenGrid, resample_axis
from .toeplitz import toeplitz_matrix, toeplitz_product

__all__ = ['BlockDiagonalLinear', 'LongConv', 'Monarch', 'MonarchLinear', 'StructuredMlp']


class Monarch(MatrixMixer):
    """Two block-diagonal factors with a permutation between them: M = P^T C P R, at 14 x 14 tokens 14 blocks each.

    R mixes within each row of the (H, W) grid by that row's own (W, W) block, P reorders the tokens column by column, C
    mixes within each column by that column's own (H, H) block:

        m_(a,b),(c,e) = columns[b, a, c] * rows[c, b, e]          token i = a W + b, token j = c W + e

    L (H + W) parameters per head, computed as two batched products. At another grid each axis of a factor is resampled.
    There is no place for class tokens on the grid. A number of tokens instead of a grid is one row: a dense matrix.

    Args:
        d_model: Width of the tokens.
        **wrapper: As in ``MatrixMixer``; ``grid_size`` is needed.
    """

    position_parameters = 'always'

    def __init__(self, d_model: int, *, device=None, dtype=None, **wrapper) -> None:
        super().__init__(d_model, False, device=device, dtype=dtype, **wrapper)
        if self.tokens.num_prefix_tokens:
            raise ValueError(
                f'num_prefix_tokens={self.tokens.num_prefix_tokens}: a Monarch matrix mixes the (H, W) grid of '
                'patches and has no place for other tokens'
            )
        self._build()
        H, W = self.tokens.size
        self.rows = nn.Parameter(torch.empty(self.nheads, H, W, W, device=device, dtype=dtype))
        self.columns = nn.Parameter(torch.empty(self.nheads, W, H, H, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters that this module owns itself: each factor keeps the variance of its input."""
        for factor in (self.rows, self.columns):
            nn.init.normal_(factor, std=factor.shape[-1] ** -0.5)

    def grid_parameters(self) -> Tuple[str, ...]:
        return ('rows', 'columns')

    def resample(self, name: str, value: Tensor, old: TokenGrid, new: TokenGrid) -> Tensor:
        (H, W), (oldH, oldW) = new.size, old.size
        block, blocks, ratio = (W, H, oldW / W) if name == 'rows' else (H, W, oldH / H)
        for dim, size in ((1, blocks), (2, block), (3, block)):
            value = resample_axis(value, size, dim)
        return value if ratio == 1.0 else value * ratio

    def old_tokens(self, name: str, value: Tensor) -> Optional[TokenGrid]:
        blocks, block = value.shape[1:3]
        return self.tokens.resized((blocks, block) if name == 'rows' else (block, blocks))

    def mix(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        rows, columns = (self._at(name, tokens).to(v.dtype) for name in ('rows', 'columns'))
        x = v.unflatten(1, tokens.size)  # (B, H, W, heads, P)
        x = torch.einsum('nyxw,bywnp->byxnp', rows, x)
        return torch.einsum('nxyh,bhxnp->byxnp', columns, x).flatten(1, 2)

    def dense(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        M = torch.einsum('nbac,ncbe->nabce', self._at('columns', tokens), self._at('rows', tokens))
        return M.flatten(3, 4).flatten(1, 2).unsqueeze(0)


class ImplicitFilter(nn.Module):
    """Long filters as a function of relative position: a small MLP with sine activations, times a decaying window.

    Both directions have their own MLP and share the frequencies of the sines. Source: HazyResearch/m2,
    ``bert/src/mm/hyena_utils.py``; here the position is offset / L, so that the filter stretches with the sequence.

    Args:
        channels: Filters.
        hidden: Width of the MLP.
        bands: Frequencies of the position's Fourier features.
        frequency: Initial frequency of the sine activations.
    """

    def __init__(
        self, channels: int, hidden: int = 16, bands: int = 2, frequency: float = 10.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.channels, self.bands, self.initial_frequency = channels, bands, frequency
        features = 1 + 2 * bands
        self.frequency = nn.Parameter(torch.empty(hidden, **dd))
        self.weight1 = nn.Parameter(torch.empty(2, features, hidden, **dd))
        self.bias1 = nn.Parameter(torch.empty(2, 1, hidden, **dd))
        self.weight2 = nn.Parameter(torch.empty(2, hidden, hidden, **dd))
        self.bias2 = nn.Parameter(torch.empty(2, 1, hidden, **dd))
        self.weight3 = nn.Parameter(torch.empty(2, hidden, hidden, **dd))
        self.bias3 = nn.Parameter(torch.empty(2, 1, hidden, **dd))
        self.weight_out = nn.Parameter(torch.empty(2, hidden, channels, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As ``nn.Linear`` is by default."""
        nn.init.constant_(self.frequency, self.initial_frequency)
        for weight, bias in (
            (self.weight1, self.bias1),
            (self.weight2, self.bias2),
            (self.weight3, self.bias3),
            (self.weight_out, None),
        ):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(self, L: int) -> Tensor:
        """Coefficients of offsets -(L-1) ... L-1, (channels, 2L-1), in float32 or wider whatever autocast says."""
        device = self.frequency.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._coefficients(L)
        return self._coefficients(L)

    def _coefficients(self, L: int) -> Tensor:
        acc = accumulation_dtype(self.frequency.dtype)
        device = self.frequency.device
        t = torch.arange(L, device=device, dtype=acc)[:, None] / L  # (L, 1)
        angle = 2 * math.pi * t * torch.arange(1, self.bands + 1, device=device, dtype=acc)
        h = torch.cat([t, angle.cos(), angle.sin()], dim=-1)
        for weight, bias in ((self.weight1, self.bias1), (self.weight2, self.bias2), (self.weight3, self.bias3)):
            h = torch.sin(self.frequency.to(acc) * (h @ weight.to(acc) + bias.to(acc)))
        h = h @ self.weight_out.to(acc)  # (2, L, channels)
        # window: down to 1 % of its height at 0.3 L in the fastest channel, at 1.5 L in the slowest
        decay = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, self.channels, device=device, dtype=acc)
        h = h * torch.exp(-t * decay)
        ahead, behind = h.transpose(-1, -2).unbind(0)
        return torch.cat([behind[:, : L - 1].flip(-1), ahead], dim=-1)


class LongConv(MatrixMixer):
    """Monarch Mixer (M2)'s sequence mixer: gated, bidirectional long convolution, one filter per channel.

    With ``wrapper='gated'``, that of the other mixers (ours), m_ij = h_{i-j} g_j / L, with h an implicit filter
    (``ImplicitFilter``) and the gate g one more convolved column per channel. The gate after the convolution is the
    wrapper's SiLU(z).

    With ``wrapper='m2'``, the released module's own (HazyResearch/m2, ``MonarchMixerSequenceMixing``):

        x1, x2, v = causal conv1d(in_proj(u))
        y = x2 * (h conv (x1 v) + skip x1 v)  [+ r conv u + residual_skip u]
        out_proj(y)

    which is m_ij = x2_i (h_{i-j} + skip [i = j]) x1_j on v, and what ``residual_conv`` adds; no norm and no SiLU. The
    vision code of the paper was never released: that its ViT has this wrapper is taken from the language models.

    By FFT, O(L log L); any length: the filter is a function of (i - j) / L, where the released one has a fixed L. Every
    channel is a head of width 1.

    Args:
        d_model: Width of the tokens.
        wrapper: 'gated' or 'm2'.
        expand: ``d_inner = expand * d_model``; None for 2 ('gated') or 1 ('m2').
        d_conv: Width of the depthwise convolution; None for 7 ('gated', centred: odd) or 3 ('m2', causal).
        residual_conv: A second long convolution, of u itself; with ``wrapper='m2'`` and ``expand=1`` only. None for
            True there, as in the released BERT configurations.
        filter_hidden: Width of the filter's MLP; None for 16 ('gated') or 128 ('m2', as in those configurations).
        filter_bands: Fourier features of its position.
        bias: Bias of the two projections; None for False ('gated') or True ('m2').
        conv_bias: Bias of the convolution.

    Raises:
        ValueError: A value that is not allowed.
    """

    position_parameters = 'never'
    silu_extras = False

    def __init__(
        self,
        d_model: int,
        *,
        wrapper: str = 'gated',
        expand: Optional[float] = None,
        d_conv: Optional[int] = None,
        residual_conv: Optional[bool] = None,
        filter_hidden: Optional[int] = None,
        filter_bands: int = 2,
        bias: Optional[bool] = None,
        conv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        if wrapper not in ('gated', 'm2'):
            raise ValueError(f"wrapper={wrapper!r}; allowed: 'gated', 'm2'")
        own = wrapper == 'm2'
        expand = (1 if own else 2) if expand is None else expand
        d_conv = (3 if own else 7) if d_conv is None else d_conv
        filter_hidden = (128 if own else 16) if filter_hidden is None else filter_hidden
        residual_conv = own and expand == 1 if residual_conv is None else residual_conv
        check_sizes(filter_hidden=filter_hidden, filter_bands=filter_bands)
        if residual_conv and not (own and expand == 1):
            raise ValueError("residual_conv=True; it needs wrapper='m2' and expand=1")
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            d_model,
            True,
            expand=expand,
            headdim=1,
            d_conv=d_conv,
            conv='causal' if own else 'centred',
            bias=own if bias is None else bias,
            conv_bias=conv_bias,
            **dd,
        )
        self.wrapper = wrapper
        if own:
            width = 3 * self.d_inner
            self.in_proj = nn.Linear(d_model, width, bias=self._bias, **dd)
            self.conv1d = nn.Conv1d(width, width, d_conv, groups=width, padding=d_conv - 1, bias=conv_bias, **dd)
            self.skip = nn.Parameter(torch.empty(self.d_inner, **dd))
            self.out_proj = nn.Linear(self.d_inner, d_model, bias=self._bias, **dd)
        else:
            self._build(self.d_inner)
        self.filter = ImplicitFilter(self.d_inner, filter_hidden, filter_bands, **dd)
        if residual_conv:
            self.residual_filter = ImplicitFilter(d_model, filter_hidden, filter_bands, **dd)
            self.residual_skip = nn.Parameter(torch.empty(d_model, **dd))
        else:
            self.residual_filter = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters that this module owns itself."""
        for name in ('skip', 'residual_skip'):
            if hasattr(self, name):
                nn.init.normal_(getattr(self, name))

    def no_weight_decay(self) -> Set[str]:
        return {name for name, _ in self.named_parameters() if name.startswith(('filter.', 'residual_filter.'))}

    def forward(self, u: Tensor, grid: Optional[Tuple[int, int]] = None) -> Tensor:
        if self.wrapper == 'gated':
            return super().forward(u, grid)
        self._check_grid(u.shape[1], grid)
        x1, x2, v = self._gates(u)
        y = x2 * _long_convolution(self.filter, self.skip, x1 * v)
        if self.residual_filter is not None:
            y = y + _long_convolution(self.residual_filter, self.residual_skip, u.to(y.dtype))
        return self.out_proj(y)

    def matrix(self, u: Tensor, grid: Optional[Tuple[int, int]] = None) -> Tensor:
        if self.wrapper == 'gated':
            return super().matrix(u, grid)
        self._check_grid(u.shape[1], grid)
        acc = accumulation_dtype(u.dtype)
        x1, x2, _ = (t.to(acc).transpose(-1, -2) for t in self._gates(u))  # (B, d_inner, L)
        M = toeplitz_matrix(self.filter(u.shape[1]).to(acc))
        M = M + self.skip.to(acc)[:, None, None] * torch.eye(u.shape[1], dtype=acc, device=u.device)
        return x2.unsqueeze(-1) * M * x1.unsqueeze(-2)

    def _gates(self, u: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """x1, x2 and v (B, L, d_inner) of M2's own wrapper."""
        return convolved(self.conv1d, self.in_proj(u), causal=True).chunk(3, dim=-1)

    def mix(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        L = v.shape[1]
        y = toeplitz_product(self.filter(L) / L, (v.squeeze(-1) * extras).transpose(-1, -2))
        return y.transpose(-1, -2).unsqueeze(-1)

    def dense(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        L = v.shape[1]
        acc = accumulation_dtype(v.dtype)
        return toeplitz_matrix(self.filter(L).to(acc) / L) * extras.to(acc).transpose(-1, -2).unsqueeze(2)


def _long_convolution(filter: ImplicitFilter, skip: Tensor, x: Tensor) -> Tensor:
    """x (B, L, C) convolved with a filter per channel, and skip times it; dtype of x."""
    return toeplitz_product(filter(x.shape[1]), x.transpose(-1, -2)).transpose(-1, -2) + skip.to(x.dtype) * x


class BlockDiagonalLinear(nn.Module):
    """y = x W^T + b with W of ``blocks`` equal blocks on the diagonal, (..., in_features) -> (..., out_features).

    Raises:
        ValueError: ``blocks`` does not divide both widths.
    """

    def __init__(self, in_features: int, out_features: int, blocks: int = 4, device=None, dtype=None) -> None:
        super().__init__()
        _check_blocks(blocks, in_features, out_features)
        dd = {'device': device, 'dtype': dtype}
        self.blocks = blocks
        self.weight = nn.Parameter(torch.empty(blocks, in_features // blocks, out_features // blocks, **dd))
        self.bias = nn.Parameter(torch.empty(out_features, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """trunc_normal(0.02) of the recipe, wider as there are fewer inputs to each output."""
        trunc_normal_(self.weight, std=0.02 * self.blocks**0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features)."""
        x = x.unflatten(-1, (self.blocks, -1)).unsqueeze(-2)
        return torch.matmul(x, self.weight).flatten(-3) + self.bias

    def extra_repr(self) -> str:
        blocks, d_in, d_out = self.weight.shape
        return f'{blocks * d_in}, {blocks * d_out}, blocks={blocks}'


class StructuredMlp(nn.Module):
    """timm's ``Mlp`` with structured matrices: block-diagonal, as in Monarch Mixer (NeurIPS 2023), or Monarch.

    With block-diagonal layers, 1 / blocks of the weights, channels of different blocks meet in the sequence mixer's
    projections only.

    Args:
        in_features: Width of the tokens.
        hidden_features: Width between the layers.
        act_layer: Activation.
        drop: Dropout rate after the activation and at the end.
        layer: ``BlockDiagonalLinear`` or ``MonarchLinear``.
        blocks: Of each layer.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        layer: Callable[..., nn.Module] = BlockDiagonalLinear,
        blocks: int = 4,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fc1 = layer(in_features, hidden_features, blocks, **dd)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = layer(hidden_features, in_features, blocks, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features)."""
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class MonarchLinear(nn.Module):
    """y = B2 P B1 x + b: two block-diagonal factors with a transposition of blocks and columns between them.

    Of n = ``blocks`` blocks each; between them the smaller of the two widths. n = 4 takes half of a square matrix's
    parameters, about sqrt(width) blocks the fewest. (..., in_features) -> (..., out_features).

    Source: Dao et al., "Monarch", ICML 2022.

    Raises:
        ValueError: ``blocks`` does not divide both widths.
    """

    def __init__(
        self, in_features: int, out_features: int, blocks: int = 4, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        _check_blocks(blocks, in_features, out_features)
        dd = {'device': device, 'dtype': dtype}
        d_in, d_out = in_features // blocks, out_features // blocks
        self.blocks = blocks
        self.weight1 = nn.Parameter(torch.empty(blocks, d_in, min(d_in, d_out), **dd))
        self.weight2 = nn.Parameter(torch.empty(blocks, min(d_in, d_out), d_out, **dd))
        self.bias = nn.Parameter(torch.empty(out_features, **dd)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As large a product as the recipe's trunc_normal(0.02): the first factor keeps the variance of its input."""
        trunc_normal_(self.weight1, std=self.weight1.shape[1] ** -0.5)
        # inputs of an output: rows of a block, instead of in_features
        trunc_normal_(self.weight2, std=0.02 * (self.blocks * self.weight1.shape[1] / self.weight2.shape[1]) ** 0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features)."""
        x = torch.matmul(x.unflatten(-1, (self.blocks, -1)).unsqueeze(-2), self.weight1).squeeze(-2)
        x = (
            x.transpose(-1, -2).flatten(-2).unflatten(-1, (self.blocks, -1)).unsqueeze(-2)
        )  # of every block a part to every block
        y = torch.matmul(x, self.weight2).flatten(-3)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        n, d_in, _ = self.weight1.shape
        return f'{n * d_in}, {n * self.weight2.shape[2]}, blocks={n}, bias={self.bias is not None}'


def _check_blocks(blocks: int, in_features: int, out_features: int) -> None:
    if blocks < 1 or in_features % blocks or out_features % blocks:
        raise ValueError(f'blocks={blocks}; it must divide the widths {in_features} and {out_features}')

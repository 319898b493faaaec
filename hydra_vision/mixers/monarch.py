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
from .base import MatrixMixer, check_sizes
from .grid import TokenGrid, resample_axis
from .toeplitz import toeplitz_matrix, toeplitz_product

__all__ = ['BlockDiagonalLinear', 'BlockDiagonalMlp', 'LongConv', 'Monarch']


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
        ahead, behind = h.mT.unbind(0)
        return torch.cat([behind[:, : L - 1].flip(-1), ahead], dim=-1)


class LongConv(MatrixMixer):
    """Monarch Mixer (M2)'s sequence mixer: gated, bidirectional long convolution, one filter per channel.

    m_ij = h_{i-j} g_j / L, with h an implicit filter (``ImplicitFilter``) and the gate g one more convolved column per
    channel. The gate after the convolution is the wrapper's SiLU(z). By FFT, O(L log L); any length: the filter is a
    function of (i - j) / L.

    The released module has its own wrapper (convolution of width 3, no norm, no SiLU) and no 1 / L; here everything
    around M is as in the other mixers. Every channel is a head of width 1.

    Args:
        d_model: Width of the tokens.
        expand: ``d_inner = expand * d_model``.
        d_conv: Width of the depthwise convolution; odd.
        filter_hidden: Width of the filter's MLP.
        filter_bands: Fourier features of its position.
        bias: Bias of the two projections.
        conv_bias: Bias of the convolution.
    """

    position_parameters = 'never'
    silu_extras = False

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 2,
        d_conv: int = 7,
        filter_hidden: int = 16,
        filter_bands: int = 2,
        bias: bool = False,
        conv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        check_sizes(filter_hidden=filter_hidden, filter_bands=filter_bands)
        dd = {'device': device, 'dtype': dtype}
        super().__init__(d_model, True, expand=expand, headdim=1, d_conv=d_conv, bias=bias, conv_bias=conv_bias, **dd)
        self._build(self.d_inner)
        self.filter = ImplicitFilter(self.d_inner, filter_hidden, filter_bands, **dd)

    def no_weight_decay(self) -> Set[str]:
        return {f'filter.{name}' for name, _ in self.filter.named_parameters()}

    def mix(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        L = v.shape[1]
        y = toeplitz_product(self.filter(L) / L, (v.squeeze(-1) * extras).mT)
        return y.mT.unsqueeze(-1)

    def dense(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        L = v.shape[1]
        acc = accumulation_dtype(v.dtype)
        return toeplitz_matrix(self.filter(L).to(acc) / L) * extras.to(acc).mT.unsqueeze(2)


class BlockDiagonalLinear(nn.Module):
    """y = x W^T + b with W of ``blocks`` equal blocks on the diagonal, (..., in_features) -> (..., out_features).

    Raises:
        ValueError: ``blocks`` does not divide both widths.
    """

    def __init__(self, in_features: int, out_features: int, blocks: int = 4, device=None, dtype=None) -> None:
        super().__init__()
        if blocks < 1 or in_features % blocks or out_features % blocks:
            raise ValueError(f'blocks={blocks}; it must divide the widths {in_features} and {out_features}')
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


class BlockDiagonalMlp(nn.Module):
    """timm's ``Mlp`` with block-diagonal layers: 1 / blocks of its weights (Monarch Mixer, NeurIPS 2023).

    Channels of different blocks meet in the sequence mixer's projections only.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        blocks: int = 4,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fc1 = BlockDiagonalLinear(in_features, hidden_features, blocks, **dd)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = BlockDiagonalLinear(hidden_features, in_features, blocks, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features)."""
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))

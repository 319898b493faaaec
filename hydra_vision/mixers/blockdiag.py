"""Monarch Mixer's channel mixer: an MLP of block-diagonal matrices."""

from typing import Callable

import torch
import torch.nn as nn
from timm.layers import trunc_normal_
from torch import Tensor

__all__ = ['BlockDiagonalLinear', 'BlockDiagonalMlp']


class BlockDiagonalLinear(nn.Module):
    """y = x W^T + b with W of ``blocks`` equal blocks on the diagonal, (..., in_features) -> (..., out_features).

    Raises:
        ValueError: ``blocks`` does not divide both widths.
    """

    def __init__(self, in_features: int, out_features: int, blocks: int = 4, device=None, dtype=None) -> None:
        super().__init__()
        if blocks < 1 or in_features % blocks or out_features % blocks:
            raise ValueError(f'blocks = {blocks}; it must divide the widths {in_features} and {out_features}')
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

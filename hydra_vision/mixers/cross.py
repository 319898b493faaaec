"""Hydra from a memory to other tokens. Ours: no paper has it."""

from typing import ClassVar, Optional, Set, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..ops.reference import accumulation_dtype
from .base import GatedRMSNorm, Mixer, Patterns, check_sizes
from .hydra import check_state_space, init_dt_bias_

__all__ = ['HydraCross']


class HydraCross(Mixer):
    """What Hydra's scans would tell tokens that stand behind (forward) and before (backward) all tokens of a memory.

        h_f = sum_j exp(A sum_{k > j} dt_f[k]) dt_f[j] B_f[j] x[j]^T
        h_b = sum_j exp(A sum_{k < j} dt_b[k]) dt_b[j] B_b[j] x[j]^T          (N, P) per head, of the memory alone
        y_i = C_f[i] h_f + C_b[i] h_b + (fc_D(v_i) + D) v_i
        out_proj(RMSNorm(y) * weight * SiLU(z))

    x, B and dt come from the memory, z, v and C from u. This is the block "rows of u, columns of the memory" of a
    quasiseparable matrix over both, in which the tokens of u have dt = 0: linear attention of rank 2 N with a learned
    decay towards both ends of the memory. There is no convolution and no order among the tokens of u, so that it is as
    causal as it is not. Linear in both lengths.

    Args:
        d_model: Width of the tokens of u and of the memory.
        d_state: State size N of each head.
        expand: ``d_inner = expand * d_model``; need not be whole.
        headdim: Head width P; divides ``d_inner``. H = d_inner / headdim.
        ngroups: Groups G of B and C; divides H.
        dt_min: Smallest step size at initialisation (log-uniform in [dt_min, dt_max]).
        dt_max: Largest step size at initialisation.
        dt_init_floor: Lower bound of the initial step size.
        bias: Bias of the projections.

    Raises:
        ValueError: A size that does not fit.
    """

    patterns: ClassVar[Patterns] = {'noncausal cross': {}, 'causal cross': {}}

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, headdim=headdim)
        d_inner = round(expand * d_model)
        if d_inner < 1 or d_inner % headdim:
            raise ValueError(f'headdim={headdim} does not divide d_inner={d_inner} (expand * d_model)')
        self.d_model, self.d_inner, self.headdim, self.nheads = d_model, d_inner, headdim, d_inner // headdim
        check_state_space(d_state, ngroups, self.nheads, dt_min, dt_max, (0.0, float('inf')), 'auto')
        self.d_state, self.ngroups = d_state, ngroups
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        dd = {'device': device, 'dtype': dtype}
        states = 2 * ngroups * d_state
        self.query_proj = nn.Linear(d_model, 2 * d_inner + states, bias=bias, **dd)
        self.memory_proj = nn.Linear(d_model, d_inner + states + 2 * self.nheads, bias=bias, **dd)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **dd))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **dd))
        self.D = nn.Parameter(torch.empty(self.nheads, **dd))
        self.fc_D = nn.Linear(d_inner, self.nheads, bias=False, **dd)
        self.norm = GatedRMSNorm(d_inner, **dd)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the parameters that this module owns itself, as in ``Hydra``."""
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.D)
        init_dt_bias_(self.dt_bias, self.dt_min, self.dt_max, self.dt_init_floor)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return {'A_log', 'D', 'dt_bias'}

    def forward(self, u: Tensor, memory: Optional[Tensor] = None) -> Tensor:
        """Mix the memory (B, any length, d_model) into the tokens u (B, L, d_model).

        Raises:
            ValueError: No memory.
        """
        if memory is None:
            raise ValueError('memory=None; HydraCross mixes a memory into tokens, for the tokens alone take Hydra')
        z, v, C = self._query(u)
        x, weighted = self._memory(memory)
        acc = weighted.dtype
        states = torch.einsum('bjdhn,bjhp->bdhnp', weighted, x.to(acc))  # d: the two directions
        y = torch.einsum('bidhn,bdhnp->bihp', C, states)
        diagonal = self.fc_D(v.flatten(-2)).to(acc) + self.D.to(acc)
        y = (y + diagonal.unsqueeze(-1) * v.to(acc)).flatten(-2)
        return self.out_proj(self.norm(y, z))

    @torch.jit.ignore
    def matrix(self, u: Tensor, memory: Tensor) -> Tensor:
        """The matrix (B, H, L, length of the memory) applied to the memory's x. float32, for float64 input float64."""
        _, _, C = self._query(u)
        _, weighted = self._memory(memory)
        return torch.einsum('bidhn,bjdhn->bhij', C, weighted)

    def _query(self, u: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """z (B, L, d_inner), v (B, L, H, P), C (B, L, 2, H, N)."""
        z, vC = self.query_proj(u).split([self.d_inner, self.d_inner + 2 * self.ngroups * self.d_state], dim=-1)
        v, C = F.silu(vC).tensor_split([self.d_inner], dim=-1)
        return z, v.unflatten(-1, (self.nheads, self.headdim)), self._per_head(C)

    def _memory(self, memory: Tensor) -> Tuple[Tensor, Tensor]:
        """x (B, J, H, P), and B[j] dt[j] times the decay to the end that reads it, (B, J, 2, H, N)."""
        states = 2 * self.ngroups * self.d_state
        xB, dt = self.memory_proj(memory).split([self.d_inner + states, 2 * self.nheads], dim=-1)
        x, B = F.silu(xB).tensor_split([self.d_inner], dim=-1)
        acc = accumulation_dtype(x.dtype)
        dt = F.softplus(dt.to(acc).unflatten(-1, (2, self.nheads)) + self.dt_bias.to(acc))
        forward, backward = dt.double().unbind(2)  # (B, J, H); differences of sums: exact in float64
        after = forward.flip(1).cumsum(1).flip(1) - forward
        before = backward.cumsum(1) - backward
        elapsed = torch.stack([after, before], dim=2).clamp(min=0).to(acc)
        weight = dt * torch.exp(-torch.exp(self.A_log.to(acc)) * elapsed)
        return x.unflatten(-1, (self.nheads, self.headdim)), self._per_head(B) * weight.unsqueeze(-1)

    def _per_head(self, t: Tensor) -> Tensor:
        """(B, L, 2 G N) -> (B, L, 2, H, N), wide."""
        t = t.to(accumulation_dtype(t.dtype)).unflatten(-1, (2, self.ngroups, self.d_state))
        return t.repeat_interleave(self.nheads // self.ngroups, dim=3)

    def extra_repr(self) -> str:
        return f'd_state={self.d_state}, headdim={self.headdim}, nheads={self.nheads}, ngroups={self.ngroups}'

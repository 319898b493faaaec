"""What travels from ``hydra_inner`` to a backend."""

from typing import NamedTuple, Optional, Tuple

from torch import Tensor

__all__ = ['InnerArguments']


class InnerArguments(NamedTuple):
    """The arguments of ``hydra_inner`` on their way to a backend, in the order of the operators' flat form."""

    zxbcdt: Tensor
    conv_weight: Tensor
    conv_bias: Optional[Tensor]
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    fc_D_weight: Tensor
    norm_weight: Tensor
    init_states: Optional[Tensor]
    headdim: int
    d_state: int
    ngroups: int
    share_bc: bool
    dt_limit: Tuple[float, float]
    eps: float
    segments: Optional[Tensor] = None  # (L,) int32: the sequence of each token of a packed row

    @property
    def H(self) -> int:
        """Heads."""
        return self.dt_bias.shape[0]

    @property
    def d_inner(self) -> int:
        """H * P."""
        return self.H * self.headdim

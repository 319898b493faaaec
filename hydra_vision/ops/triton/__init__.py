"""Fused Triton kernels for the quasiseparable operator and for everything between the mixer's two projections.

Nothing here imports Triton or touches CUDA until an operator is called; ``unavailable_reason`` says what is missing.
"""

import importlib.util
import os
from typing import Optional

import torch
from torch import Tensor

__all__ = ['hydra_inner', 'quasiseparable_mix', 'unavailable_reason']


def unavailable_reason() -> Optional[str]:
    """None where the kernels can run, else what is missing."""
    if importlib.util.find_spec('triton') is None:
        return 'the package triton is not installed'
    if os.environ.get('TRITON_INTERPRET') == '1':
        return None
    if not torch.cuda.is_available():
        return 'no CUDA device is visible (TRITON_INTERPRET=1 runs the kernels in the interpreter)'
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f'the CUDA device has compute capability {capability[0]}.{capability[1]}; needed is 8.0 or newer'
    return None


def quasiseparable_mix(
    x: Tensor,
    dt_f: Tensor,
    dt_b: Tensor,
    A: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D: Optional[Tensor] = None,
    init_states: Optional[Tensor] = None,
) -> Tensor:
    """y = M x; see ``hydra_vision.ops.quasiseparable_mix``. Differentiable once in every argument."""
    from . import api

    return api.quasiseparable_mix(x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, D, init_states)


def hydra_inner(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Optional[Tensor],
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    fc_D_weight: Tensor,
    norm_weight: Tensor,
    *,
    headdim: int,
    d_state: int,
    ngroups: int = 1,
    share_bc: bool = False,
    dt_limit: tuple[float, float] = (0.0, float('inf')),
    init_states: Optional[Tensor] = None,
    eps: float = 1e-5,
) -> Tensor:
    """The mixer between in_proj and out_proj; see ``hydra_vision.ops.hydra_inner``. Differentiable once."""
    from . import api

    return api.hydra_inner(
        zxbcdt,
        conv_weight,
        conv_bias,
        dt_bias,
        A_log,
        D,
        fc_D_weight,
        norm_weight,
        headdim=headdim,
        d_state=d_state,
        ngroups=ngroups,
        share_bc=share_bc,
        dt_limit=dt_limit,
        init_states=init_states,
        eps=eps,
    )

"""What the operator is compared with: the released algorithm, two causal scans as one of a doubled batch.

Its scan is ``mamba_ssm``'s SSD (in the chunk length of the released module, and in shorter ones that may be faster), or
flash-linear-attention's ``parallel_simple_gla``, the fastest of its kernels with one decay a token and head.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Optional

import torch
from torch import Tensor

from ..ops import quasiseparable_mix
from ..ops.dispatch import BACKENDS, backend_reasons
from ..ops.mamba_ssm import mix_by_scan, mix_mamba_ssm

__all__ = ['PEERS', 'implementation', 'mix_simple_gla', 'unusable']

_MAMBA_CHUNKS = {f'mamba_ssm/{size}': size for size in (128, 64)}
SIMPLE_GLA = 'simple_gla'
# What a goal counts as the better peer, by name; 'mamba_ssm' has the chunks of the released module, 256.
PEERS = ('mamba_ssm', *_MAMBA_CHUNKS, SIMPLE_GLA)


def mix_simple_gla(
    x: Tensor,
    dt_f: Tensor,
    dt_b: Tensor,
    A: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D: Optional[Tensor] = None,
) -> Tensor:
    """y = M x by flash-linear-attention. Arguments as in ``quasiseparable_mix``; CUDA tensors only."""
    from fla.ops.simple_gla import parallel_simple_gla

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        heads = x.shape[2] // B.shape[2]
        k, q = (t.repeat_interleave(heads, dim=2) for t in (B, C))  # it knows no groups
        return parallel_simple_gla(q, k, (x * dt.unsqueeze(-1)).to(x.dtype), g=A * dt, scale=1.0)[0]

    return mix_by_scan(scan, x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, D)


def implementation(name: str) -> Callable[..., Tensor]:
    """The operator by the name of a backend or a peer; arguments of ``quasiseparable_mix`` by name."""
    if name == SIMPLE_GLA:
        return mix_simple_gla
    if name in _MAMBA_CHUNKS:
        return partial(mix_mamba_ssm, chunk_size=_MAMBA_CHUNKS[name])
    return partial(quasiseparable_mix, backend=name)


def unusable(device: torch.device) -> dict[str, Optional[str]]:
    """Every backend and peer with None where it computes on ``device``, else the reason why not."""
    reasons = backend_reasons()
    if importlib.util.find_spec('fla') is None:
        reasons[SIMPLE_GLA] = "the package fla-core is not installed (pip install 'hydra-vision[fla]')"
    else:
        reasons[SIMPLE_GLA] = None
    for name in ('triton', 'mamba_ssm', SIMPLE_GLA):
        if reasons[name] is None and device.type != 'cuda':
            reasons[name] = 'it computes on CUDA'
    for name, module in (('mamba_ssm', 'mamba_ssm.ops.triton.ssd_combined'), (SIMPLE_GLA, 'fla.ops.simple_gla')):
        if reasons[name] is None:
            try:  # installed is not enough: compiled extensions break with other versions of torch
                importlib.import_module(module)
            except ImportError as error:
                reasons[name] = f'{module} cannot be imported: {error}'
    for name in _MAMBA_CHUNKS:
        reasons[name] = reasons['mamba_ssm']
    return {name: reasons[name] for name in (*BACKENDS, *_MAMBA_CHUNKS, SIMPLE_GLA)}

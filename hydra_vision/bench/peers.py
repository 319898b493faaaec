"""What the operator is compared with: the released algorithm, two causal scans as one of a doubled batch.

Its scan is ``mamba_ssm``'s SSD (in the chunk length of the released module, and in shorter ones that may be faster), or
flash-linear-attention's ``parallel_simple_gla``, the fastest of its kernels with one decay a token and head.

Each peer is measured twice. By its name: the complete operator as released, from the same arguments to the same
result as ours, with flips, concatenation, shift, sum of both halves and diagonal. With ``/scan`` behind its name: the
call of the scan alone, forward and backward, on inputs that were doubled and flipped before, and for ``simple_gla``
also repeated for every head and multiplied by dt. That is less than the operator, and what the project's goal is
stated against.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Optional

import torch
from torch import Tensor

from ..ops import quasiseparable_mix
from ..ops.dispatch import BACKENDS, backend_reasons
from ..ops.mamba_ssm import CHUNK_SIZE, double_batch, mix_by_scan, mix_mamba_ssm, ssd_scan

__all__ = ['PEERS', 'SCANS', 'implementation', 'mix_simple_gla', 'scan_alone', 'unusable']

_MAMBA_CHUNKS = {f'mamba_ssm/{size}': size for size in (128, 64)}
SIMPLE_GLA = 'simple_gla'
# Complete operators by name; 'mamba_ssm' has the chunks of the released module, 256.
PEERS = ('mamba_ssm', *_MAMBA_CHUNKS, SIMPLE_GLA)
_SCAN = '/scan'
SCANS = tuple(name + _SCAN for name in PEERS)


def _gla_inputs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads = x.shape[2] // B.shape[2]
    k, q = (t.repeat_interleave(heads, dim=2) for t in (B, C))  # it knows no groups
    return q, k, (x * dt.unsqueeze(-1)).to(x.dtype), A * dt


def _gla_scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    from fla.ops.simple_gla import parallel_simple_gla

    return parallel_simple_gla(q, k, v, g=g, scale=1.0)[0]


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

    def scan(*doubled: Tensor) -> Tensor:
        return _gla_scan(*_gla_inputs(*doubled))

    return mix_by_scan(scan, x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, D)


def implementation(name: str) -> Callable[..., Tensor]:
    """The complete operator by the name of a backend or a peer; arguments of ``quasiseparable_mix`` by name."""
    if name == SIMPLE_GLA:
        return mix_simple_gla
    if name in _MAMBA_CHUNKS:
        return partial(mix_mamba_ssm, chunk_size=_MAMBA_CHUNKS[name])
    return partial(quasiseparable_mix, backend=name)


def scan_alone(name: str, arguments: Mapping[str, Tensor]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The scan of a peer, by its name in SCANS, and what it is called with.

    Args:
        name: One of SCANS.
        arguments: Of ``quasiseparable_mix``, by name. The diagonal D is no part of a scan.

    Returns:
        The scan, and its inputs: tensors of their own that depend on no argument, the doubled batch among them.
        ``join_directions`` of the scan's result is M x without its diagonal.
    """
    peer = name.removesuffix(_SCAN)
    inputs = double_batch(**{key: t for key, t in arguments.items() if key != 'D'})
    if peer == SIMPLE_GLA:
        scan, inputs = _gla_scan, _gla_inputs(*inputs)
    else:
        scan = partial(ssd_scan, chunk_size=_MAMBA_CHUNKS.get(peer, CHUNK_SIZE))
    return scan, [t.detach().clone() for t in inputs]


def unusable(device: torch.device) -> dict[str, Optional[str]]:
    """Every backend, peer and scan with None where it computes on ``device``, else the reason why not."""
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
    for name in SCANS:
        reasons[name] = reasons[name.removesuffix(_SCAN)]
    return {name: reasons[name] for name in dict.fromkeys((*BACKENDS, *PEERS, *SCANS))}

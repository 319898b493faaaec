"""Which backend computes the operator, and why.

`'auto'` takes, in this order: the ``HYDRA_VISION_BACKEND`` environment variable, what ``set_default_backend`` was
given, the default of the tensor's device. A backend that was asked for by name runs or raises; it is never replaced.
"""

import importlib.util
import os
from typing import Optional

import torch

__all__ = [
    'BACKENDS',
    'available_backends',
    'backend_reasons',
    'check_backend_name',
    'choose_backend',
    'default_backend',
    'is_exporting',
    'set_default_backend',
]

BACKENDS = ('reference', 'chunked', 'triton', 'mamba_ssm')
ENVIRONMENT_VARIABLE = 'HYDRA_VISION_BACKEND'

_default: str = 'auto'


def is_exporting() -> bool:
    """Whether torch.export is running. torch.compiler.is_exporting() says so under torch.compile too in torch 2.11."""
    return torch.compiler._is_exporting_flag


def check_backend_name(name: str, argument: str = 'backend') -> None:
    """Raises ValueError for a name that is neither 'auto' nor a backend."""
    if name != 'auto' and name not in BACKENDS:
        raise ValueError(f"{argument}: unknown backend {name!r}; allowed: 'auto', " + ', '.join(map(repr, BACKENDS)))


@torch.compiler.assume_constant_result  # the same while a process lives; its checks cannot be traced
def _triton_reason() -> Optional[str]:
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


def _mamba_ssm_reason() -> Optional[str]:
    if importlib.util.find_spec('mamba_ssm') is None:
        return "the package mamba-ssm is not installed (pip install 'hydra-vision[mamba]')"
    if not torch.cuda.is_available():
        return 'mamba_ssm needs a CUDA device and none is visible'
    return None


def _reason_unavailable(name: str) -> Optional[str]:
    """None where the backend can run, else what is missing."""
    if name == 'triton':
        return _triton_reason()
    if name == 'mamba_ssm':
        return _mamba_ssm_reason()
    return None


def backend_reasons() -> dict[str, Optional[str]]:
    """Every backend with None if it can run here, else what is missing."""
    return {name: _reason_unavailable(name) for name in BACKENDS}


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine."""
    return [name for name, reason in backend_reasons().items() if reason is None]


def set_default_backend(name: str) -> None:
    """Choose what ``backend='auto'`` means in this process; ``'auto'`` goes back to the device's default.

    ``HYDRA_VISION_BACKEND`` in the environment still takes precedence.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend cannot run here.
    """
    global _default
    check_backend_name(name, 'set_default_backend(name)')
    _require(name)
    _default = name


def _require(name: str) -> None:
    reason = None if name == 'auto' else _reason_unavailable(name)
    if reason is not None:
        raise RuntimeError(f'backend {name!r} is not available: {reason}; available: {", ".join(available_backends())}')


def default_backend(device: 'torch.device | str' = 'cpu') -> tuple[str, str]:
    """What 'auto' means for tensors on ``device``: (backend, why)."""
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE, '')
    if from_environment and from_environment != 'auto':
        check_backend_name(from_environment, ENVIRONMENT_VARIABLE)
        return from_environment, f'{ENVIRONMENT_VARIABLE} is set'
    if _default != 'auto':
        return _default, 'set_default_backend was called'
    if torch.device(device).type == 'cuda':
        reason = _triton_reason()
        if reason is None:
            return 'triton', 'default on CUDA'
        return 'chunked', f'default on CUDA without Triton ({reason})'
    return 'chunked', f'default on {torch.device(device).type}'


def choose_backend(backend: str, device: torch.device) -> str:
    """The backend that will run for tensors on ``device``.

    Raises:
        ValueError: unknown name.
        RuntimeError: named (here, in the environment or by ``set_default_backend``) but not able to run.
    """
    check_backend_name(backend)
    name = default_backend(device)[0] if backend == 'auto' else backend
    if name in ('triton', 'mamba_ssm'):
        _require(name)
        if device.type != 'cuda' and not (name == 'triton' and os.environ.get('TRITON_INTERPRET') == '1'):
            raise RuntimeError(f'backend {name!r} computes on CUDA tensors; the tensors are on {device.type!r}')
    return name

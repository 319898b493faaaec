"""Device, autocast type and loader processes by name."""

import os

import torch

from .errors import UserError, first_line

__all__ = ['AMP_NAMES', 'amp_dtype', 'available_cores', 'pick_device', 'worker_count']

_AMP = {
    'none': None,
    'bf16': torch.bfloat16,
    'bfloat16': torch.bfloat16,
    'fp16': torch.float16,
    'float16': torch.float16,
}
AMP_NAMES = ('auto', *_AMP)


def pick_device(name: str | torch.device = 'auto') -> torch.device:
    """The device of a name, tried with one tensor.

    Args:
        name: 'auto' (the first CUDA device where there is one, else the CPU), 'cpu', 'cuda', 'cuda:1', ...

    Raises:
        UserError: No such device here.
    """
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        text = f'device={str(name)!r} is not available: {first_line(error)}; allowed: auto, cpu, cuda, cuda:N'
        raise UserError(text) from error
    if device.type == 'meta':
        raise UserError(f'device={str(name)!r} computes nothing; allowed: auto, cpu, cuda, cuda:N')
    return device


def amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of a name.

    Args:
        name: 'auto' (bfloat16 on CUDA devices that have it, else none), 'none', 'bf16' or 'bfloat16', 'fp16' or
            'float16'.
        device: Where it will run.

    Returns:
        None for no autocast.

    Raises:
        UserError: Another name.
    """
    if name == 'auto':
        return torch.bfloat16 if device.type == 'cuda' and torch.cuda.is_bf16_supported() else None
    if name not in _AMP:
        raise UserError(f'amp={name!r}; allowed: {", ".join(AMP_NAMES)}')
    return _AMP[name]


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def worker_count(requested: int | None = None, processes: int = 1) -> int:
    """Loader processes of one process.

    Args:
        requested: By the user, 0 for none; None: one per core, at least 1 and at most 16.
        processes: Processes that share the cores.

    Raises:
        UserError: A negative number.
    """
    if requested is None:
        return max(1, min(available_cores() // processes, 16))
    if requested < 0:
        raise UserError(f'workers={requested}; allowed: 0 or more')
    return requested

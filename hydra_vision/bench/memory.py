"""Memory of one variant among others that stay resident: its peak, and giving it back."""

import gc
from collections.abc import Callable
from typing import Optional

import torch

__all__ = ['allocated', 'peak_above', 'release']


def allocated(device: torch.device) -> Optional[int]:
    """Bytes of live tensors on a CUDA device; None elsewhere.

    A CPU process has no such number: its resident set depends on the allocator and on what ran before.
    """
    return torch.cuda.memory_allocated(device) if device.type == 'cuda' else None


def peak_above(step: Callable[[], object], device: torch.device, baseline: Optional[int]) -> Optional[int]:
    """Peak bytes of a call of ``step`` above ``baseline``, what was allocated before this variant was built.

    Weights, inputs, activations and gradients of the variant count, the other variants do not. None without CUDA.
    """
    if device.type != 'cuda' or baseline is None:
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - baseline


def release(device: torch.device) -> None:
    """Gives memory back that nothing refers to any more, so that the next variant finds it."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()

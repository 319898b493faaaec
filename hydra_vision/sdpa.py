"""Which kernel computes ``scaled_dot_product_attention``: choose one, see which one ran, find the fastest.

PyTorch has several for the same call, which differ by a factor of two in time: a comparison with attention means
nothing without the name of the one that ran. On the CPU there are 'flash' (PyTorch's own) and 'math'.
"""

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from .timing import interleave

__all__ = ['ATTENTION', 'attention_backend', 'attention_shapes', 'attention_that_ran', 'fastest_attention']

_BACKENDS = {
    'cudnn': SDPBackend.CUDNN_ATTENTION,
    'flash': SDPBackend.FLASH_ATTENTION,
    'efficient': SDPBackend.EFFICIENT_ATTENTION,
    'math': SDPBackend.MATH,
}
ATTENTION = ('auto', *_BACKENDS)
# Substrings of the names of operators, as PyTorch calls them in eager mode and in compiled code, and of kernels, which
# are all that a replayed CUDA graph shows.
_NAMES = {
    'cudnn': ('_scaled_dot_product_cudnn_attention', 'cudnn_generated_fort_native_sdpa', 'native_sdpa_sm'),
    'flash': ('_scaled_dot_product_flash_attention', 'flash_fwd_kernel', 'flash_fwd_splitkv_kernel'),
    'efficient': ('_scaled_dot_product_efficient_attention', 'fmha_cutlassF'),
    'math': ('_scaled_dot_product_attention_math',),
}


def attention_backend(name: str) -> contextlib.AbstractContextManager:
    """A context in which attention runs on one backend only; in that of 'auto' PyTorch chooses.

    Args:
        name: One of ``ATTENTION``. PyTorch raises a RuntimeError at a call that the backend cannot compute.
    """
    return contextlib.nullcontext() if name == 'auto' else sdpa_kernel(_BACKENDS[name])


def attention_that_ran(step: Callable[[], object], device: torch.device, model: nn.Module | None = None) -> str:
    """Run a call under the profiler; the backends that computed its attention, joined by '+', '' for none.

    Args:
        step: The call.
        device: Where it computes.
        model: What the call runs: compiled code calls the fused backends by name but inlines 'math', which is then the
            answer where a timm attention of the model is fused (``fused_attn``) and no fused backend ran.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == 'cuda')
    with profile(activities=activities) as trace:
        step()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
    names = {event.key for event in trace.key_averages()}
    ran = '+'.join(b for b, parts in _NAMES.items() if any(part in name for name in names for part in parts))
    if not ran and model is not None and any(getattr(module, 'fused_attn', False) for module in model.modules()):
        return 'math'
    return ran


class _Shapes(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def attention_shapes(model: nn.Module, images: torch.Tensor) -> list[tuple[int, ...]]:
    """The shapes (B, H, L, P) with which a forward pass calls ``scaled_dot_product_attention``, each once."""
    with torch.no_grad(), _Shapes() as seen:
        model(images)
    return list(dict.fromkeys(seen.shapes))


def fastest_attention(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, *, training: bool
) -> tuple[str, dict[str, float]]:
    """Time every backend alone, in interleaved rounds.

    Args:
        shape: (B, H, L, P), of queries, keys and values.
        dtype: Of them.
        device: Where it computes.
        training: Forward and backward, else forward alone.

    Returns:
        The name of the fastest backend, and milliseconds of those that can compute it.
    """
    batch, heads, length, headdim = shape
    # Views of one projection, as in timm's attention.
    qkv = torch.randn(batch, length, 3, heads, headdim, device=device, dtype=dtype, requires_grad=training)
    gradient = torch.randn(batch, length, heads, headdim, device=device, dtype=dtype).transpose(1, 2)

    def step(name: str) -> None:
        with attention_backend(name), torch.set_grad_enabled(training):
            y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        if training:
            torch.autograd.grad(y, qkv, gradient)

    steps = {}
    for name in _BACKENDS:
        try:
            step(name)
        except RuntimeError:  # no such kernel for this dtype, shape or device; or out of memory
            continue
        steps[name] = lambda name=name: step(name)
    times = {name: t.median * 1e3 for name, t in interleave(steps, device, rounds=5, time_limit=2.0).items()}
    return min(times, key=times.get), times

"""Time by kernel of one forward and backward of ``hydra_inner``, from the profiler, and the host's time of a call: what
is behind hydra_vision/ops/triton/NOTES.md. Whole models: ``hydra-vision bench``.

    python -m hydra_vision.bench.kernels kernels --batch 256 --length 196
    python -m hydra_vision.bench.kernels host --batch 1 --length 64

Needs a CUDA device.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..ops import hydra_inner

__all__ = ['host_times', 'kernel_times', 'main']


Call = Callable[[], object]


def _calls(batch: int, length: int, heads: int, headdim: int, d_state: int) -> tuple[Call, Call]:
    """A forward, and a forward with backward, of ``hydra_inner`` in bfloat16."""
    inner, width = heads * headdim, heads * headdim + 4 * d_state

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device='cuda')

    zxbcdt = normal(batch, length, inner + width + 2 * heads).bfloat16()
    conv, dt_bias = (normal(width, 1, 7) / 7**0.5, 0.1 * normal(width)), normal(heads) - 3
    ones = [torch.ones(heads, device='cuda'), normal(heads, inner) / inner**0.5, torch.ones(inner, device='cuda')]
    leaves = [t.requires_grad_() for t in (zxbcdt, *conv, dt_bias, torch.zeros(heads, device='cuda'), *ones)]
    gradient = normal(batch, length, inner).bfloat16()

    def forward() -> Tensor:
        return hydra_inner(*leaves, headdim=headdim, d_state=d_state)

    return forward, lambda: torch.autograd.grad(forward(), leaves, gradient)


def host_times(batch: int, length: int, heads: int, headdim: int, d_state: int, repeats: int = 100) -> list[float]:
    """Microseconds until Python is done with a forward, and with a forward and backward, best of five.

    Only where the GPU keeps up, for small sizes, is that the host's own time.
    """
    found = []
    for call in _calls(batch, length, heads, headdim, d_state):
        rounds = []
        for _ in range(6):  # the first one compiles
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            rounds.append((time.perf_counter() - start) / repeats * 1e6)
        found.append(min(rounds[1:]))
    return found


def kernel_times(batch: int, length: int, heads: int = 24, headdim: int = 64, d_state: int = 64, repeats: int = 4):
    """Milliseconds of every kernel in one forward and backward of ``hydra_inner`` (bfloat16), longest first."""
    _, step = _calls(batch, length, heads, headdim, d_state)
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    events = [(e.key, e.count / repeats, e.device_time_total / repeats / 1e3) for e in trace.key_averages()]
    return sorted((e for e in events if e[2] > 0), key=lambda e: -e[2])


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('kernels', 'host'), help='what to time')
    parser.add_argument('--batch', type=int, default=256)
    parser.add_argument('--length', type=int, default=196)
    parser.add_argument('--heads', type=int, default=24)
    parser.add_argument('--headdim', type=int, default=64)
    parser.add_argument('--d-state', type=int, default=64)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error('this measures on a CUDA device, and none is visible')
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16')
    sizes = (options.batch, options.length, options.heads, options.headdim, options.d_state)
    if options.what == 'host':
        forward, both = host_times(*sizes)
        print(f'host: forward {forward:.0f} us, forward + backward {both:.0f} us')
        return
    for name, count, milliseconds in kernel_times(*sizes):
        print(f'{milliseconds:8.3f} ms  {count:4.0f}x  {name[:90]}')


if __name__ == '__main__':
    main()

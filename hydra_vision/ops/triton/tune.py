"""Measure launch parameters on the GPU at hand and print a better row of the table. Nothing is changed on disk.

A candidate whose results are not those of plain PyTorch is not used: compilers have got some of them wrong.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Optional

import torch
from torch import Tensor
from triton.errors import TritonError

from ...console import Parser, positive
from ..chunked import mix_chunked
from .api import quasiseparable_mix
from .plan import forced_launch
from .table import DTYPES, Launch, bucket, launch_for

__all__ = ['Measured', 'candidates', 'main', 'tune']


@dataclass(frozen=True)
class Measured:
    """Times of one candidate in milliseconds; None, with the reason, where it does not run or is not right."""

    launch: Launch
    forward: Optional[float]
    both: Optional[float]
    reason: str = ''


def candidates(start: Launch) -> Iterator[Launch]:
    """The row in use, then one change at a time: last tile, heads a program, stages, warps."""
    yield start
    if start.tail:
        yield replace(start, tail=0)
    for kernel in ('mix_heads', 'dx_heads', 'scores_heads'):
        for heads in (4, 12, 24):
            yield replace(start, heads={**start.heads, kernel: heads})
        for stages in (1, 2, 3):
            yield replace(start, stages={**start.stages, kernel: stages})
    for kernel in ('states', 'state_grads', 'bc_grads'):
        for stages in (2, 3):
            yield replace(start, stages={**start.stages, kernel: stages})
        yield replace(start, warps={**start.warps, kernel: 8})


def _arguments(B: int, L: int, H: int, P: int, N: int, dtype: torch.dtype) -> list[Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device='cuda')

    steps = [torch.empty(B, L, H, device='cuda').uniform_(1e-3, 0.1) for _ in range(2)]
    main = [normal(B, L, 1, N).to(dtype) for _ in range(4)]
    tensors = [normal(B, L, H, P).to(dtype), *steps, -torch.ones(H, device='cuda'), *main, normal(B, L, H)]
    return [t.requires_grad_() for t in tensors]


def _time(function: Callable[[], object], repeats: int) -> float:
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)


def _wrong(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether a result is further from what it should be than rounding explains."""
    tolerance = 1e-3 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    for a, b in zip(found, expected):
        distance = float((a.float() - b.float()).norm())
        if not distance <= tolerance * float(b.float().norm()):  # not <=: NaN is wrong
            return True
    return False


def tune(
    L: int = 196,
    *,
    batch: int = 64,
    heads: int = 24,
    headdim: int = 64,
    d_state: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 20,
    report: Callable[[str], None] = print,
) -> list[Measured]:
    """Time ``quasiseparable_mix`` with every candidate row, report each, and return them, fastest training first.

    Args:
        L: tokens; the row found is meant for the bucket that holds it.
        batch: B; large enough to fill the GPU.
        heads: H.
        headdim: P.
        d_state: N.
        dtype: of x, B and C.
        repeats: runs a candidate, of which the median counts.
        report: called with one line of text a candidate.

    Raises:
        RuntimeError: no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError('tuning measures on a CUDA device, and none is visible')
    major, minor = torch.cuda.get_device_capability()
    start = launch_for(10 * major + minor, L, headdim, d_state, str(dtype).removeprefix('torch.'))
    arguments = _arguments(batch, L, heads, headdim, d_state, dtype)
    gradient = torch.randn_like(arguments[0])

    def both(mix: Callable[..., Tensor] = quasiseparable_mix) -> tuple[Tensor, ...]:
        y = mix(*arguments)
        return y.detach(), *torch.autograd.grad(y, arguments, gradient)

    expected = both(mix_chunked)
    found: list[Measured] = []
    for launch in candidates(start):
        with forced_launch(launch):
            try:
                if _wrong(both(), expected, dtype):
                    raise TritonError('its results are wrong')
                with torch.no_grad():
                    forward = _time(lambda: quasiseparable_mix(*arguments), repeats)
                found.append(Measured(launch, forward, _time(both, repeats)))
                report(f'{forward:8.3f} ms forward  {found[-1].both:8.3f} ms forward+backward  {launch}')
            except (RuntimeError, TritonError) as error:  # more shared memory or registers than there are, say
                reason = str(error).partition('\n')[0]
                found.append(Measured(launch, None, None, reason))
                report(f'{"-":>8} not usable: {reason}  {launch}')
    return sorted(found, key=lambda m: float('inf') if m.both is None else m.both)


def main(arguments: Optional[Sequence[str]] = None, prog: Optional[str] = None) -> int:
    """Command line of ``tune``: prints every candidate, then the fastest row and the key it belongs under.

    Returns:
        0, or 1 where no configuration runs.
    """
    parser = Parser(
        prog=prog,
        description='Measure launch parameters of the Triton kernels.',
        example='hydra-vision tune --length 196',
    )
    parser.add_argument('--length', type=positive, default=196, help='tokens L (default: %(default)s)')
    parser.add_argument('--batch', type=positive, default=64, help='batch size (default: %(default)s)')
    parser.add_argument('--heads', type=positive, default=24, help='heads H (default: %(default)s)')
    parser.add_argument('--headdim', type=int, default=64, choices=(16, 32, 64, 128), help='P (default: %(default)s)')
    parser.add_argument('--d-state', type=int, default=64, choices=(16, 32, 64, 128), help='N (default: %(default)s)')
    parser.add_argument('--dtype', default='bfloat16', choices=DTYPES, help='of x, B and C (default: %(default)s)')
    parser.add_argument('--repeats', type=positive, default=20, help='runs a candidate (default: %(default)s)')
    options = parser.parse_args(arguments)
    found = tune(
        options.length,
        batch=options.batch,
        heads=options.heads,
        headdim=options.headdim,
        d_state=options.d_state,
        dtype=getattr(torch, options.dtype),
        repeats=options.repeats,
    )
    best = found[0]
    if best.both is None:
        print(f'no configuration runs here: {best.reason}')
        return 1
    major, minor = torch.cuda.get_device_capability()
    key = (10 * major + minor, bucket(options.length), options.headdim, options.d_state, options.dtype)
    print(f'\n{torch.cuda.get_device_name()}, torch {torch.__version__}; fastest forward + backward:')
    print(f'{key}: {best.launch}')
    return 0

"""Times of the quasiseparable operator alone: our backends, its peers, attention over the same tokens for scale."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import allocated, peak_above, release
from .models import OUT_OF_MEMORY
from .peers import PEERS, SCANS, implementation, scan_alone
from .roofline import Roofline
from .timing import Timing, measure

__all__ = [
    'ATTENTION',
    'OperatorCase',
    'OperatorResult',
    'Shape',
    'operator_inputs',
    'run_shape',
]

ATTENTION = 'sdpa'
_CHUNK = 128


@dataclass(frozen=True)
class Shape:
    """x is (batch, length, heads, headdim); B and C have one group."""

    batch: int
    length: int
    heads: int
    headdim: int
    d_state: int

    def __str__(self) -> str:
        return f'B {self.batch}, L {self.length}, H {self.heads}, P {self.headdim}, N {self.d_state}'

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def attention_heads(self) -> int:
        """Heads of width P of a transformer as wide as the model around this operator (which expands by two)."""
        return max(1, self.heads // 2)


@dataclass(frozen=True)
class OperatorCase:
    """One implementation at one shape: a backend of ``quasiseparable_mix``, a peer or its scan (peers.py), attention.

    A scan alone is held against the floors of the whole operator.
    """

    backend: str
    shape: Shape
    mode: str
    dtype: torch.dtype

    @property
    def passes(self) -> str:
        return 'forward' if self.mode == 'infer' else 'forward+backward'

    @property
    def is_attention(self) -> bool:
        return self.backend == ATTENTION

    @property
    def flops(self) -> int:
        """Of the matrix products: the cheaper of one quadratic pass and chunks of 128 with states.

        The scores C.B^T are shared by the heads, both triangles are one pass. The backward pass counts twice the
        forward.
        """
        s = self.shape
        if self.is_attention:
            forward = 4 * s.tokens * s.length * s.attention_heads * s.headdim
        else:
            window = 2 * (s.d_state + s.heads * s.headdim)  # a token and a column of the matrix
            states = 8 * s.d_state * s.heads * s.headdim  # write and read, both directions
            forward = s.tokens * min(window * s.length, window * _CHUNK + states)
        return forward * (1 if self.mode == 'infer' else 3)

    @property
    def traffic(self) -> int:
        """Bytes that every argument and result, read or written once, amount to.

        The backward pass reads the arguments and the gradient of the result, and writes a gradient for each argument.
        """
        s, size = self.shape, self.dtype.itemsize
        if self.is_attention:
            width = s.attention_heads * s.headdim * size
            arguments, result = 3 * width, width
        else:
            result = s.heads * s.headdim * size
            arguments = result + 4 * s.d_state * size + 3 * s.heads * 4  # dt_f, dt_b and D are float32
        forward = arguments + result
        return s.tokens * (forward if self.mode == 'infer' else 2 * forward + arguments)


@dataclass(frozen=True)
class OperatorResult:
    """A case with what was measured; without a timing where it did not fit into memory."""

    case: OperatorCase
    timing: Optional[Timing] = None
    peak_bytes: Optional[int] = None
    gemm_share: Optional[float] = None
    memory_share: Optional[float] = None
    status: str = 'ok'


def operator_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Random arguments as an initialised mixer produces them: dt in [1e-3, 0.1], A = -1, the diagonal per token."""
    s = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device)

    arguments = {'x': normal(s.batch, s.length, s.heads, s.headdim).to(dtype)}
    for name in ('dt_f', 'dt_b'):
        arguments[name] = torch.empty(s.batch, s.length, s.heads, device=device).uniform_(1e-3, 0.1)
    arguments['A'] = -torch.ones(s.heads, device=device)
    for name in ('B_f', 'C_f', 'B_b', 'C_b'):
        arguments[name] = normal(s.batch, s.length, 1, s.d_state).to(dtype)
    arguments['D'] = normal(s.batch, s.length, s.heads)
    return arguments


def _operator_step(case: OperatorCase, arguments: dict[str, Tensor]) -> Callable[[], object]:
    training = case.mode == 'train'
    if case.is_attention:
        s = case.shape
        size = (s.batch, s.attention_heads, s.length, s.headdim)
        inputs = [torch.randn(size, device=arguments['x'].device, dtype=case.dtype) for _ in range(3)]
        forward = partial(F.scaled_dot_product_attention, *inputs)
    elif case.backend in SCANS:
        scan, inputs = scan_alone(case.backend, arguments)
        forward = partial(scan, *inputs)
    else:
        arguments = {name: t.clone() for name, t in arguments.items()}  # its own: they count as its memory
        inputs = list(arguments.values())
        forward = partial(implementation(case.backend), **arguments)

    if not training:

        def infer() -> Tensor:
            with torch.no_grad():
                return forward()

        return infer

    for t in inputs:
        t.requires_grad_()
    gradient = torch.randn_like(forward())

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), inputs, gradient)

    return train


def run_shape(
    cases: Sequence[OperatorCase],
    device: torch.device,
    roofline: Roofline,
    *,
    rounds: int,
    time_limit: float,
    progress: Callable[[str], None],
) -> list[OperatorResult]:
    """Time the implementations of one shape and one mode in turns, on the same arguments.

    Args:
        cases: All of one shape, dtype and mode.
        device: Where to run.
        roofline: The device's rates in the cases' dtype.
        rounds: Rounds at most.
        time_limit: Seconds of measuring.
        progress: Called with a line of text before each step that takes long.
    """
    arguments = operator_inputs(cases[0].shape, cases[0].dtype, device)
    steps: dict[OperatorCase, Callable[[], object]] = {}
    results: dict[OperatorCase, OperatorResult] = {}
    for case in cases:
        progress(f'warming up {case.backend}, {case.shape}, {case.passes}')
        before = allocated(device)
        try:
            step = _operator_step(case, arguments)
            for _ in range(2):
                step()
            results[case] = OperatorResult(case, peak_bytes=peak_above(step, device, before))
            steps[case] = step
        except torch.OutOfMemoryError:
            results[case] = OperatorResult(case, status=OUT_OF_MEMORY)
        except Exception as error:
            if case.backend not in (*PEERS, *SCANS):
                raise
            # Another project's kernels: what they cannot do here (a compiler they refuse, say) is a row of the table.
            results[case] = OperatorResult(case, status=f'{type(error).__name__}: {str(error).partition(chr(10))[0]}')
        if case not in steps:
            step = None
            release(device)
    progress(f'measuring {len(steps)} variants in turns')
    for case, timing in measure(steps, device, rounds=rounds, time_limit=time_limit).items():
        results[case] = replace(
            results[case],
            timing=timing,
            gemm_share=roofline.gemm_seconds(case.flops) / timing.median,
            memory_share=roofline.memory_seconds(case.traffic) / timing.median,
        )
    return [results[case] for case in cases]

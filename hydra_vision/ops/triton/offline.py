"""Compile every kernel launch of a problem without a GPU, and report registers, spills and shared memory.

The host code runs on meta tensors with launches recorded instead of executed, so that what is compiled here is what is
launched there: same kernels, same switches, same launch parameters.

    python -m hydra_vision.ops.triton.offline       # every row of the table; half an hour of CPU time, all cores
"""

import argparse
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from . import layernorm, selective_scan
from . import plan as plan_module
from .function import mix_backward_all, mix_forward_all
from .inner import KernelArguments, inner_backward, inner_forward
from .launch import is_descriptor
from .table import ARCHITECTURES, shipped

__all__ = [
    'SHARED_MEMORY',
    'Compiled',
    'Recorded',
    'compile_kernel',
    'compile_launch',
    'layer_norm_launches',
    'problem_launches',
    'selective_scan_launches',
    'table_launches',
]

# Tokens by which a row of each bucket is compiled: several tiles and 4 tokens more, which numbers 16 divides are alike.
_LENGTHS = {256: 196, 65536: 1092}
SHARED_MEMORY = {80: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes a block; 99 KB is what consumer cards have

_TYPES = {
    torch.float32: 'fp32',
    torch.float64: 'fp64',
    torch.float16: 'fp16',
    torch.bfloat16: 'bf16',
    torch.int32: 'i32',
}


@dataclass(frozen=True)
class Recorded:
    """One launch: kernel, argument types and compile-time values."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """Of the kernel's function."""
        return self.kernel.fn.__name__


@dataclass
class Compiled:
    """What the compiler says about one launch."""

    name: str
    registers: int
    spills: int
    shared: int
    options: dict[str, int] = field(default_factory=dict)


def _record(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorded:
    options = tuple((k, kwargs.pop(k)) for k in ('num_warps', 'num_stages', 'maxnreg') if k in kwargs)
    values = dict(zip(kernel.arg_names, args)) | kwargs
    signature, constants, divisible = [], [], []
    for parameter in kernel.params:
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature.append((parameter.name, 'constexpr'))
            constants.append((parameter.name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((parameter.name, f'*{_TYPES[value.dtype]}'))
            divisible.append(parameter.name)
        elif is_descriptor(value):
            box = f'{_TYPES[value.base.dtype]}{list(value.block_shape)}'
            signature.append((parameter.name, f'tensordesc<{box},{value.layout!r}>'))
        elif isinstance(value, float):
            signature.append((parameter.name, 'fp32'))
        elif value == 1 and not parameter.do_not_specialize:
            signature.append((parameter.name, 'constexpr'))
            constants.append((parameter.name, 1))
        else:
            signature.append((parameter.name, 'i32' if abs(value) < 2**31 else 'i64'))
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(parameter.name)
    return Recorded(kernel, tuple(signature), tuple(constants), tuple(divisible), options)


@contextmanager
def recorded_launches(arch: int) -> Iterator[list[Recorded]]:
    """Launches made inside the block are recorded, not run; the launch table is that of ``arch``."""
    launches: list[Recorded] = []

    def run(self: JITFunction, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
        launches.append(_record(self, args, kwargs))

    original, before = JITFunction.run, plan_module.ARCH_WITHOUT_DEVICE
    JITFunction.run, plan_module.ARCH_WITHOUT_DEVICE = run, arch
    try:
        yield launches
    finally:
        JITFunction.run, plan_module.ARCH_WITHOUT_DEVICE = original, before


def problem_launches(
    arch: int,
    L: int,
    *,
    B: int = 64,
    H: int = 24,
    P: int = 64,
    N: int = 64,
    G: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    init_states: bool = False,
    share_bc: bool = False,
    inner: bool = True,
    packed: bool = False,
) -> list[Recorded]:
    """Every distinct launch of forward and backward of ``hydra_inner`` (or ``quasiseparable_mix``).

    On Hopper the form of the models runs in whole chunks (chunks.py); G = 2 shows the portable kernels.
    """

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device='meta')

    start = empty(H, P, N) if init_states else None
    with recorded_launches(arch) as launches:
        if inner:
            d_inner, width = H * P, H * P + (2 if share_bc else 4) * G * N
            a = KernelArguments(
                empty(B, L, d_inner + width + 2 * H, dtype=dtype), empty(width, 1, 7), empty(width), empty(H), empty(H),
                empty(H), empty(H, d_inner), empty(d_inner), start, P, N, G, share_bc, (0.0, float('inf')), 1e-5,
                empty(L, dtype=torch.int32) if packed else None,
            )  # fmt: skip
            out, _, *saved = inner_forward(a, True)
            inner_backward(a, True, out, *saved, out)
        else:
            x, dt, bc = empty(B, L, H, P, dtype=dtype), empty(B, L, H), empty(B, L, G, N, dtype=dtype)
            arguments = (x, dt, dt, empty(H), bc, bc, bc, bc, empty(B, L, H), start)
            mix_backward_all(mix_forward_all(*arguments), *arguments)
    return list(dict.fromkeys(launches))


def table_launches(arch: int, largest: bool = False) -> dict[Recorded, str]:
    """What ``quasiseparable_mix`` launches for the table's rows of one architecture, with the first row that needs it.

    Where one group of B and C runs in whole chunks, also with two, for which the row is.

    Args:
        arch: One of the table's.
        largest: Of the rows that share launch parameters and dtype only the one with the largest headdim, d_state and
            L: a kernel needs no more shared memory for smaller ones.
    """
    rows = [(key, launch) for key, launch in shipped().items() if key[0] == arch]
    if largest:
        tops: dict[tuple[str, str], tuple[int, ...]] = {}
        for (_, limit, P, N, dtype), launch in rows:
            size = (min(P, N), max(P, N), limit)
            tops[dtype, repr(launch)] = max(size, tops.get((dtype, repr(launch)), size))
        rows = [
            (key, launch)
            for key, launch in rows
            if tops[key[4], repr(launch)] == (min(key[2:4]), max(key[2:4]), key[1])
        ]
    found: dict[Recorded, str] = {}
    for (_, limit, P, N, dtype), _ in rows:
        label = f'sm_{arch}, L to {limit}, P {P}, N {N}, {dtype}'
        problem = {'P': P, 'N': N, 'dtype': getattr(torch, dtype), 'inner': False}
        for G in (1, 2) if arch == 90 and (P, N, dtype) == (64, 64, 'bfloat16') else (1,):
            for launch in problem_launches(arch, _LENGTHS[limit], G=G, **problem):
                found.setdefault(launch, label)
    return found


def layer_norm_launches(D: int, dtype: torch.dtype = torch.bfloat16) -> list[Recorded]:
    """Forward and backward of the eager LayerNorm, alone and with the sum before it, the same on every architecture."""
    x, weight = torch.empty(4, 196, D, dtype=dtype, device='meta'), torch.empty(D, device='meta')
    factors = torch.empty(4, 196, device='meta')
    with recorded_launches(plan_module.ARCH_WITHOUT_DEVICE) as launches:
        layernorm.sum_of_rows(x, x, factors)
        for branch, scale in ((None, None), (x, None), (x, factors)):
            _, out, mean, rstd = layernorm.forward(x, branch, scale, weight, weight, 1e-6, dtype)
            layernorm.backward(out, x, weight, mean, rstd, branch, scale)
    return launches


def selective_scan_launches(N: int, dtype: torch.dtype = torch.bfloat16) -> list[Recorded]:
    """Forward and backward of the selective scan with N states, the same on every architecture."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device='meta')

    x, B, A, D = empty(4, 196, 1536, dtype=dtype), empty(4, 196, N, dtype=dtype), empty(1536, N), empty(1536)
    with recorded_launches(plan_module.ARCH_WITHOUT_DEVICE) as launches:
        y, steps, states = selective_scan.forward(x, x, A, B, B, D, D, True, False, True)
        selective_scan.backward(y, x, steps, A, B, B, D, states, dtype, True, False, True)
    return launches


def compile_kernel(launch: Recorded, arch: int) -> Any:
    """Triton's compiled kernel for sm_<arch>; needs Triton's own ptxas, no device."""
    names = [name for name, _ in launch.signature]
    attrs = {(names.index(name),): [['tt.divisibility', 16]] for name in launch.divisible}
    Source = ASTSource
    if launch.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    source = Source(launch.kernel, dict(launch.signature), dict(launch.constants), attrs)
    return triton.compile(source, target=GPUTarget('cuda', arch, 32), options=dict(launch.options))


def compile_launch(launch: Recorded, arch: int) -> Compiled:
    """What the compiler says about a launch on sm_<arch>."""
    compiled = compile_kernel(launch, arch)
    registers, spills = _resources(compiled, arch)
    return Compiled(launch.name, registers, spills, compiled.metadata.shared, dict(launch.options))


def _resources(compiled: Any, arch: int) -> tuple[int, int]:
    """(registers, spilled bytes), read from the cubin with Triton's cuobjdump."""
    import re
    import subprocess
    import tempfile

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, '-res-usage', file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r'REG:(\d+) STACK:(\d+)', text)
    if found is None:
        raise RuntimeError(f'cuobjdump said nothing about resources of sm_{arch}: {text!r}')
    return int(found[1]), int(found[2])


def _compile_numbered(arch: int, number: int) -> Compiled:
    """Of one launch by its place: kernels cannot be sent to another process."""
    return compile_launch(list(table_launches(arch))[number], arch)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Compile every row and print those that spill, or need more shared memory than there is.

    Returns:
        1 where a launch needs more shared memory than its architecture has, else 0.
    """
    parser = argparse.ArgumentParser(description='Compile every row of the launch table without a GPU.')
    parser.add_argument('--arch', type=int, nargs='+', default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='processes (default: %(default)s)')
    options = parser.parse_args(arguments)
    impossible = 0
    with multiprocessing.get_context('spawn').Pool(options.jobs) as pool:
        for arch in options.arch:
            labels = list(table_launches(arch).values())
            results = pool.starmap(_compile_numbered, [(arch, n) for n in range(len(labels))])
            for label, result in zip(labels, results):
                too_much = result.shared > SHARED_MEMORY[arch]
                impossible += too_much
                if result.spills or too_much:
                    print(f'{label}: {result}{"  TOO MUCH SHARED MEMORY" if too_much else ""}')
            print(f'sm_{arch}: {len(labels)} launches compiled', flush=True)
    return 1 if impossible else 0


if __name__ == '__main__':
    raise SystemExit(main())

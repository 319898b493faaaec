"""Starting kernels with little work on the host.

A launch through Triton binds its arguments, specialises them and builds a key from strings: 50 to 80 microseconds for
the argument lists here, longer than some of these kernels run. A block of a small model was bound by that. Here the
compiled kernel is kept by exactly what it was specialised for, and started directly when the same comes again.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton import knobs

__all__ = ['hooked', 'is_descriptor', 'launch', 'recorded']

LIMIT = 8192  # launches that are remembered; far more than one program of fixed sizes has
_known: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_recording = threading.local()  # .launches: where launches of this thread are noted


@contextmanager
def recorded() -> Iterator[list[tuple[Any, ...]]]:
    """Notes the launches on GPUs inside the block: (kernel, run, function, metadata), grid of three, arguments."""
    before = getattr(_recording, 'launches', None)
    _recording.launches = launches = []
    try:
        yield launches
    finally:
        _recording.launches = before


def is_descriptor(a: Any) -> bool:
    """Whether an argument is a tensor map: a tensor that the kernel reads or writes in boxes."""
    return hasattr(a, 'block_shape')


def _base(a: Any) -> Tensor:
    return a.base if is_descriptor(a) else a


def _key(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """Everything that a compiled kernel depends on, and the values of the integers, which say more than that."""
    key = [id(kernel), _base(args[0]).get_device()]
    for a in args:
        if isinstance(a, Tensor):
            key.append((a.dtype, a.data_ptr() % 16 == 0))
        elif is_descriptor(a):
            key.append((a.base.dtype, *a.block_shape, id(a.layout)))
        else:
            key.append(float if isinstance(a, float) else a)
    key.extend(constants.items())
    return tuple(key)


def hooked() -> bool:
    """Whether a profiler wants to hear of launches: those go through Triton."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(getattr(hook, 'calls', hook) for hook in hooks)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)`` on the device of the first tensor, which need not be the current one.

    Args:
        kernel: A ``triton.jit`` function, kept for the life of the process.
        grid: Programs along up to three axes.
        args: Runtime arguments in order, a tensor or a tensor map first: tensors, tensor maps, integers, floats.
        constants: The compile-time arguments and the launch options, by name.
    """
    first = _base(args[0])
    if not first.is_cuda:  # the interpreter, and compilation without a device
        kernel[grid](*args, **constants)
        return
    if first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            launch(kernel, grid, *args, **constants)
        return
    key = _key(kernel, args, constants)
    found = _known.get(key)
    x, y, z = (*grid, 1, 1)[:3]
    if found is None or hooked():
        compiled = kernel[grid](*args, **constants)
        if len(_known) >= LIMIT:
            _known.clear()
        rest = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        _known[key] = found = (compiled, compiled.run, compiled.function, compiled.packed_metadata, rest)
    else:
        _, run, function, metadata, rest = found
        stream = torch._C._cuda_getCurrentRawStream(key[1])
        run(x, y, z, stream, function, metadata, None, None, None, *args, *rest)
    launches = getattr(_recording, 'launches', None)
    if launches is not None:
        launches.append((found[:4], (x, y, z), (*args, *found[4])))

"""Remembered launches, and the kernels of a call started again: the same results at other addresses, and when not to.

Without a GPU: a kernel adds eight floats in Python, and tensors of the CPU say that they are on a device.
"""

import ctypes
import gc
import weakref
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip('triton')

N = 8


class OnDevice(torch.Tensor):
    """A CPU tensor that says that it is on a GPU; what is made from it says so too."""

    is_cuda = True

    def get_device(self):
        return 0


class Kernel:
    """out = a + scale * b + n, on tensors or their addresses. Notes launches through Triton, and direct ones."""

    arg_names = ('a', 'b', 'out', 'scale', 'n', 'T', 'FLAG')

    def __init__(self):
        self.slow, self.direct = [], []

    def __getitem__(self, grid):
        def start(*args, **constants):
            self.slow.append((grid, args, constants))
            self.add(*args)
            return Compiled(self)

        return start

    def add(self, a, b, out, scale, n, *constants):
        address = (t.data_ptr() if isinstance(t, torch.Tensor) else t for t in (a, b, out))
        a, b, out = ((ctypes.c_float * N).from_address(first) for first in address)
        for i in range(N):
            out[i] = a[i] + scale * b[i] + n


class Compiled:
    """What Triton returns from a launch."""

    function, packed_metadata = 'function', 'metadata'

    def __init__(self, kernel):
        def run(x, y, z, stream, function, metadata, *rest):
            assert (stream, function, metadata, rest[:3]) == ('stream', 'function', 'metadata', (None,) * 3)
            kernel.direct.append(((x, y, z), rest[3:]))
            kernel.add(*rest[3:])

        self.run = run


@pytest.fixture
def modules(monkeypatch):
    from hydra_vision.ops.triton import launch, replay

    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch._C, '_cuda_getCurrentRawStream', lambda device: 'stream', raising=False)
    for module in (launch, replay):
        monkeypatch.setattr(module, '_known', {})
    return launch, replay


def aligned(n=N, skip=0, dtype=torch.float32):
    """Random numbers at an address of 64 bytes, ``skip`` elements behind."""
    memory = torch.randn(n + 64).to(dtype)
    first = (-memory.data_ptr() // memory.element_size()) % (64 // memory.element_size()) + skip
    return memory[first : first + n].as_subclass(OnDevice)


SAME = {'T': 16, 'FLAG': True, 'num_warps': 4}


def test_the_same_call_is_started_directly_with_all_values_in_order(modules):
    kernel, x, y, out = Kernel(), aligned(), aligned(), aligned()
    modules[0].launch(kernel, (3,), x, y, out, 0.5, 5, FLAG=True, T=16, num_warps=4)
    modules[0].launch(kernel, (4, 2), y, x, out, 0.25, 5, FLAG=True, T=16, num_warps=4)
    assert len(kernel.slow) == 1
    ((sizes, values),) = kernel.direct
    assert sizes == (4, 2, 1)
    assert [id(t) for t in values[:3]] == [id(t) for t in (y, x, out)]
    assert values[3:] == (0.25, 5, 16, True)


def test_whatever_a_kernel_is_specialised_for_is_told_apart(modules):
    kernel, x, y, out = Kernel(), aligned(), aligned(), aligned()
    calls = [
        ((x, y, out, 0.5, 5), SAME),
        ((aligned(skip=1), y, out, 0.5, 5), SAME),  # a pointer that is not aligned
        ((x, aligned(2 * N, dtype=torch.bfloat16), out, 0.5, 5), SAME),
        ((x, y, out, 0.5, 1), SAME),
        ((x, y, out, 0.5, 16), SAME),
        ((x, y, out, 0.5, 5), {**SAME, 'FLAG': False}),
        ((x, y, out, 0.5, 5), {**SAME, 'num_warps': 8}),
    ]
    for args, constants in calls * 2:
        modules[0].launch(kernel, (1,), *args, **constants)
    assert len(kernel.slow) == len(kernel.direct) == len(calls)


def test_tensors_that_are_not_on_a_gpu_go_through_triton(modules):
    kernel, x = Kernel(), torch.zeros(N)
    for _ in range(2):
        modules[0].launch(kernel, (1,), x, x, x, 0.5, 5, **SAME)
    assert len(kernel.slow) == 2


def test_the_tensors_device_becomes_the_current_one(modules, monkeypatch):
    entered = []

    @contextmanager
    def device(which):
        entered.append(which)
        monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
        yield

    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'device', device)
    kernel, x = Kernel(), aligned()
    modules[0].launch(kernel, (1,), x, x, x, 0.5, 5, **SAME)
    assert entered == [x.device]
    assert len(kernel.slow) == 1


def case(modules, kernel, x, y):
    """r1 = x + 2 (x + y's second half), r2 = r1 + y's first half; a temporary, views of an input, an empty result."""
    launch, replay = modules

    def function():
        temporary, r1, r2 = (torch.empty(N).as_subclass(OnDevice) for _ in range(3))
        launch.launch(kernel, (3,), x, y[N:], temporary, 1.0, 0, **SAME)
        launch.launch(kernel, (3,), x, temporary, r1, 2.0, 0, **SAME)
        launch.launch(kernel, (3,), r1, y[:N], r2, 1.0, 0, **SAME)
        return r1, r2, None, x.new_empty(0)

    kernel.direct.clear()
    r1, r2, nothing, empty = replay.replayed(('case',), function, [x, y])
    assert nothing is None
    assert empty.numel() == 0
    expected = x + 2 * (x + y[N:])
    torch.testing.assert_close(torch.Tensor(r1), torch.Tensor(expected))
    torch.testing.assert_close(torch.Tensor(r2), torch.Tensor(expected + y[:N]))
    return r1, sum(isinstance(values[0], int) for _, values in kernel.direct)


def test_the_second_call_starts_kernels_by_address(modules):
    kernel = Kernel()
    first, by_address = case(modules, kernel, aligned(), aligned(2 * N))
    assert by_address == 0
    kept = torch.Tensor(first).clone()
    for _ in range(3):
        assert case(modules, kernel, aligned(), aligned(2 * N))[1] == 3
    assert torch.equal(torch.Tensor(first), kept)  # results are new tensors every time


def test_kernels_live_as_long_as_they_may_be_started(modules):
    """Triton unloads a compiled kernel that nothing refers to."""
    case(modules, Kernel(), aligned(), aligned(2 * N))
    known = [weakref.ref(found[0]) for found in modules[0]._known.values()]
    modules[0]._known.clear()
    gc.collect()
    assert all(reference() is not None for reference in known)


def test_addresses_that_other_kernels_are_for_are_not_replayed(modules):
    kernel = Kernel()
    case(modules, kernel, aligned(), aligned(2 * N))
    assert case(modules, kernel, aligned(skip=1), aligned(2 * N))[1] == 0


def test_inputs_that_overlap_are_not_recorded_but_may_be_replayed(modules):
    kernel, memory = Kernel(), aligned(2 * N)
    assert [case(modules, kernel, memory[:N], memory)[1] for _ in range(2)] == [0, 0]
    case(modules, kernel, aligned(), aligned(2 * N))
    assert case(modules, kernel, memory[:N], memory)[1] == 3


def test_another_device_than_the_current_one_is_not_replayed(modules, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 1)
    ran = []
    for _ in range(2):
        modules[1].replayed(('key',), lambda: ran.append(1) or (), [aligned()])
    assert len(ran) == 2
    assert not modules[1]._known


def test_profilers_hear_of_launches(modules, monkeypatch):
    from triton import knobs

    kernel = Kernel()
    case(modules, kernel, aligned(), aligned(2 * N))
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, 'calls', [lambda metadata: None])
    case(modules, kernel, aligned(), aligned(2 * N))
    assert not kernel.direct


@pytest.mark.parametrize('wrong', ['a part of a tensor', 'written by no kernel'])
def test_what_cannot_be_replayed_is_refused(modules, wrong):
    kernel, x = Kernel(), aligned()

    def function():
        out = torch.empty(2 * N).as_subclass(OnDevice)
        modules[0].launch(kernel, (3,), x, x, out, 1.0, 0, **SAME)
        return (out[:N],) if wrong == 'a part of a tensor' else (out, torch.zeros(N))

    with pytest.raises(RuntimeError, match='result'):
        modules[1].replayed((wrong,), function, [x])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA devices')
def test_a_model_on_another_device_than_the_current_one():
    from hydra_vision import Hydra

    mixer = Hydra(64, d_state=16, headdim=32, backend='triton')
    u = torch.randn(2, 20, 64)
    found = []
    for index in (0, 1):
        assert torch.cuda.current_device() == 0
        v = u.to(f'cuda:{index}').requires_grad_()
        y = mixer.to(v.device)(v)
        y.square().sum().backward()
        found.append((y.detach().cpu(), v.grad.cpu()))
    assert all(torch.equal(a, b) for a, b in zip(*found))

"""Kernels of a call started again: the same results at other addresses, and when not to."""

import ctypes
import gc
import weakref

import pytest
import torch

pytest.importorskip('triton')

N = 8


def floats(address):
    return (ctypes.c_float * N).from_address(address)


class Compiled:
    """A 'compiled kernel' out = a + scale * b on N floats, which takes tensors or their addresses."""

    function, packed_metadata = 'function', 'metadata'

    def __init__(self, direct):
        def run(x, y, z, stream, function, metadata, *rest):
            assert rest[:3] == (None, None, None)
            assert (x, y, z, stream, function, metadata) == (3, 1, 1, 'stream', 'function', 'metadata')
            a, b, out, scale, offset = rest[3:]
            direct.append(type(a))
            add(a, b, out, scale, offset)

        self.run = run


def add(a, b, out, scale, offset):
    address = [t.data_ptr() if isinstance(t, torch.Tensor) else t for t in (a, b, out)]
    a, b, out = (floats(value) for value in address)
    for i in range(N):
        out[i] = a[i] + scale * b[i] + offset


class Kernel:
    arg_names = ('a', 'b', 'out', 'scale', 'OFFSET')

    def __init__(self):
        self.direct = []

    def __getitem__(self, grid):
        def start(*args, **constants):
            add(*args, constants['OFFSET'])
            return Compiled(self.direct)

        return start


class OnDevice(torch.Tensor):
    """A CPU tensor that says that it is on a GPU; what is made from it says so too."""

    is_cuda = True

    def get_device(self):
        return 0


@pytest.fixture
def modules(monkeypatch):
    from hydra_vision.ops.triton import launch, replay

    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch._C, '_cuda_getCurrentRawStream', lambda device: 'stream', raising=False)
    monkeypatch.setattr(launch, '_known', {})
    monkeypatch.setattr(replay, '_known', {})
    return launch, replay


def case(modules, kernel, x, y):
    """r1 = x + 2 (x + y's second half), r2 = r1 + y's first half; a temporary, views of an input, an empty result."""
    launch, replay = modules

    def function():
        temporary, r1, r2 = (torch.empty(N).as_subclass(OnDevice) for _ in range(3))
        launch.launch(kernel, (3,), x, y[N:], temporary, 1.0, OFFSET=0)
        launch.launch(kernel, (3,), x, temporary, r1, 2.0, OFFSET=0)
        launch.launch(kernel, (3,), r1, y[:N], r2, 1.0, OFFSET=0)
        return r1, r2, None, x.new_empty(0)

    r1, r2, nothing, empty = replay.replayed(('case',), function, [x, y])
    assert nothing is None
    assert empty.numel() == 0
    expected = x + 2 * (x + y[N:])
    torch.testing.assert_close(torch.Tensor(r1), torch.Tensor(expected))
    torch.testing.assert_close(torch.Tensor(r2), torch.Tensor(expected + y[:N]))
    return r1


def aligned(n, skip=0):
    """Random numbers at an address of 64 bytes, ``skip`` elements behind."""
    memory = torch.randn(n + 64)
    first = (-memory.data_ptr() // 4) % 16 + skip
    return memory[first : first + n].as_subclass(OnDevice)


def test_the_second_call_starts_kernels_by_address(modules):
    kernel = Kernel()
    first = case(modules, kernel, aligned(N), aligned(2 * N))
    kept = torch.Tensor(first).clone()
    kernel.direct.clear()
    for _ in range(3):
        case(modules, kernel, aligned(N), aligned(2 * N))
    assert kernel.direct == [int] * 9
    assert torch.equal(torch.Tensor(first), kept)  # results are new tensors every time


def test_kernels_live_as_long_as_they_may_be_started(modules):
    """Triton unloads a compiled kernel that nothing refers to."""
    launch, replay = modules
    kernel = Kernel()
    case(modules, kernel, aligned(N), aligned(2 * N))
    known = [weakref.ref(found[0]) for found in launch._known.values()]
    launch._known.clear()
    gc.collect()
    assert all(reference() is not None for reference in known)


def test_addresses_that_other_kernels_are_for_are_not_replayed(modules):
    kernel = Kernel()
    case(modules, kernel, aligned(N), aligned(2 * N))
    kernel.direct.clear()
    case(modules, kernel, aligned(N, skip=1), aligned(2 * N))
    assert int not in kernel.direct


def test_inputs_that_overlap_are_not_recorded_but_may_be_replayed(modules):
    kernel = Kernel()
    memory = aligned(2 * N)
    for _ in range(2):
        case(modules, kernel, memory[:N], memory)
    assert int not in kernel.direct
    case(modules, kernel, aligned(N), aligned(2 * N))
    kernel.direct.clear()
    case(modules, kernel, memory[:N], memory)
    assert kernel.direct == [int] * 3


def test_another_device_than_the_current_one_is_not_replayed(modules, monkeypatch):
    launch, replay = modules
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 1)
    ran = []
    for _ in range(2):
        replay.replayed(('key',), lambda: ran.append(1) or (), [aligned(N)])
    assert len(ran) == 2
    assert not replay._known


def test_profilers_hear_of_launches(modules, monkeypatch):
    from triton import knobs

    kernel = Kernel()
    case(modules, kernel, aligned(N), aligned(2 * N))
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, 'calls', [lambda metadata: None])
    kernel.direct.clear()
    case(modules, kernel, aligned(N), aligned(2 * N))
    assert not kernel.direct


@pytest.mark.parametrize('wrong', ['a part of a tensor', 'written by no kernel'])
def test_what_cannot_be_replayed_is_refused(modules, wrong):
    launch, replay = modules
    kernel, x = Kernel(), aligned(N)

    def function():
        out = torch.empty(2 * N).as_subclass(OnDevice)
        launch.launch(kernel, (3,), x, x, out, 1.0, OFFSET=0)
        return (out[:N],) if wrong == 'a part of a tensor' else (out, torch.zeros(N))

    with pytest.raises(RuntimeError, match='result'):
        replay.replayed((wrong,), function, [x])

"""The remembered launch: which calls share a compiled kernel, and what the kernel is started with."""

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip('triton')


class OnDevice(torch.Tensor):
    """A CPU tensor that says that it is on a GPU."""

    is_cuda = True

    def get_device(self):
        return 0


class Compiled:
    """What Triton returns from a launch."""

    function, packed_metadata = 'function', 'metadata'

    def __init__(self, calls):
        self.run = lambda *values: calls.append(values)


class Kernel:
    """A jitted function that notes how it is launched through Triton."""

    arg_names = ('x', 'y', 'n', 'scale', 'T', 'FLAG')

    def __init__(self):
        self.slow, self.fast = [], []

    def __getitem__(self, grid):
        def start(*args, **constants):
            self.slow.append((grid, args, constants))
            return Compiled(self.fast)

        return start


@pytest.fixture
def start(monkeypatch):
    from hydra_vision.ops.triton import launch as module

    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch._C, '_cuda_getCurrentRawStream', lambda device: 'stream', raising=False)
    monkeypatch.setattr(module, '_known', {})
    return module.launch


def tensor(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype).as_subclass(OnDevice)


def test_the_same_call_is_started_directly_with_all_values_in_order(start):
    kernel, x, y = Kernel(), tensor(64), tensor(64)
    start(kernel, (3,), x, y, 5, 0.5, FLAG=True, T=16, num_warps=4)
    start(kernel, (4, 2), y, x, 5, 0.25, FLAG=True, T=16, num_warps=4)
    assert len(kernel.slow) == 1
    sizes, values = kernel.fast[0][:9], kernel.fast[0][9:]
    assert sizes == (4, 2, 1, 'stream', 'function', 'metadata', None, None, None)
    assert values[0] is y
    assert values[1] is x
    assert values[2:] == (5, 0.25, 16, True)


def test_whatever_a_kernel_is_specialised_for_is_told_apart(start):
    kernel, x, y = Kernel(), tensor(64), tensor(64)
    same = {'T': 16, 'FLAG': True, 'num_warps': 4}
    calls = [
        ((x, y, 5, 0.5), same),
        ((x[1:], y, 5, 0.5), same),  # a pointer that is not aligned
        ((x, tensor(64, dtype=torch.bfloat16), 5, 0.5), same),
        ((x, y, 1, 0.5), same),
        ((x, y, 16, 0.5), same),
        ((x, y, 5, 0.5), {**same, 'FLAG': False}),
        ((x, y, 5, 0.5), {**same, 'num_warps': 8}),
    ]
    for args, constants in calls * 2:
        start(kernel, (1,), *args, **constants)
    assert len(kernel.slow) == len(calls)
    assert len(kernel.fast) == len(calls)


def test_profilers_hear_of_launches(start, monkeypatch):
    from triton import knobs

    kernel, x = Kernel(), tensor(64)
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, 'calls', [lambda metadata: None])
    for _ in range(2):
        start(kernel, (1,), x, x, 5, 0.5, T=16, FLAG=True)
    assert len(kernel.slow) == 2


def test_tensors_that_are_not_on_a_gpu_go_through_triton(start):
    kernel, x = Kernel(), torch.zeros(4)
    for _ in range(2):
        start(kernel, (1,), x, x, 5, 0.5, T=16, FLAG=True)
    assert len(kernel.slow) == 2


def test_the_tensors_device_becomes_the_current_one(start, monkeypatch):
    entered = []

    @contextmanager
    def device(which):
        entered.append(which)
        monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
        yield

    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'device', device)
    kernel, x = Kernel(), tensor(64)
    start(kernel, (1,), x, x, 5, 0.5, T=16, FLAG=True)
    assert entered == [x.device]
    assert len(kernel.slow) == 1


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

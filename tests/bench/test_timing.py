"""The clock and the order of measuring."""

import time

import pytest
import torch

from hydra_vision.bench.memory import allocated, peak_above
from hydra_vision.bench.timing import MIN_ROUNDS, Timing, clock_for, cuda_seconds, measure, wall_seconds

CPU = torch.device('cpu')


def recorder(log: list[str], name: str, seconds: float = 0.0):
    def step() -> None:
        log.append(name)
        time.sleep(seconds)

    return step


def test_percentiles():
    timing = Timing(tuple(float(n) for n in (3, 1, 2, 5, 4, 6, 8, 7, 10, 9, 11)))
    assert (timing.p10, timing.median, timing.p90) == (2.0, 6.0, 10.0)
    assert Timing((2.0,)).p10 == Timing((2.0,)).p90 == 2.0


def test_variants_take_turns():
    log: list[str] = []
    names = ['a', 'b', 'c']
    times = measure({n: recorder(log, n, 0.06) for n in names}, CPU, rounds=3, warmup=1)
    assert list(times) == names
    assert log[:6] == ['a', 'a', 'b', 'b', 'c', 'c']  # warm-up, then one call to size the bursts
    assert log[6:] == ['a', 'b', 'c', 'b', 'c', 'a', 'c', 'a', 'b']  # every round begins with another variant
    for timing in times.values():
        assert len(timing.seconds) == 3
        assert timing.calls == 1
        assert timing.median >= 0.06


def test_short_calls_run_in_bursts():
    calls = []

    def clock(step, n: int) -> float:
        calls.append(n)
        return 0.001 * n

    timing = measure({'short': lambda: None}, CPU, rounds=4, clock=clock)['short']
    assert timing.calls == 50  # of 1 ms each: 50 ms
    assert calls[2:] == [50] * 4
    assert timing.seconds == pytest.approx([0.001] * 4)


def test_time_limit_keeps_a_spread():
    timing = measure({'a': recorder([], 'a', 0.06)}, CPU, rounds=50, time_limit=0.0)['a']
    assert len(timing.seconds) == MIN_ROUNDS


def test_wall_clock_counts_all_calls():
    log: list[str] = []
    assert wall_seconds(recorder(log, 'a', 0.02), 3) >= 0.06
    assert log == ['a'] * 3


def test_clock_of_the_device():
    assert clock_for(CPU) is wall_seconds
    assert clock_for(torch.device('cuda')) is cuda_seconds
    with pytest.raises(ValueError, match='meta'):
        clock_for(torch.device('meta'))


def test_cuda_clock_synchronises(monkeypatch):
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.name = 'end' if 'created' in log else 'start'
            log.append('created')

        def record(self) -> None:
            log.append(f'{self.name}.record')

        def synchronize(self) -> None:
            log.append(f'{self.name}.synchronize')

        def elapsed_time(self, end: 'Event') -> float:
            assert (self.name, end.name) == ('start', 'end')
            return 250.0

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: log.append('synchronize'))
    assert cuda_seconds(lambda: log.append('step'), 2) == 0.25
    assert log[2:] == ['synchronize', 'start.record', 'step', 'step', 'end.record', 'end.synchronize']


def test_memory_is_not_invented_on_the_cpu():
    assert allocated(CPU) is None
    assert peak_above(lambda: torch.zeros(1000), CPU, None) is None


@pytest.mark.gpu
def test_cuda_clock_waits_for_the_device():
    device = torch.device('cuda')
    a = torch.randn(4096, 4096, device=device)
    one = measure({'one': lambda: a @ a}, device, rounds=5)['one'].median

    def four() -> None:
        for _ in range(4):
            a @ a

    assert 3.0 < measure({'four': four}, device, rounds=5)['four'].median / one < 5.0
    assert one > 2 * 4096**3 / 2e15  # faster than any GPU: only the launch was timed


@pytest.mark.gpu
def test_peak_memory_leaves_others_out():
    device = torch.device('cuda')
    other = torch.zeros(1 << 20, device=device)
    before = allocated(device)
    own = torch.zeros(1 << 20, device=device)
    peak = peak_above(lambda: own * 2, device, before)
    assert other.numel() == own.numel()
    assert peak == 2 * 4 << 20

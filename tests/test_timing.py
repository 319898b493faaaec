"""The clock, the order of measuring, and what becomes of variants that fail."""

import time

import pytest
import torch

from hydra_vision import timing
from hydra_vision.timing import MIN_ROUNDS, Measurement, Roofline, Timing, clock_for, interleave, measure

CPU = torch.device('cpu')
QUICK = {'rounds': 3, 'time_limit': 0.0, 'burst': 0.0}


def recorder(log: list[str], name: str, seconds: float = 0.0):
    def step() -> None:
        log.append(name)
        time.sleep(seconds)

    return step


def test_percentiles():
    found = Timing(tuple(float(n) for n in (3, 1, 2, 5, 4, 6, 8, 7, 10, 9, 11)))
    assert (found.percentile(10), found.median, found.percentile(90)) == (2.0, 6.0, 10.0)


def test_rounds_are_interleaved():
    log: list[str] = []
    names = ['a', 'b', 'c']
    times = interleave({n: recorder(log, n, 0.06) for n in names}, CPU, rounds=3)
    assert list(times) == names
    assert log[:6] == ['a', 'a', 'b', 'b', 'c', 'c']  # warm-up, then one call to size the bursts
    assert log[6:] == ['a', 'b', 'c', 'b', 'c', 'a', 'c', 'a', 'b']  # every round begins with another variant
    for found in times.values():
        assert (len(found.seconds), found.calls) == (3, 1)
        assert found.median >= 0.06


def test_short_calls_run_in_bursts():
    calls = []

    def clock(step, n: int) -> float:
        calls.append(n)
        return 0.001 * n

    found = interleave({'short': lambda: None}, CPU, rounds=4, clock=clock)['short']
    assert found.calls == 50  # of 1 ms each: 50 ms
    assert calls[2:] == [50] * 4
    assert found.seconds == pytest.approx([0.001] * 4)


def test_time_limit_keeps_a_spread():
    found = interleave({'a': recorder([], 'a', 0.06)}, CPU, rounds=50, time_limit=0.0)['a']
    assert len(found.seconds) == MIN_ROUNDS


def test_clock_counts_all_calls():
    log: list[str] = []
    assert clock_for(CPU)(recorder(log, 'a', 0.02), 3) >= 0.06
    assert log == ['a'] * 3
    with pytest.raises(ValueError, match='meta'):
        clock_for(torch.device('meta'))


def test_columns_and_samples():
    found = Measurement(Timing((0.002, 0.001, 0.003), calls=5), peak_bytes=3 << 29)
    assert found.columns() == {
        'status': 'ok',
        'rounds': 3,
        'calls_per_round': 5,
        'median_ms': 2.0,
        'p10_ms': 1.2,
        'p90_ms': 2.8,
        'peak_memory_gib': 1.5,
    }
    assert found.samples() == [{'round': 0, 'ms': 2.0}, {'round': 1, 'ms': 1.0}, {'round': 2, 'ms': 3.0}]
    missing = Measurement(status='out of memory')
    assert not missing.failed
    assert (missing.median, missing.samples(), missing.columns()['median_ms']) == (None, [], None)


def test_memory_is_not_invented_on_the_cpu():
    assert measure({'a': lambda: lambda: torch.zeros(1000)}, CPU, **QUICK)['a'].peak_bytes is None


def test_what_does_not_fit_next_to_the_others_is_tried_alone():
    attempts = []

    def builder(name: str):
        def build():
            attempts.append(name)
            if name == 'large' or (name == 'tight' and attempts.count('tight') == 1):
                raise torch.OutOfMemoryError('full')
            return lambda: None

        return build

    found = measure({name: builder(name) for name in ('large', 'small', 'tight')}, CPU, **QUICK)
    assert list(found) == ['large', 'small', 'tight']
    assert (found['large'].status, found['large'].timing) == ('out of memory', None)
    assert (found['tight'].status, len(found['tight'].timing.seconds)) == ('ok', 3)
    assert attempts == ['large', 'small', 'tight', 'large', 'tight']


def test_no_room_for_all_of_them_at_once(monkeypatch):
    together = timing.interleave

    def scarce(steps, *args, **kwargs):
        if len(steps) > 1:
            raise torch.OutOfMemoryError('full')
        return together(steps, *args, **kwargs)

    monkeypatch.setattr(timing, 'interleave', scarce)
    for found in measure({name: lambda: lambda: None for name in 'ab'}, CPU, **QUICK).values():
        assert (found.status, found.timing is not None) == ('ok', True)


def test_what_fails_is_reported_and_the_others_are_measured():
    """When it is built, when it is first called, or only in the middle of timing."""

    def broken():
        raise RuntimeError('no such kernel\nand more')

    def short_lived(calls: int):
        def build():
            left = iter(range(calls))
            return lambda: next(left)

        return build

    builders = {'built': broken, 'called': short_lived(1), 'timed': short_lived(5), 'good': lambda: lambda: None}
    found = measure(builders, CPU, **QUICK)
    assert found['built'].status == 'failed: RuntimeError: no such kernel'
    assert found['called'].status == found['timed'].status == 'failed: StopIteration: StopIteration'
    assert all(found[name].failed and found[name].timing is None for name in ('built', 'called', 'timed'))
    assert (found['good'].status, found['good'].failed) == ('ok', False)


def test_an_interruption_is_no_result():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure({'a': interrupted}, CPU, **QUICK)


def test_floors():
    roofline = Roofline(flops_per_second=1e12, bytes_per_second=1e9)
    shares = roofline.shares(flops=1e9, size=2e5, seconds=0.002)
    assert shares == {'gemm_floor_share': 0.5, 'memory_floor_share': 0.1}
    assert set(roofline.shares(1, 1, None).values()) == {None}


@pytest.mark.gpu
def test_cuda_clock_waits_for_the_device():
    device = torch.device('cuda')
    a = torch.randn(4096, 4096, device=device)
    one = interleave({'one': lambda: a @ a}, device, rounds=5)['one'].median

    def four() -> None:
        for _ in range(4):
            a @ a

    assert 3.0 < interleave({'four': four}, device, rounds=5)['four'].median / one < 5.0
    assert one > 2 * 4096**3 / 2e15  # faster than any GPU: only the launch was timed


@pytest.mark.gpu
def test_peak_memory_leaves_others_out():
    def builder(size: int):
        def build():
            own = torch.zeros(size, device='cuda')
            return lambda: own * 2

        return build

    found = measure({size: builder(size) for size in (1 << 20, 1 << 22)}, torch.device('cuda'), **QUICK)
    assert {size: m.peak_bytes for size, m in found.items()} == {1 << 20: 8 << 20, 1 << 22: 8 << 22}

"""Pace, waiting and remaining time, with a clock that the tests set."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from hydra_vision.train import report


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(report, 'time', SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def slow_loader(clock: SimpleNamespace, batches: int, seconds: float):
    for batch in range(batches):
        clock.now += seconds
        yield batch


def test_pace_and_share_of_waiting(clock):
    """Half a second a batch from the loader, 1.5 of work; an earlier process did two batches in 10 s, waiting for 3."""
    meter = report.RunProgress(Console(file=io.StringIO()), epochs=4, batches=10, done=0.2)
    with meter.start_pass(0, 'train', 10) as phase:
        phase.resume(batches=2, images=16, seconds=10.0, waited=3.0)
        for _ in phase.read(slow_loader(clock, 4, 0.5)):
            clock.now += 1.5
            phase.advance(8)
        assert phase.seconds() == 18.0
        assert phase.rate() == pytest.approx((16 + 4 * 8) / 18)
        assert phase.waiting() == pytest.approx((3 + 4 * 0.5) / 18)
        assert (phase.batches, phase.images) == (6, 48)
    # 8 s for the 0.4 epochs of this process, 3.4 epochs are left
    assert meter.eta(0.6) == pytest.approx(8 / 0.4 * 3.4)
    assert meter.eta(0.2) != meter.eta(0.2)  # no pace yet


def test_the_speed_of_a_run_weighs_epochs_by_their_time():
    rows = [
        {'seconds': 10.0, 'images_per_second': 100.0, 'data_wait': 0.5},
        {'seconds': 30.0, 'images_per_second': 20.0, 'data_wait': 0.1},
    ]
    assert report.speed_line(rows).startswith('training 0:00:40, 40 img/s, waiting for data 20 % of it')

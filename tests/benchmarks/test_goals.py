"""The project's goals: from data to cases and verdicts."""

import pytest
import torch

from benchmarks import goals, read_goals
from benchmarks.goals import Goal, main, model_goals, verdict
from hydra_vision import bench
from hydra_vision.errors import UserError
from hydra_vision.io import read_csv
from hydra_vision.timing import Measurement, Roofline, Timing

TINY = """
models:
  - {device: cpu, model: test_hydra_vit, peer: test_vit, img_size: 32, batch: 2, execution: eager, infer: 0.001,
     train: 9}
  - {device: cuda, model: hydra_vit_base, peer: test_vit, img_size: 32, batch: 2, execution: eager, infer: 1}
linear:
  - {device: cpu, model: test_hydra_vit, img_size: 64, batch: 1, base: [32, 2], execution: eager, infer: 1.15}
"""
PAIR = {'device': 'cuda', 'model': 'a', 'img_size': 32, 'batch': 2, 'execution': 'compiled'}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The command with small goals; returns a folder for its output."""
    path = tmp_path / 'goals.yaml'
    path.write_text(TINY)
    monkeypatch.setattr(goals, 'read_goals', lambda: read_goals(path))
    monkeypatch.setattr(bench, 'measure_roofline', lambda *a: Roofline(1e12, 1e12))
    return tmp_path / 'out'


def measured(*seconds: float, peak: int | None = None) -> Measurement:
    return Measurement(Timing(seconds), peak)


def test_the_stated_goals_can_be_measured():
    stated = model_goals(read_goals())
    assert len(set(stated)) == len(stated)
    for goal in stated:
        ours, other = goal.pair('infer', None)
        assert bench.PEERS[goal.model] == (goal.peer or bench.PEERS[goal.model])
        assert {ours.execution, other.execution} <= set(bench.EXECUTIONS)
        assert (goal.peer is None) != (goal.base is None)
        assert other.model == (goal.peer or goal.model)


def test_images_per_second_and_memory_against_the_peer():
    goal = Goal(**PAIR, peer='b', infer=1.0, train=0.95, memory=1.0)
    (row,) = goal.verdicts('infer', measured(1.0, 2.0, 4.0, peak=1), measured(1.0, 3.0, 2.0, peak=1))
    assert (row['measured'], row['lowest'], row['highest']) == (1.0, 0.5, 1.5)  # medians; within one round
    assert (row['goal'], row['met']) == ('>= 1', True)
    speed, memory = goal.verdicts('train', measured(1.0, peak=101), measured(0.94, peak=100))
    assert (speed['measured'], speed['met']) == (0.94, False)
    assert (memory['measured'], memory['goal'], memory['met']) == (1.01, '<= 1', False)
    assert len(goal.verdicts('train', measured(1.0), measured(1.0))) == 1  # no memory on the CPU


def test_time_per_token_against_a_base_size():
    goal = Goal(**{**PAIR, 'img_size': 64, 'batch': 1}, base=(32, 2), infer=1.15)
    ours, other = goal.pair('infer', torch.bfloat16)
    assert (ours.img_size, ours.batch, other.img_size, other.batch) == ((64, 64), 1, (32, 32), 2)
    (row,) = goal.verdicts('infer', measured(2.2), measured(1.0))  # twice the tokens
    assert (row['measured'], row['lowest'], row['met']) == (1.1, None, True)


def test_limits():
    for limit in (dict(at_least=1.0), dict(at_most=1.0)):
        below, at, above = (verdict('a', value, **limit)['met'] for value in (0.9999999, 1.0, 1.0000001))
        assert (below, at, above) == ('at_most' in limit, True, 'at_least' in limit)
    assert (verdict('a', 1.0)['goal'], verdict('a', 1.0)['met']) == ('', None)


@pytest.mark.slow
def test_the_command(tiny, capsys):
    assert main(['--device', 'cpu', '--threads', '1', '--rounds', '3', '--time-limit', '0', '--output', str(tiny)]) == 0
    rows = read_csv(tiny / 'goals.csv')
    assert [(row['goal'], row['met']) for row in rows[:2]] == [('>= 0.001', 'True'), ('>= 9', 'False')]
    assert 'per token' in rows[2]['ratio']
    ran = {(row['model'], row['mode']): row['attention'] for row in read_csv(tiny / 'results.csv')}
    times = read_csv(tiny / 'attention.csv')
    for mode in ('infer', 'train'):  # the peer ran with the fastest of those that were measured
        own = {row['attention']: float(row['median_ms']) for row in times if row['mode'] == mode}
        assert ran['test_vit', mode] == min(own, key=own.get)
        assert ran['test_hydra_vit', mode] == ''
    printed = capsys.readouterr().out
    assert 'MISSED' in printed
    assert 'hydra_vit_base' not in printed  # of another device


@pytest.mark.parametrize('options', ['--models base', '--img-sizes 64', '--profile', '--execution compiled'])
def test_what_no_goal_is_about(tiny, options):
    with pytest.raises(UserError, match=r'no goal|needs a CUDA device'):
        main(['--device', 'cpu', *options.split(), '--output', str(tiny)])
    assert not tiny.exists()


@pytest.mark.gpu
def test_goals_with_a_profile(tmp_path, monkeypatch):
    path = tmp_path / 'goals.yaml'
    path.write_text(TINY.replace('device: cpu', 'device: cuda').replace('hydra_vit_base', 'test_hydra_vit'))
    monkeypatch.setattr(goals, 'read_goals', lambda: read_goals(path))
    argv = ['--rounds', '3', '--time-limit', '0', '--profile', '--output', str(tmp_path / 'out')]
    assert main(argv) == 0
    assert all(float(row['ms']) > 0 for row in read_csv(tmp_path / 'out' / 'kernels_test_hydra_vit_32_train_eager.csv'))

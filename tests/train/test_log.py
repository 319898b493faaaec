"""Metrics: statistics of layers, loggers, speed and remaining time."""

import importlib.util
import io
import math
import os
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from rich.console import Console

import hydra_vision  # noqa: F401  registers the models
from hydra_vision.errors import ConfigError, WriteError
from hydra_vision.io import read_csv
from hydra_vision.mixers import Hydra
from hydra_vision.ops.inner import split_zxbcdt, unpack_convolved
from hydra_vision.train import engine, log, report, stats
from hydra_vision.train.checkpoint import LAST, load_checkpoint
from hydra_vision.train.config import Config
from hydra_vision.train.log import CsvLogger
from hydra_vision.train.stats import across_layers, mixer_statistics, total_norm


def small_model(**kwargs) -> torch.nn.Module:
    return timm.create_model('hydra_vit_nano', img_size=16, patch_size=4, depth=2, num_classes=5, **kwargs)


@pytest.mark.parametrize('kwargs', [{}, {'share_bc': True, 'dt_limit': (0.02, 0.05)}])
def test_statistics_are_those_of_what_the_mixer_uses(kwargs):
    torch.manual_seed(0)
    model, images = small_model(**kwargs), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        model.blocks[1].mixer.A_log.add_(1.0)
    inputs = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Hydra):
            layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    found = mixer_statistics(model.train(), images)
    assert found.keys() == inputs.keys() == {'blocks.0.mixer', 'blocks.1.mixer'}
    assert model.training
    for name, u in inputs.items():
        layer = model.get_submodule(name)
        _, xbc, dt = split_zxbcdt(layer.in_proj(u), layer.d_inner, layer.nheads)
        numbers = (layer.headdim, layer.d_state, layer.ngroups, layer.share_bc)
        dt_f, dt_b = unpack_convolved(xbc, dt, layer.dt_bias, *numbers, (layer.dt_limit_min, layer.dt_limit_max))[1:3]
        dt = torch.stack([dt_f, dt_b]).detach()
        decay = torch.exp(-torch.exp(layer.A_log.detach()) * dt).flatten()
        assert found[name]['dt_mean'] == pytest.approx(float(dt.mean()), rel=1e-4)
        assert found[name]['dt_max'] == pytest.approx(float(dt.max()), rel=1e-4)
        for key, share in (('decay_q05', 0.05), ('decay_q50', 0.5), ('decay_q95', 0.95)):
            assert found[name][key] == pytest.approx(float(decay.quantile(share)), rel=1e-4)


def test_statistics_leave_no_hook_no_gradient_and_no_random_number_behind():
    model, images = small_model(drop_path_rate=0.5, drop_rate=0.5), torch.randn(2, 3, 16, 16)
    before = torch.get_rng_state()
    mixer_statistics(model.train(), images)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_many_tokens_are_thinned_out_but_not_heads(monkeypatch):
    """4 heads, every 8th decay: of one head alone, were they not taken by tokens."""
    monkeypatch.setattr(stats, '_MOST', 16)
    layer = small_model(headdim=64).blocks[0].mixer
    assert layer.nheads == 4
    with torch.no_grad():
        layer.A_log.copy_(torch.tensor([-20.0, -20.0, 20.0, 20.0]))  # decays of 1 and of 0
        found = stats._layer_statistics(layer, torch.randn(1, 16, 128))
    assert (float(found['decay_q05']), float(found['decay_q95'])) == (0.0, 1.0)


def test_a_model_without_hydra_layers_has_no_statistics_and_is_not_run():
    model = timm.create_model('test_vit')
    model.forward = None
    assert mixer_statistics(model, torch.zeros(1, 3, 160, 160)) == {}
    assert across_layers({}) == {}


def test_the_worst_layer_is_told():
    first = {'dt_mean': 1.0, 'dt_max': 2.0, 'decay_q05': 0.1, 'decay_q50': 0.4, 'decay_q95': 0.6}
    second = {'dt_mean': 3.0, 'dt_max': 1.0, 'decay_q05': 0.2, 'decay_q50': 0.6, 'decay_q95': 0.9}
    worst = {'dt_mean': 2.0, 'dt_max': 2.0, 'decay_q05': 0.1, 'decay_q50': 0.5, 'decay_q95': 0.9}
    assert across_layers({'a': first, 'b': second}) == worst


def test_total_norm():
    assert total_norm(iter([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])])) == 5.0


def test_rows_are_written_every_few_updates_and_nothing_is_measured_in_between(tiny, run, tmp_path, monkeypatch):
    calls = []
    measure = engine.mixer_statistics
    monkeypatch.setattr(engine, 'mixer_statistics', lambda *args: calls.append(1) or measure(*args))
    assert run(*tiny, '--set', 'log.every=4', '--output', 'run')[0] == 0
    rows, layers = read_csv(tmp_path / 'run' / 'steps.csv'), read_csv(tmp_path / 'run' / 'mixers.csv')
    assert [row['updates'] for row in rows] == ['4', '8', '12', '16']
    assert len(calls) == 4
    for row in rows:
        numbers = {key: float(value) for key, value in row.items() if value}
        assert all(math.isfinite(value) for value in numbers.values())
        assert numbers['grad_norm'] > 0
        assert numbers['param_norm'] > 1
        assert 0 < numbers['decay_q05'] <= numbers['decay_q50'] <= numbers['decay_q95'] <= 1
    assert [(row['updates'], row['layer']) for row in layers] == [(row['updates'], 'blocks.0.mixer') for row in rows]


@pytest.mark.slow
def test_measuring_changes_nothing(tiny, run, tmp_path, assert_same_run):
    random = ('--set', 'model.drop_rate=0.2', '--set', 'model.drop_path_rate=0.2')
    assert run(*tiny, *random, '--set', 'log.every=1', '--output', 'often')[0] == 0
    assert run(*tiny, *random, '--set', 'log.every=0', '--output', 'never')[0] == 0
    assert_same_run(tmp_path / 'often', tmp_path / 'never')
    assert not (tmp_path / 'never' / 'steps.csv').exists()


def test_rows_after_the_checkpoint_are_dropped_and_a_torn_one_as_well(tmp_path):
    rows = CsvLogger(tmp_path, 0)
    for updates in (5, 10, 15):
        rows.log(updates, {'step/epoch': 0.5, 'step/loss': 2.0, 'mixers/a.b/dt_mean': 0.1, 'epoch/val_top1': 50.0})
    with open(tmp_path / 'steps.csv', 'a') as file:
        file.write('20,1.0,0.0')  # killed while it was written
    CsvLogger(tmp_path, 10)
    assert [row['updates'] for row in read_csv(tmp_path / 'steps.csv')] == ['5', '10']
    assert [row['updates'] for row in read_csv(tmp_path / 'mixers.csv')] == ['5', '10']


@pytest.mark.slow
def test_a_full_disk_is_one_line_with_the_name_of_the_file(tmp_path):
    if not os.path.exists('/dev/full'):
        pytest.skip('this system has no /dev/full')
    (tmp_path / 'steps.csv').symlink_to('/dev/full')
    with pytest.raises(WriteError, match=r'could not write .*steps.csv: .*No space left on device'):
        CsvLogger(tmp_path, 0).log(1, {'step/loss': 1.0})


@pytest.mark.parametrize('junk', [b'\xff\xfe\x00', b''])
def test_a_damaged_log_does_not_end_a_resumed_run(tmp_path, junk):
    (tmp_path / 'steps.csv').write_bytes(junk)
    CsvLogger(tmp_path, 5).log(6, {'step/loss': 1.0})
    assert [row['updates'] for row in read_csv(tmp_path / 'steps.csv')] == ['6']


def test_a_compiled_run_is_measured_and_saved_as_a_plain_one(tiny, run, tmp_path):
    for name, compiled in (('plain', 'false'), ('compiled', 'true')):
        command = (*tiny, '--epochs', '2', '--set', 'log.every=5', '--compile', compiled, '--output', name)
        assert run(*command)[0] == 0
    assert not any('_orig_mod' in name for name in load_checkpoint(tmp_path / 'compiled' / LAST)['state_dict'])
    for first, second in zip(
        *(read_csv(tmp_path / name / 'mixers.csv') for name in ('plain', 'compiled')), strict=True
    ):
        for key in ('dt_mean', 'dt_max', 'decay_q50'):
            assert float(first[key]) == pytest.approx(float(second[key]), rel=1e-2)


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()['scalars']}


def test_tensorboard_holds_the_rows_and_goes_on_after_a_resume(tiny, run, tmp_path):
    pytest.importorskip('tensorboard')
    options = ('--set', 'log.tensorboard=true', '--set', 'log.every=2')
    assert run(*tiny, *options, '--epochs', 2, '--output', 'run')[0] == 0
    assert run('--resume', 'run', '--epochs', 3)[0] == 0
    events = read_events(tmp_path / 'run' / 'tensorboard')
    rows = [line.split(',') for line in (tmp_path / 'run' / 'summary.csv').read_text().splitlines()]
    column = rows[0].index('val_top1')
    logged = dict(events['epoch/val_top1'])
    assert logged == pytest.approx({int(row[1]): float(row[column]) for row in rows[1:]}, rel=1e-4)
    assert [step for step, _ in events['step/loss']] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert any(tag.startswith('mixers/') and tag.endswith('/dt_max') for tag in events)


def test_weights_and_biases_offline(tiny, run, tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_DIR', str(tmp_path))
    options = ('--set', 'log.wandb=offline', '--set', 'log.wandb_project=tests')
    code, _, error = run(*tiny, *options, '--epochs', 2, '--output', 'run')
    assert code == 0, error
    first = (tmp_path / 'run' / 'wandb_id').read_text()
    assert list((tmp_path / 'run' / 'wandb').glob('offline-run-*/*.wandb'))
    assert run('--resume', 'run', '--epochs', 3)[0] == 0
    assert (tmp_path / 'run' / 'wandb_id').read_text() == first


@pytest.mark.parametrize(('key', 'value'), [('tensorboard', 'true'), ('wandb', 'offline')])
def test_a_missing_package_is_told_before_any_work(tiny, fails, tmp_path, monkeypatch, key, value):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == key else find(name))
    error = fails(*tiny, '--set', f'log.{key}={value}', '--output', 'run', code=2)
    assert f"log.{key} needs the package {key}: pip install 'hydra-vision[log]'" in error
    assert not (tmp_path / 'run').exists()


def test_nothing_is_imported_where_nothing_is_asked_for(tmp_path):
    before = set(sys.modules)
    assert log.create_loggers(Config.from_dict({'log': {'every': 0}}), tmp_path, 0, {}) == []
    assert not {'wandb', 'tensorboard'} & (set(sys.modules) - before)
    with pytest.raises(ConfigError):
        Config.from_dict({'log': {'wandb': 'sometimes'}})


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

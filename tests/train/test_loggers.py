import importlib.util
import json
import sys

import pytest

from hydra_vision.errors import ConfigError
from hydra_vision.train import log
from hydra_vision.train.config import Config


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
    assert json.dumps(Config().to_dict()['log'])
    with pytest.raises(ConfigError):
        Config.from_dict({'log': {'wandb': 'sometimes'}})

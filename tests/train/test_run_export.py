"""Averaging of checkpoints, and export of runs."""

from pathlib import Path

import pytest
import timm
import torch

from hydra_vision.cli import main
from hydra_vision.errors import CheckpointError
from hydra_vision.train.average import average
from hydra_vision.train.checkpoint import BEST, LAST, load_checkpoint


@pytest.fixture(scope='module')
def runs(tiny, tmp_path_factory):
    """Two runs of the same recipe: the folders."""
    from hydra_vision.train.main import main as train

    folder = tmp_path_factory.mktemp('runs')
    for seed in (0, 1):
        assert train([*tiny, '--epochs', '2', '--seed', str(seed), '--output', str(folder / str(seed))]) == 0
    return [folder / '0', folder / '1']


def test_the_mean_of_two_checkpoints(runs, validated, fails, capsys):
    files = [str(folder / LAST) for folder in runs]
    assert main(['average-checkpoints', *files, '--output', 'mean.pt']) == 0
    first, second = (load_checkpoint(folder / LAST)['state_dict'] for folder in runs)
    mean = load_checkpoint(Path('mean.pt'))['state_dict']
    for name, value in mean.items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2)
    assert validated('mean.pt')['raw']['images'] == 18
    assert 'is a mean of checkpoints' in fails('--resume', 'mean.pt', code=1)  # weights alone are no run


def test_averages_that_make_no_sense(runs, tiny, capsys, tmp_path):
    file = str(runs[0] / LAST)
    (tmp_path / 'taken.pt').write_bytes(b'mine')
    for arguments, message in (
        ([file, '--output', 'a.pt'], 'give two checkpoints or more'),
        ([file, file, '--output', 'taken.pt'], 'exists already'),
        ([file, file, '--output', 'no/where.pt'], 'is not a folder'),
        ([file, 'nowhere.pt', '--output', 'a.pt'], "no checkpoint 'nowhere.pt'"),
    ):
        assert main(['average-checkpoints', *arguments]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / 'taken.pt').read_bytes() == b'mine'
    assert not (tmp_path / 'a.pt').exists()


def test_weights_of_different_models_are_not_averaged():
    one, two = {'a': torch.zeros(2)}, {'b': torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r'x and y are of different models: only one of them has a'):
        average([one, two], ['x', 'y'])
    with pytest.raises(CheckpointError, match=r'a has the shapes \(2,\) and \(3,\)'):
        average([one, {'a': torch.zeros(3)}], ['x', 'y'])


def test_counters_are_not_averaged_and_types_stay():
    states = [{'n': torch.tensor(k), 'w': torch.tensor([float(k)], dtype=torch.bfloat16)} for k in (1, 4)]
    mean = average(states, ['x', 'y'])
    assert mean['n'] == 4
    assert mean['w'].dtype == torch.bfloat16
    assert float(mean['w']) == 2.5


@pytest.mark.parametrize('weights', ['raw', 'ema'])
def test_a_run_becomes_a_timm_folder(runs, capsys, weights):
    assert main(['export-run', str(runs[0]), 'exported', '--weights', weights]) == 0
    model = timm.create_model('local-dir:exported', pretrained=True).eval()
    state = load_checkpoint(runs[0] / BEST)['state_dict' if weights == 'raw' else 'state_dict_ema']
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.pretrained_cfg['label_names'] == ['blue', 'green', 'red']
    assert model.pretrained_cfg['input_size'] == (3, 8, 8) or model.pretrained_cfg['input_size'] == [3, 8, 8]
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    assert main(['export-run', str(runs[0]), 'exported']) == 2  # nothing is overwritten
    assert 'exported holds config.json and model.safetensors already' in capsys.readouterr().err


def test_another_timm_model_is_exported_too(tiny, run, capsys):
    options = ('--model', 'test_vit', '--set', 'model.kwargs={patch_size: 4}', '--epochs', '2')
    changes = ('--set', 'model.drop_path_rate=0')
    assert run('--config', tiny[1], *tiny[2:], *options, *changes, '--output', 'vit')[0] == 0
    assert main(['export-run', 'vit', 'exported']) == 0
    model = timm.create_model('local-dir:exported', pretrained=True)
    assert model.num_classes == 3


def test_exports_that_cannot_be(capsys):
    assert main(['export-run', 'nowhere', 'folder']) == 2
    assert "no checkpoint 'nowhere'" in capsys.readouterr().err

"""Finished runs: what they leave behind, comparing them, averaging their checkpoints, exporting them."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from hydra_vision.console import Parser
from hydra_vision.errors import CheckpointError, UserError
from hydra_vision.io import read_csv
from hydra_vision.train import runs
from hydra_vision.train.checkpoint import BEST, LAST, load_checkpoint
from hydra_vision.train.main import main
from hydra_vision.train.report import RUN


def call(add_arguments, function, *arguments: object) -> int:
    parser = Parser(prog='test')
    add_arguments(parser)
    return function(parser.parse_args([str(argument) for argument in arguments]))


def compare(*arguments: object) -> int:
    return call(runs.add_compare_arguments, runs.compare_main, *arguments)


def average(*arguments: object) -> int:
    return call(runs.add_average_arguments, runs.average_main, *arguments)


def export(*arguments: object) -> int:
    return call(runs.add_export_arguments, runs.export_main, *arguments)


@pytest.fixture(scope='module')
def folders(tiny, tmp_path_factory) -> list[Path]:
    """Two seeds of one recipe, one of another."""
    folder = tmp_path_factory.mktemp('runs')
    for name, extra in (('a0', ()), ('a1', ('--seed', '1')), ('b0', ('--lr', '1e-3'))):
        assert main([*tiny, '--epochs', '2', *extra, '--output', str(folder / name)]) == 0
    return [folder / name for name in ('a0', 'a1', 'b0')]


def test_run_json_records_where_a_run_comes_from(folders, tiny, run, tmp_path):
    facts = json.loads((folders[0] / RUN).read_text())
    assert (facts['training_images'], facts['validation_images']) == (48, 18)
    assert facts['parameters'] > 1000
    assert set(facts['sessions'][0]) == {'started', 'command', 'git_commit', 'versions', 'device'}
    assert facts['sessions'][0]['versions']['torch']
    assert run('--resume', folders[2], '--epochs', 3, '--output', 'longer')[0] == 0
    assert run('--resume', 'longer', '--epochs', 4)[0] == 0
    assert len(json.loads((tmp_path / 'longer' / RUN).read_text())['sessions']) == 2


def test_compared_runs_are_a_table_and_a_picture(folders, capsys, tmp_path):
    assert compare(*folders, '--output', 'compared') == 0
    assert 'a0, a1' in capsys.readouterr().out  # runs that differ in the seed only are averaged
    rows = read_csv(tmp_path / 'compared' / 'compare.csv')
    assert [row['run'] for row in rows] == ['a0', 'a1', 'b0']
    assert [row['seed'] for row in rows] == ['0', '1', '0']
    facts = json.loads((folders[0] / RUN).read_text())
    assert rows[0]['params (M)'] == f'{facts["parameters"] / 1e6:.2f}'
    last = read_csv(folders[1] / 'summary.csv')[-1]
    assert float(rows[1]['top-1 % (last)']) == pytest.approx(float(last['val_top1']), abs=0.01)
    with Image.open(tmp_path / 'compared' / 'compare.png') as image:
        assert image.width > 1000
    assert (tmp_path / 'compared' / 'compare.md').read_text().count('a0') == 2


def test_folders_that_are_not_runs(folders, tmp_path):
    (tmp_path / 'empty').mkdir()
    broken = tmp_path / 'broken'
    broken.mkdir()
    for name in ('config.yaml', RUN, 'summary.csv'):
        (broken / name).write_text((folders[0] / name).read_text())
    (broken / RUN).write_text('{')
    for name, message in (
        ('nowhere', 'nowhere is not a folder'),
        ('empty', r'empty is not a readable run folder \(No such file or directory: empty'),
        ('broken', r'broken is not a readable run folder \(JSONDecodeError'),
    ):
        with pytest.raises(UserError, match=message):
            compare(folders[0], name)


def test_the_mean_of_two_checkpoints(folders, validated, fails):
    files = [folder / LAST for folder in folders[:2]]
    assert average(*files, '--output', 'mean.pt') == 0
    first, second = (load_checkpoint(file)['state_dict'] for file in files)
    for name, value in load_checkpoint(Path('mean.pt'))['state_dict'].items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2)
    assert validated('mean.pt')['raw']['images'] == 18
    assert 'is a mean of checkpoints' in fails('--resume', 'mean.pt', code=1)  # weights alone are no run


def test_averages_that_make_no_sense(folders, tmp_path):
    file = folders[0] / LAST
    (tmp_path / 'taken.pt').write_bytes(b'mine')
    for arguments, message in (
        ([file, '--output', 'a.pt'], 'give two checkpoints or more'),
        ([file, file, '--output', 'taken.pt'], 'exists already'),
        ([file, file, '--output', 'no/where.pt'], 'is not a folder'),
        ([file, 'nowhere.pt', '--output', 'a.pt'], "no checkpoint 'nowhere.pt'"),
    ):
        with pytest.raises(UserError, match=message):
            average(*arguments)
    assert (tmp_path / 'taken.pt').read_bytes() == b'mine'
    assert not (tmp_path / 'a.pt').exists()
    one, two = {'a': torch.zeros(2)}, {'b': torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r'x and y are of different models: only one of them has a'):
        runs.average([one, two], ['x', 'y'])
    with pytest.raises(CheckpointError, match=r'a has the shapes \(2,\) and \(3,\)'):
        runs.average([one, {'a': torch.zeros(3)}], ['x', 'y'])


def test_counters_are_not_averaged_and_types_stay():
    states = [{'n': torch.tensor(k), 'w': torch.tensor([float(k)], dtype=torch.bfloat16)} for k in (1, 4)]
    mean = runs.average(states, ['x', 'y'])
    assert mean['n'] == 4
    assert mean['w'].dtype == torch.bfloat16
    assert float(mean['w']) == 2.5


@pytest.mark.parametrize('weights', ['raw', 'ema'])
def test_a_run_becomes_a_timm_folder(folders, weights):
    assert export(folders[0], '--output', 'exported', '--weights', weights) == 0
    model = timm.create_model('local-dir:exported', pretrained=True).eval()
    state = load_checkpoint(folders[0] / BEST)['state_dict' if weights == 'raw' else 'state_dict_ema']
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.pretrained_cfg['label_names'] == ['blue', 'green', 'red']
    assert tuple(model.pretrained_cfg['input_size']) == (3, 8, 8)
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    assert export(folders[0], '--output', 'half', '--weights', weights, '--dtype', 'float16') == 0
    half = load_file('half/model.safetensors')
    assert all(torch.equal(half[name], value.half()) for name, value in state.items())
    with pytest.raises(UserError, match=r'exported holds config\.json and model\.safetensors already'):
        export(folders[0], '--output', 'exported')
    with pytest.raises(CheckpointError, match="no checkpoint 'nowhere'"):
        export('nowhere', '--output', 'other')


def test_another_timm_model_is_exported_too(tiny, run):
    options = ('--model', 'test_vit', '--set', 'model.kwargs={patch_size: 4}', '--epochs', '2')
    assert run(*tiny, *options, '--set', 'model.drop_path_rate=0', '--output', 'vit')[0] == 0
    assert export('vit', '--output', 'exported') == 0
    assert timm.create_model('local-dir:exported', pretrained=True).num_classes == 3

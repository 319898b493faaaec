"""The console script: what it prints, how it fails."""

import json
from importlib.metadata import entry_points

import pytest
import torch

import hydra_vision
from hydra_vision import cli
from hydra_vision.cli import main
from hydra_vision.ops.dispatch import BACKENDS


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['--version'])
    assert stop.value.code == 0
    assert hydra_vision.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    'command',
    [
        *([], ['env'], ['models'], ['train'], ['extract'], ['visualize'], ['bench']),
        *(['runs'], ['runs', 'compare'], ['runs', 'average'], ['runs', 'export']),
        *(['probe'], ['probe', 'knn'], ['probe', 'linear'], ['export'], ['export', 'onnx'], ['export', 'aoti']),
        *(['segment'], ['segment', 'train'], ['segment', 'time'], ['segment', 'compare']),
    ],
)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, '--help'])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f'usage: hydra-vision {" ".join(command)}'.rstrip())


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        main(['--help'])
    out = capsys.readouterr().out
    for command in cli._COMMANDS:
        assert f'  {command} ' in out


def test_unknown_names_bring_the_nearest(fails):
    assert "'bench'" in fails('bensh')
    assert "'onnx'" in fails('export', 'onxx')
    assert "'hydra_vit_base'" in fails('models', 'hydra_vit_bsae')


def test_env_tables(capsys):
    assert main(['env']) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert hydra_vision.__version__ in out
    for backend in BACKENDS:
        assert backend in out
    assert 'default on cpu' in out
    if not torch.cuda.is_available():
        assert 'missing: no CUDA device is visible' in out


def test_env_json(capsys):
    assert main(['env', '--json']) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts['versions']['hydra_vision'] == hydra_vision.__version__
    assert {'python', 'torch', 'triton', 'timm', 'torchvision', 'mamba_ssm'} <= set(facts['versions'])
    assert facts['devices'][0]['device'] == 'cpu'
    assert facts['devices'][0]['threads'] == torch.get_num_threads()
    assert set(facts['backends']) == set(BACKENDS)
    for backend in facts['backends'].values():
        assert backend['available'] == (backend['missing'] is None)
    assert facts['defaults']['cpu'] == {'backend': 'chunked', 'why': 'default on cpu', 'available': True}


def test_env_shows_the_environment_variable(capsys, monkeypatch):
    monkeypatch.setenv('HYDRA_VISION_BACKEND', 'reference')
    assert main(['env', '--json']) == 0
    default = json.loads(capsys.readouterr().out)['defaults']['cpu']
    assert default['backend'] == 'reference'
    assert 'HYDRA_VISION_BACKEND' in default['why']


def test_env_refuses_an_unknown_backend(fails, monkeypatch):
    monkeypatch.setenv('HYDRA_VISION_BACKEND', 'cuda')
    assert 'HYDRA_VISION_BACKEND' in fails('env')


def test_models_table(capsys):
    assert main(['models', '*nano']) == 0
    out = capsys.readouterr().out
    assert 'hydra_vit_nano' in out
    assert 'hydra_vit_tiny' not in out
    assert '1.88' in out
    assert '3 x 224 x 224' in out
    assert 'none' in out
    assert 'multiply and add as one' in out  # it says what is counted


def test_models_json(capsys):
    assert main(['models', 'hydra_vit_[nt]*', '--json']) == 0
    nano, tiny = json.loads(capsys.readouterr().out)  # smaller first
    assert nano['name'] == 'hydra_vit_nano'
    assert nano['weights'] is None
    assert tiny['name'] == 'hydra_vit_tiny'
    assert tiny['params_m'] == pytest.approx(7.08, abs=0.005)
    assert tiny['input_size'] == [3, 224, 224]
    # the projections alone: patch embedding, 24 x (in_proj + out_proj), 196 tokens
    projections = 196 * (768 * 192 + 24 * 192 * (2 * 384 + 4 * 64 + 12 + 384)) / 1e9
    assert projections < tiny['gmacs'] < 2 * projections


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU to tune for')
def test_tune_says_what_is_missing(fails):
    assert 'no CUDA device is visible' in fails('tune')


def test_train_gets_its_arguments(capsys):
    assert main(['train', '--list-configs']) == 0
    assert 'hydra_vit_base_imagenet1k' in capsys.readouterr().out


def test_script_is_installed():
    scripts = entry_points(group='console_scripts', name='hydra-vision')
    if not scripts:
        pytest.skip('the package is imported from a checkout that is not installed')
    assert {script.value for script in scripts} == {'hydra_vision.cli:main'}

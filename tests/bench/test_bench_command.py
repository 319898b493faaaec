"""The command from arguments to files."""

import contextlib
import csv
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from hydra_vision.bench import main as command
from hydra_vision.bench import planning
from hydra_vision.bench.roofline import Roofline
from hydra_vision.cli import main

COLUMNS = [
    *('model', 'backend', 'img_size', 'batch', 'mode', 'execution', 'dtype', 'device', 'threads', 'images_per_s'),
    *('status', 'rounds', 'calls_per_round', 'median_ms', 'p10_ms', 'p90_ms', 'peak_memory_gib'),
    *('gemm_floor_share', 'memory_floor_share'),
]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> tuple[str, Path]:
    """One small run on the CPU: (what it printed, its folder)."""
    folder = tmp_path_factory.mktemp('bench') / 'out'
    options = '--device cpu --threads 1 --models test_hydra_vit --img-sizes 32,64 --batch-sizes 2,1 --mode infer,train'
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        argv = ['bench', *options.split(), '--repeats', '3', '--time-limit', '0', '--output', str(folder)]
        assert main(argv) == 0
    return printed.getvalue(), folder


def test_rows(run):
    rows = rows_of(run[1] / 'results.csv')
    assert list(rows[0]) == COLUMNS
    keys = {(r['model'], r['img_size'], r['batch'], r['mode'], r['execution']) for r in rows}
    assert keys == {
        (model, size, batch, mode, 'eager')
        for model in ('test_hydra_vit', 'test_vit')  # the peer comes by itself
        for size, batch in (('32', '2'), ('64', '1'))
        for mode in ('infer', 'train')
    }
    for row in rows:
        assert row['status'] == 'ok'
        assert row['threads'] == '1'
        assert row['dtype'] == 'float32'
        assert row['backend'] == ('auto' if row['model'] == 'test_hydra_vit' else '')
        assert 0 < float(row['p10_ms']) <= float(row['median_ms']) <= float(row['p90_ms'])
        speed = int(row['batch']) * 1000 / float(row['median_ms'])
        assert float(row['images_per_s']) == pytest.approx(speed, rel=1e-3)
        assert row['peak_memory_gib'] == ''  # not invented on the CPU
        assert float(row['gemm_floor_share']) >= 0


def test_samples_hold_every_round(run):
    samples = rows_of(run[1] / 'samples.csv')
    assert len(samples) == 3 * len(rows_of(run[1] / 'results.csv'))
    first = rows_of(run[1] / 'results.csv')[0]
    own = [float(s['ms']) for s in samples if all(s[k] == first[k] for k in ('model', 'img_size', 'mode', 'execution'))]
    assert sorted(own)[1] == pytest.approx(float(first['median_ms']))


def test_picture(run):
    with Image.open(run[1] / 'results.png') as image:
        assert image.format == 'PNG'
        assert min(image.size) > 300
        assert len(image.convert('RGB').getcolors(1 << 24)) > 10


def test_environment_file(run):
    facts = json.loads((run[1] / 'environment.json').read_text())
    assert facts['run']['dtype'] == 'float32'
    assert facts['versions']['torch'] == torch.__version__
    assert facts['roofline']['flops_per_second'] > 1e9


def test_printed(run):
    printed, folder = run
    for text in ('TF32', 'float32', '1 CPU threads', torch.__version__, 'no optimizer', 'GEMM', 'TFLOP/s', 'TB/s'):
        assert text in printed
    assert 'test_hydra_vit / test_vit' in printed
    assert str(folder) in printed
    assert 'goals' not in printed  # no row that a goal is about


def test_threads_are_given_back(run):
    assert torch.get_num_threads() == 1  # tests/conftest.py


def test_operator_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, 'measure_roofline', lambda *a: Roofline(1e12, 1e12))
    options = '--device cpu --operator --shapes 1x20 --heads 2 --headdim 8 --d-state 4 --mode infer,train'
    argv = ['bench', *options.split(), '--repeats', '3', '--time-limit', '0', '--output', str(tmp_path)]
    assert main(argv) == 0
    rows = rows_of(tmp_path / 'operators.csv')
    names = {'reference', 'chunked', 'sdpa'}
    assert {(r['operator'], r['B'], r['L'], r['passes']) for r in rows} == {
        (name, '1', '20', passes) for name in names for passes in ('forward', 'forward+backward')
    }
    assert {r['N'] for r in rows if r['operator'] == 'chunked'} == {'4'}
    assert {r['H'] for r in rows if r['operator'] == 'sdpa'} == {'1'}
    printed = ' '.join(capsys.readouterr().out.split())
    assert 'not measured: mamba_ssm, mamba_ssm/128' in printed
    assert 'simple_gla, simple_gla/scan (' in printed
    assert 'speed / sdpa' in printed


def test_default_plan_on_the_cpu(monkeypatch, tmp_path, capsys):
    """What the bare command runs there: the rows of the three goals."""
    plans = []
    monkeypatch.setattr(command, 'measure_roofline', lambda *a: Roofline(1e12, 1e12))
    monkeypatch.setattr(planning, 'count_model', lambda *a: None)
    monkeypatch.setattr(command, '_bench_models', lambda cases, *a: plans.append((cases, torch.get_num_threads())))
    monkeypatch.chdir(tmp_path)
    assert main(['bench', '--device', 'cpu']) == 0
    (folder,) = (tmp_path / 'output').iterdir()  # the folder that it names
    assert str(Path('output') / folder.name) in capsys.readouterr().out
    ((cases, threads),) = plans
    assert threads == 2
    assert {(c.model, c.img_size, c.batch) for c in cases} == {
        (model, *place)
        for model in ('hydra_vit_tiny', 'deit_tiny_patch16_224')
        for place in ((224, 8), (448, 1), (896, 1), (1024, 1))
    }
    assert {(c.mode, c.compiled, c.dtype) for c in cases} == {('infer', False, torch.float32)}


def test_goals_plan_their_rows(monkeypatch, tmp_path, capsys):
    plans = []
    monkeypatch.setattr(command, 'measure_roofline', lambda *a: Roofline(1e12, 1e12))
    monkeypatch.setattr(command, '_bench_models', lambda cases, *a: plans.append(cases))
    monkeypatch.chdir(tmp_path)
    assert main(['bench', '--device', 'cpu', '--goals', '--img-sizes', '1024']) == 0
    assert [(c.model, c.batch) for c in plans[0]] == [('hydra_vit_tiny', 1), ('deit_tiny_patch16_224', 1)]
    assert 'float32' in capsys.readouterr().out


def test_batches_on_cuda_follow_the_tokens():
    sizes = [224, 512, 1024, 2048, 8192]
    assert planning.batch_sizes(None, sizes, torch.device('cuda')) == [256, 64, 16, 4, 1]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('--models hydra_vit_bas', "'hydra_vit_base'"),
        ('--models test_hydra_vit --img-sizes 100', 'cannot run at 100 px'),
        ('--img-sizes 224,448 --batch-sizes 8,4,2', '3 values for 2 image sizes'),
        ('--img-sizes 0', "'0' is not a positive integer"),
        ('--models test_hydra_vit, --img-sizes 32', 'empty element'),
        ('--mode inference', 'allowed: infer, train'),
        ('--repeats 2', 'at least 3'),
        ('--time-limit soon', "'soon'"),
        ('--backend tritn --models test_hydra_vit', "'triton'"),
        ('--backend chunked --models test_vit', 'none is in test_vit'),
        ('--device tpu', "'tpu'"),
        ('--device meta', 'cuda and cpu'),
        ('--operator --models test_vit', '--models does not go with --operator'),
        ('--heads 4', '--heads needs --operator'),
        ('--cuda-graphs', '--cuda-graphs needs a CUDA device'),
        ('--operator --cuda-graphs', '--cuda-graphs does not go with --operator'),
        ('--goals --models test_vit', '--models does not go with it'),
        ('--goals --operator', '--operator'),
        ('--goals --img-sizes 300', 'no goal is about 300 px'),
        ('--goals --mode train', 'no goal for cpu is about train'),
        ('--operator --shapes 4', 'BATCHxLENGTH'),
        ('--operator --backend simple_gla/skan', "'simple_gla/skan'; the nearest valid name is 'simple_gla/scan'"),
        ('--operator --backend mamba_ssm/64/scan', '--backend: mamba_ssm/64/scan cannot run here: '),
        ('--backend simple_gla/scan --models test_hydra_vit', 'no model computes with simple_gla/scan'),
        ('--models test_hydra_vit --img-sizes 32 --output /dev/null/here', '--output'),
        ('--model test_vit', 'unrecognized arguments'),
    ],
)
def test_bad_arguments(capsys, options, message):
    device = [] if '--device' in options else ['--device', 'cpu']
    try:
        code = main(['bench', *device, *options.split()])
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert captured.err.count('\n') == 1, captured.err
    assert captured.out == ''


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
@pytest.mark.parametrize('options', ['--device cuda', '--device cpu --backend triton'])
def test_what_needs_a_gpu_says_so(capsys, options):
    assert main(['bench', *options.split()]) == 2
    assert 'CUDA' in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_default_that_cannot_run(capsys, monkeypatch):
    monkeypatch.setenv('HYDRA_VISION_BACKEND', 'mamba_ssm')
    assert main(['bench', '--device', 'cpu', '--models', 'test_hydra_vit', '--img-sizes', '32']) == 2
    message = capsys.readouterr().err
    assert "'auto' is mamba_ssm (HYDRA_VISION_BACKEND is set)" in message
    assert message.count('\n') == 1


@pytest.mark.gpu
def test_cuda_run(tmp_path, capsys):
    options = '--models test_hydra_vit --img-sizes 160 --batch-sizes 8 --compile both --repeats 3 --time-limit 0'
    assert main(['bench', '--device', 'cuda', *options.split(), '--output', str(tmp_path)]) == 0
    rows = rows_of(tmp_path / 'results.csv')
    assert {(r['mode'], r['execution']) for r in rows} == {
        (mode, execution) for mode in ('infer', 'train') for execution in ('eager', 'compiled')
    }
    assert {r['dtype'] for r in rows} == {'bfloat16'}
    assert all(float(r['peak_memory_gib']) > 0 for r in rows)
    assert torch.cuda.get_device_name() in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize('what', ['kernels', 'host'])
def test_times_of_one_call(what, capsys):
    from hydra_vision.bench import kernels

    kernels.main([what, '--batch', '1', '--length', '64', '--heads', '2'])
    text = capsys.readouterr().out
    assert ('mix_heads_kernel' if what == 'kernels' else 'forward + backward') in text


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_times_of_one_call_need_a_gpu(capsys):
    pytest.importorskip('triton')
    from hydra_vision.bench import kernels

    with pytest.raises(SystemExit):
        kernels.main(['host'])
    assert 'CUDA device' in capsys.readouterr().err


@pytest.mark.gpu
def test_cuda_graphs_run(tmp_path):
    options = '--models test_hydra_vit --img-sizes 160 --batch-sizes 8 --repeats 3 --time-limit 0 --cuda-graphs'
    assert main(['bench', '--device', 'cuda', *options.split(), '--output', str(tmp_path)]) == 0
    rows = rows_of(tmp_path / 'results.csv')
    assert {r['execution'] for r in rows} == {'compiled, CUDA graphs'}
    assert {r['mode'] for r in rows} == {'infer', 'train'}
    assert all(r['status'] == 'ok' and r['peak_memory_gib'] == '' for r in rows)


@pytest.mark.gpu
def test_cuda_operator_run(tmp_path, capsys):
    argv = ['bench', '--device', 'cuda', '--operator', '--shapes', '4x196', '--repeats', '3', '--time-limit', '0']
    assert main([*argv, '--backend', 'triton,chunked,reference', '--output', str(tmp_path)]) == 0
    rows = rows_of(tmp_path / 'operators.csv')
    assert {r['operator'] for r in rows} == {'triton', 'chunked', 'reference', 'sdpa'}
    assert all(float(r['memory_floor_share']) > 0 for r in rows)

"""`hydra-vision bench` from arguments to files."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from hydra_vision import bench
from hydra_vision.bench import Case, build_step, time_models
from hydra_vision.cli import main
from hydra_vision.io import read_csv

CPU = torch.device('cpu')
COLUMNS = [
    *('model', 'backend', 'img_size', 'batch', 'mode', 'execution', 'attention', 'dtype', 'device', 'threads'),
    *('images_per_s', 'status', 'rounds', 'calls_per_round', 'median_ms', 'p10_ms', 'p90_ms', 'peak_memory_gib'),
    *('gemm_floor_share', 'memory_floor_share'),
]


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> tuple[str, Path]:
    """One small run on the CPU: (what it printed, its folder)."""
    folder = tmp_path_factory.mktemp('bench') / 'out'
    options = '--device cpu --threads 1 --models test_hydra_vit --img-sizes 32,64x32 --batch-sizes 2,1'
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        argv = ['bench', *options.split(), '--mode', 'infer,train', '--rounds', '3', '--time-limit', '0']
        assert main([*argv, '--output', str(folder)]) == 0
    return printed.getvalue(), folder


def test_rows(run):
    rows = read_csv(run[1] / 'results.csv')
    assert list(rows[0]) == COLUMNS
    keys = {(r['model'], r['img_size'], r['batch'], r['mode'], r['execution'], r['attention']) for r in rows}
    assert keys == {
        (model, size, batch, mode, 'eager', attention)
        for model, attention in (('test_hydra_vit', ''), ('test_vit', 'flash'))  # the peer comes by itself
        for size, batch in (('32', '2'), ('64x32', '1'))
        for mode in ('infer', 'train')
    }
    for row in rows:
        assert (row['status'], row['threads'], row['dtype']) == ('ok', '1', 'float32')
        assert row['backend'] == ('auto' if row['model'] == 'test_hydra_vit' else '')
        assert 0 < float(row['p10_ms']) <= float(row['median_ms']) <= float(row['p90_ms'])
        speed = int(row['batch']) * 1000 / float(row['median_ms'])
        assert float(row['images_per_s']) == pytest.approx(speed, rel=1e-3)
        assert row['peak_memory_gib'] == ''  # not invented on the CPU


def test_samples_hold_every_round(run):
    samples = read_csv(run[1] / 'samples.csv')
    assert len(samples) == 3 * len(read_csv(run[1] / 'results.csv'))
    first = read_csv(run[1] / 'results.csv')[0]
    own = [float(s['ms']) for s in samples if all(s[k] == first[k] for k in ('model', 'img_size', 'mode', 'execution'))]
    assert sorted(own)[1] == pytest.approx(float(first['median_ms']))


def test_ratios_pair_the_same_place(run):
    times = {(r['model'], r['img_size'], r['mode']): float(r['median_ms']) for r in read_csv(run[1] / 'results.csv')}
    ratios = read_csv(run[1] / 'ratios.csv')
    assert len(ratios) == 4
    for row in ratios:
        assert (row['model'], row['peer'], row['attention']) == ('test_hydra_vit', 'test_vit', 'flash')
        peer, ours = (times[model, row['img_size'], row['mode']] for model in ('test_vit', 'test_hydra_vit'))
        assert float(row['speed']) == pytest.approx(peer / ours, rel=1e-3)
        assert float(row['lowest']) <= float(row['speed']) <= float(row['highest'])


def test_picture_and_environment(run):
    with Image.open(run[1] / 'results.png') as image:
        assert image.format == 'PNG'
        assert min(image.size) > 300
        assert len(image.convert('RGB').getcolors(1 << 24)) > 10
    facts = json.loads((run[1] / 'environment.json').read_text())
    assert (facts['run']['dtype'], facts['run']['attention']) == ('float32', 'auto')
    assert facts['versions']['torch'] == torch.__version__
    assert facts['roofline']['flops_per_second'] > 1e9


def test_printed(run):
    printed, folder = run
    for text in ('TF32', 'float32', '1 CPU threads', torch.__version__, 'no optimizer', 'GEMM', 'TFLOP/s', 'TB/s'):
        assert text in printed
    assert str(folder) in printed
    assert torch.get_num_threads() == 1  # given back: tests/conftest.py


def test_results_of_another_run_are_kept(run, capsys):
    before = {path.name: path.read_bytes() for path in run[1].iterdir()}
    assert main(['bench', '--device', 'cpu', '--models', 'test_vit', '--output', str(run[1])]) == 2
    assert 'holds the results of another run' in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run[1].iterdir()} == before


@pytest.mark.slow
def test_default_plan_on_the_cpu(monkeypatch, tmp_path, capsys):
    plans = []

    def measure(cases, run, arguments):
        plans.append((cases, torch.get_num_threads()))
        return {}

    monkeypatch.setattr(bench, 'measure_models', measure)
    monkeypatch.setattr(bench, 'measure_roofline', lambda *a: bench.Roofline(1e12, 1e12))
    monkeypatch.chdir(tmp_path)
    assert main(['bench', '--device', 'cpu']) == 0
    (folder,) = (tmp_path / 'output').iterdir()  # the folder that it names
    assert str(Path('output') / folder.name) in capsys.readouterr().out
    ((cases, threads),) = plans
    assert threads == 2
    assert {(c.model, c.img_size, c.batch) for c in cases} == {
        (model, *place)
        for model in ('hydra_vit_tiny', 'deit_tiny_patch16_224')
        for place in (((224, 224), 8), ((448, 448), 1))
    }
    assert {(c.mode, c.execution, c.dtype) for c in cases} == {('infer', 'eager', None)}


def test_batches_on_cuda_follow_the_tokens():
    sizes = [(side, side) for side in (224, 512, 1024, 2048, 8192)]
    assert bench._batch_sizes(None, sizes, torch.device('cuda')) == [256, 64, 16, 4, 1]


@pytest.mark.parametrize(
    ('options', 'word'),
    [
        ('--models hydra_vit_bas', "'hydra_vit_base'"),
        ('--models test_hydra_vit --img-sizes 100', 'cannot run at 100x100 px'),
        ('--img-sizes 224,448 --batch-sizes 8,4,2', '3 values for 2 image sizes'),
        ('--mode inference', 'allowed: infer, train'),
        ('--execution jit', 'allowed: eager, compiled, graphs'),
        ('--execution graphs', 'CUDA'),
        ('--attention flsh', "'flsh'"),
        ('--rounds 2', 'at least 3'),
        ('--time-limit soon', "'soon'"),
        ('--backend tritn --models test_hydra_vit', "'triton'"),
        ('--backend chunked --models test_vit', 'no model with a choice is in test_vit'),
        ('--device meta', "'meta'"),
        ('--models test_hydra_vit --img-sizes 32 --output /dev/null/here', '--output'),
        ('--model test_vit', 'unrecognized arguments'),
    ],
)
def test_bad_arguments(fails, options, word):
    device = [] if '--device' in options else ['--device', 'cpu']
    assert word in fails('bench', *device, *options.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_what_needs_a_gpu_says_so(fails, monkeypatch):
    for options in ('--device cuda', '--device cpu --backend triton'):
        assert 'cuda' in fails('bench', *options.split()).lower()
    monkeypatch.setenv('HYDRA_VISION_BACKEND', 'mamba_ssm')
    error = fails('bench', '--device', 'cpu', '--models', 'test_hydra_vit', '--img-sizes', '32')
    assert "'auto', which is 'mamba_ssm', cannot run here" in error


# What is timed


def small(model: str = 'test_vit', side: int = 32, mode: str = 'infer', **kwargs) -> Case:
    return Case(model, (side, side), 2, mode, **kwargs)


def test_infer_step():
    _, step = build_step(small('test_hydra_vit', backend='reference'), CPU)
    output = step()
    assert output.shape == (2, 1000)
    assert not output.requires_grad
    assert build_step(small(dtype=torch.bfloat16), CPU)[1]().dtype == torch.bfloat16  # autocast
    _, step = build_step(small('test_hydra_vit', kwargs='{"num_classes": 7, "in_chans": 1}'), CPU)
    assert step().shape == (2, 7)


def test_train_step_runs_the_backward_pass():
    model, step = build_step(small('test_hydra_vit', mode='train', backend='auto'), CPU)
    assert model.training
    step()
    first = [p.grad.clone() for p in model.parameters()]
    step()  # no optimizer: the same gradients again, not their sum
    for before, parameter in zip(first, model.parameters()):
        torch.testing.assert_close(parameter.grad, before)


def timed(cases: list[Case]) -> list[dict[Case, bench.Measurement]]:
    return list(time_models(cases, CPU, rounds=3, time_limit=0.0))


def test_eager_sizes_are_measured_together_on_the_cpu():
    cases = [small(side=side, mode=mode, attention='math') for mode in ('infer', 'train') for side in (32, 64)]
    groups = timed(cases)
    assert [list(group) for group in groups] == [cases[:2], cases[2:]]  # 'math' ran
    assert all(measured.status == 'ok' for group in groups for measured in group.values())


def test_compiled_sizes_are_measured_one_by_one(monkeypatch):
    monkeypatch.setattr(bench, 'measure', lambda builders, *_, **__: dict.fromkeys(builders, bench.Measurement()))
    cases = [small(side=side, execution='compiled') for side in (32, 64)]
    assert [list(group) for group in timed(cases)] == [[case] for case in cases]


def test_a_model_that_fails_is_a_row_and_the_command_says_so(tmp_path, monkeypatch, capsys):
    build = bench.build_step

    def faulty(case: Case, device: torch.device):
        if case.model == 'test_vit':
            raise torch.OutOfMemoryError('full') if case.mode == 'infer' else RuntimeError('no kernel')
        return build(case, device)

    monkeypatch.setattr(bench, 'build_step', faulty)
    monkeypatch.setattr(bench, 'measure_roofline', lambda *a: bench.Roofline(1e12, 1e12))
    options = '--device cpu --models test_hydra_vit --img-sizes 32 --batch-sizes 1 --rounds 3 --time-limit 0'
    assert main(['bench', *options.split(), '--mode', 'infer,train', '--output', str(tmp_path)]) == 1
    status = {(row['model'], row['mode']): row['status'] for row in read_csv(tmp_path / 'results.csv')}
    assert status['test_vit', 'infer'] == 'out of memory'
    assert status['test_vit', 'train'] == 'failed: RuntimeError: no kernel'
    assert status['test_hydra_vit', 'infer'] == status['test_hydra_vit', 'train'] == 'ok'
    assert 'out of memory' in capsys.readouterr().out
    assert not (tmp_path / 'ratios.csv').exists()


@pytest.mark.gpu
def test_cuda_run(tmp_path, capsys):
    options = '--models test_hydra_vit --img-sizes 160 --batch-sizes 8 --execution eager,compiled,graphs --rounds 3'
    argv = ['bench', '--device', 'cuda', *options.split(), '--mode', 'infer,train', '--time-limit', '0']
    assert main([*argv, '--output', str(tmp_path)]) == 0
    rows = read_csv(tmp_path / 'results.csv')
    executions = ('eager', 'compiled', 'compiled, CUDA graphs')
    assert {(r['mode'], r['execution']) for r in rows} == {(m, e) for m in ('infer', 'train') for e in executions}
    assert {r['dtype'] for r in rows} == {'bfloat16'}
    for row in rows:
        assert (row['peak_memory_gib'] == '') == (row['execution'] == 'compiled, CUDA graphs')
        assert row['attention'] == '' if row['model'] == 'test_hydra_vit' else row['attention'] in bench.ATTENTION
    assert torch.cuda.get_device_name() in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize('attention', ['flash', 'efficient'])
def test_a_compiled_model_runs_the_attention_asked_for(attention):
    case = Case('test_vit', (160, 160), 8, 'train', 'compiled', torch.bfloat16, attention=attention)
    (group,) = time_models([case], torch.device('cuda'), rounds=3, time_limit=0.0)
    assert list(group) == [case]
    assert group[case].peak_bytes > 8 * 3 * 160 * 160 * 4  # the images at least

"""The mixer ablation: families, equal parameters, runs that continue, tables."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import timm

from benchmarks.ablation import __main__ as command
from benchmarks.ablation import runs
from benchmarks.ablation.__main__ import Speed, main, plot, table_rows
from benchmarks.ablation.rows import FOLDER, Family, Row, fit_rows, read_family
from hydra_vision import mixers
from hydra_vision.errors import UserError
from hydra_vision.io import read_csv
from hydra_vision.train.config import merge, read_recipe

DIGITS = """
model: {name: hydra_vit_nano, num_classes: 10, in_chans: 1, kwargs: {patch_size: 2, embed_dim: 32, depth: 1}}
data: {name: sklearn/digits, img_size: 8, batch_size: 128, workers: 0, mean: [0.3], std: [0.38]}
schedule: {epochs: 1}
run: {device: cpu, threads: 1}
"""


@pytest.fixture
def digits(tmp_path):
    path = tmp_path / 'digits.yaml'
    path.write_text(DIGITS)
    return str(path)


@pytest.mark.parametrize(('name', 'count'), [('table2', 17), ('table3', 7)])
def test_packaged_families(name, count):
    family = read_family(name)
    assert len({row.name for row in family.rows}) == len(family.rows) == count
    assert {row.mixer for row in family.rows} <= set(mixers.list_mixers())


HYBRID = Row('hybrid', 'hybrid', ['hydra', 'hydra', 'hydra', 'attention'], kwargs={'headdim': 16})


@pytest.mark.parametrize(
    ('family', 'names', 'kwargs', 'tolerance'),
    [
        pytest.param('table2', ('dense', 'attention-dd', 'm2', 'vit'), {}, 0.05, marks=pytest.mark.slow),
        pytest.param('table3', ('concat', 'causal'), {}, 0.05, marks=pytest.mark.slow),
        ('table2', ('m2', 'toeplitz-dd'), {'embed_dim': 768, 'depth': 4}, 0.02),
    ],
)
def test_rows_get_the_parameters_of_the_reference(family, names, kwargs, tolerance):
    recipe = merge(read_recipe(str(FOLDER / 'cifar10.yaml')), {'model': {'kwargs': kwargs}})
    rows = {row.name: row for row in read_family(family).rows}
    reference = rows[read_family(family).reference]
    target, *fitted = fit_rows((reference, *(rows[name] for name in names), HYBRID), reference, recipe)
    for row in fitted:
        assert row.parameters == pytest.approx(target.parameters, rel=tolerance)
        built = merge(recipe['model']['kwargs'], row.model_kwargs)
        model = timm.create_model('hydra_vit_nano', img_size=32, num_classes=10, device='meta', **built)
        assert row.parameters == sum(p.numel() for p in model.parameters())
        assert len({type(block.mixer) for block in model.blocks}) == (2 if row.row is HYBRID else 1)


@pytest.mark.parametrize('mixer', ['hydar', ['hydra', 'attention', 'attention'], 'dense'])
def test_rows_that_cannot_be_fitted_are_named(mixer):
    recipe = read_recipe(str(FOLDER / 'cifar10.yaml'))
    recipe = merge(recipe, {'model': {'kwargs': {'patch_size': 1} if mixer == 'dense' else {}}})  # too many parameters
    reference = next(row for row in read_family('table2').rows if row.name == 'quasiseparable-dd')
    with pytest.raises(UserError, match=r'^row odd: '):
        fit_rows((Row('odd', 'odd', mixer),), reference, recipe)


def test_family_files_are_checked(tmp_path):
    def read(text):
        (tmp_path / 'mine.yaml').write_text(text)
        return read_family(str(tmp_path / 'mine.yaml'))

    good = read(
        '{title: t, reference: a, kwargs: {x: 1}, rows: {a: {label: A, mixer: hydra, kwargs: {x: null, y: 2}}}}'
    )
    assert good.rows == (Row('a', 'A', 'hydra', kwargs={'y': 2}),)
    for text in (
        '{title: t, reference: b, rows: {a: {label: A, mixer: hydra}}}',
        '{title: t, reference: a, rows: {a: {label: A, mixer: hydra, expnad: 2}}}',
        '{title: t, reference: a, rows: {a: {label: A, mixer: hydra, adjust: depth}}}',
        '- a',
    ):
        with pytest.raises(UserError):
            read(text)
    with pytest.raises(UserError, match='table2, table3'):
        read_family('table4')


@pytest.mark.slow
def test_runs_are_trained_kept_and_reported(digits, tmp_path, capsys):
    output = tmp_path / 'ablation'
    argv = ['--config', digits, '--family', 'table2', '--output', str(output), '--time-limit', '0']
    assert main([*argv, '--rows', 'toeplitz-di']) == 0
    out = capsys.readouterr().out
    assert '[1/1] toeplitz-di-seed0: top-1' in out
    (line,) = read_csv(output / 'results.csv')
    (epoch,) = read_csv(output / 'runs' / 'toeplitz-di-seed0' / 'summary.csv')
    assert float(line['top1']) == float(epoch['val_top1'])
    speeds = {(line['row'], line['mode']): float(line['images_per_s']) for line in read_csv(output / 'speed.csv')}
    assert speeds['toeplitz-di', 'infer'] > speeds['toeplitz-di', 'train'] > 0
    table = (output / 'tables.md').read_text()
    assert f'| {float(line["top1"]):.2f} | 1 |' in table
    assert (output / 'ablation.png').stat().st_size > 1000

    before = (output / 'runs' / 'toeplitz-di-seed0' / 'last.pt').stat().st_mtime_ns
    assert main([*argv, '--rows', 'toeplitz-di', '--steps', 'train']) == 0
    assert '1 of 1 runs are finished already' in capsys.readouterr().out
    assert (output / 'runs' / 'toeplitz-di-seed0' / 'last.pt').stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r'holds a run with schedule.epochs=1, this one has 2'):
        main([*argv, '--rows', 'toeplitz-di', '--epochs', '2'])


def test_a_failed_run_is_told_and_the_others_go_on(digits, tmp_path, capsys, monkeypatch):
    exits = {'add': 'raise SystemExit(3)', 'causal': ''}

    def start(run, jobs):
        return subprocess.Popen([sys.executable, '-S', '-c', exits[run.fitted.row.name]])

    monkeypatch.setattr(runs, '_start', start)
    argv = ['--config', digits, '--family', 'table3', '--rows', 'add,causal', '--steps', 'train']
    assert main([*argv, '--output', str(tmp_path / 'out')]) == 1
    out = capsys.readouterr().out
    assert 'add-seed0: FAILED with exit code 3' in out
    assert 'causal-seed0: FAILED with exit code 0' in out  # it ended well, without a result
    assert out.count('not finished') == 2


def test_speeds_are_kept_and_a_failing_row_ends_nothing(digits, tmp_path, capsys, monkeypatch):
    output = tmp_path / 'out'
    argv = ['--config', digits, '--family', 'table3', '--steps', 'speed', '--time-limit', '0', '--output', str(output)]
    build, asked = Speed._build, []

    def faulty(self, name, mode, ran):
        asked.append((name, mode))
        if asked[-1] == ('add', 'infer'):
            raise RuntimeError('no kernel for 17 heads')
        if asked[-1] == ('causal', 'train'):
            raise KeyboardInterrupt  # as a machine's time limit would end it
        return build(self, name, mode, ran)

    with monkeypatch.context() as patch:
        patch.setattr(Speed, '_build', faulty)
        with pytest.raises(KeyboardInterrupt):
            main([*argv, '--rows', 'add,causal'])
    assert 'add, infer: failed: RuntimeError: no kernel for 17 heads' in capsys.readouterr().out

    def lines():
        return {(line['row'], line['mode']): line for line in read_csv(output / 'speed.csv')}

    first = lines()
    assert set(first) == {('add', 'infer'), ('causal', 'infer')}
    assert first['add', 'infer']['images_per_s'] == ''

    asked.clear()
    monkeypatch.setattr(Speed, '_build', lambda self, *args: asked.append(args[:2]) or build(self, *args))
    assert main([*argv, '--rows', 'add,causal']) == 0
    assert set(asked) == {('add', 'infer'), ('add', 'train'), ('causal', 'train')}
    second = lines()
    assert second['causal', 'infer'] == first['causal', 'infer']
    assert float(second['add', 'infer']['images_per_s']) > 0

    asked.clear()
    assert main([*argv, '--rows', 'causal', '--set', 'data.batch_size=64']) == 0  # other work: measured again
    assert asked == [('causal', 'infer'), ('causal', 'train')]
    assert lines()['causal', 'infer']['batch'] == '64'
    assert lines()['add', 'infer'] == second['add', 'infer']
    monkeypatch.setattr(command, 'device_name', lambda device: 'another processor')
    with pytest.raises(UserError, match=r"measured with device='.*', this command has 'another"):
        main([*argv, '--rows', 'causal'])


def test_sigterm_stops_the_runs(digits, tmp_path, monkeypatch):
    """A scheduler's signal ends the command and its processes."""
    process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM])

    def start(run, jobs):
        timer.start()
        return process

    monkeypatch.setattr(runs, '_start', start)
    before = signal.getsignal(signal.SIGTERM)
    guard = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # should the command have none, the tests go on
    try:
        with pytest.raises(KeyboardInterrupt):
            main(['--config', digits, '--rows', 'add', '--steps', 'train', '--output', str(tmp_path / 'out')])
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert process.poll() is not None
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, guard)
        process.kill()
        process.wait()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_plan_and_wrong_arguments_write_nothing(digits, tmp_path, capsys):
    argv = ['--config', digits, '--rows', 'add,dense', '--seeds', '3', '4', '--output', str(tmp_path / 'out'), '--plan']
    assert main(argv) == 0
    assert '4 runs' in capsys.readouterr().out
    for more, message in (
        (['--rows', 'add,nothing'], "no row 'nothing'"),
        (['--config', 'nothing'], "no recipe 'nothing'"),
        (['--set', 'data.img_size=null'], 'must say data.img_size'),
        (['--set', 'model.kwargs.patch_size=x'], 'row quasiseparable-dd: cannot build'),
    ):
        with pytest.raises(UserError, match=message):
            main([*argv, *more])
    assert not (tmp_path / 'out').exists()


def test_table_and_picture(tmp_path):
    rows = (Row('a', 'A', 'dense', data='independent', paper=74.7), Row('b', 'B', 'hydra'), Row('c', 'C', 'm2'))
    family = Family('mine', 'A title', 'b', rows)
    results = [
        {'row': 'a', 'parameters': 1_700_000, 'top1': 60.0},
        {'row': 'b', 'parameters': 1_750_000, 'top1': 70.0},
        {'row': 'b', 'parameters': 1_750_000, 'top1': 71.0},
    ]
    speeds = [
        {'row': 'b', 'mode': 'train', 'images_per_s': '1000.4', 'peak_memory_gib': '1.25', 'status': 'ok'},
        {'row': 'a', 'mode': 'infer', 'images_per_s': '', 'peak_memory_gib': '', 'status': 'out of memory'},
    ]
    lines = table_rows(family, results, speeds)
    assert lines[0] == ['A', 'parameters', '1.700', '60.00', '1', '', 'out of memory', '', '74.7']
    assert lines[1] == ['B', 'tokens', '1.750', '70.50 (70.00 to 71.00)', '2', '1000', '', '1.25', '']
    assert lines[2][3] == 'not finished'
    figure = plot([family, family], results, tmp_path / 'a.png', 'title')
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
    for axes in figure.axes:
        assert [(text.get_text(), text.get_position()[1]) for text in axes.texts] == [('not finished', 2)]

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from hydra_vision.cli import main
from hydra_vision.train.provenance import RUN


@pytest.fixture(scope='module')
def runs(tiny, tmp_path_factory):
    """Two seeds of one recipe, one of another."""
    from hydra_vision.train.main import main as train

    folder = tmp_path_factory.mktemp('runs')
    for name, extra in (('a0', ()), ('a1', ('--seed', '1')), ('b0', ('--lr', '1e-3'))):
        arguments = (*tiny, '--epochs', '2', *extra, '--output', str(folder / name))
        assert train(list(arguments)) == 0
    return [str(folder / name) for name in ('a0', 'a1', 'b0')]


def test_table_and_picture(runs, capsys, tmp_path):
    assert main(['compare-runs', *runs, '--output', 'compared']) == 0
    out = capsys.readouterr().out
    assert 'a0, a1' in out  # runs that differ in the seed only are averaged
    with open(tmp_path / 'compared' / 'compare.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['run'] for row in rows] == ['a0', 'a1', 'b0']
    assert [row['seed'] for row in rows] == ['0', '1', '0']
    facts = json.loads(Path(f'{runs[0]}/{RUN}').read_text())
    assert rows[0]['params (M)'] == f'{facts["parameters"] / 1e6:.2f}'
    with open(f'{runs[1]}/summary.csv', newline='') as file:
        last = list(csv.DictReader(file))[-1]
    assert float(rows[1]['top-1 % (last)']) == pytest.approx(float(last['val_top1']), abs=0.01)
    with Image.open(tmp_path / 'compared' / 'compare.png') as image:
        assert image.width > 1000
    assert (tmp_path / 'compared' / 'compare.md').read_text().count('a0') == 2


def test_folders_that_are_no_runs(runs, capsys, tmp_path):
    assert main(['compare-runs', 'nowhere']) == 2
    assert 'nowhere is not a folder' in capsys.readouterr().err
    (tmp_path / 'empty').mkdir()
    assert main(['compare-runs', runs[0], 'empty']) == 2
    assert 'empty is not a readable run folder (No such file or directory: empty' in capsys.readouterr().err
    broken = tmp_path / 'broken'
    broken.mkdir()
    for name in ('config.yaml', RUN, 'summary.csv'):
        (broken / name).write_text(Path(f'{runs[0]}/{name}').read_text())
    (broken / RUN).write_text('{')
    assert main(['compare-runs', 'broken']) == 2
    assert 'broken is not a readable run folder (JSONDecodeError' in capsys.readouterr().err


def test_the_run_file_tells_where_a_run_comes_from(runs, tiny, run, tmp_path):
    facts = json.loads(Path(f'{runs[0]}/{RUN}').read_text())
    assert facts['training_images'] == 48
    assert facts['validation_images'] == 18
    assert facts['parameters'] > 1000
    session = facts['sessions'][0]
    assert session['versions']['torch']
    assert set(session) == {'started', 'command', 'git_commit', 'versions', 'device'}


def test_a_continued_run_adds_a_session(tiny, run, tmp_path):
    assert run(*tiny, '--epochs', 2, '--output', 'run')[0] == 0
    assert run('--resume', 'run', '--epochs', 3)[0] == 0
    assert len(json.loads((tmp_path / 'run' / RUN).read_text())['sessions']) == 2

import json

import pytest

from benchmarks import scaling
from hydra_vision.errors import UserError


def test_efficiency_is_against_as_many_times_the_smallest_run():
    rows = scaling.speed_rows({4: [360.0, 370.0, 380.0], 1: [90.0, 100.0, 110.0], 2: [200.0]})
    assert [row['processes'] for row in rows] == [1, 2, 4]
    assert [row['efficiency'] for row in rows] == [1.0, 1.0, 0.925]
    assert (rows[2]['slowest_epoch'], rows[2]['fastest_epoch']) == (360, 380)


def test_curves_are_compared_update_by_update():
    curves = {n: [{'updates': k, 'loss': 1.0 / k + 0.01 * (n - 1) * (k == 2)} for k in (1, 2)] for n in (1, 2)}
    rows = scaling.curve_rows(curves)
    assert [row['difference'] for row in rows] == [0, 0.01]
    assert rows[1].keys() == {'updates', 'loss_1', 'loss_2', 'difference'}


def test_speed_runs_the_trainer_once_for_each_number_of_processes(tmp_path, monkeypatch, capsys):
    calls = []

    def train(processes, arguments, folder):
        calls.append((processes, list(arguments)))
        folder.mkdir()
        lines = ['images_per_second,val_top1', '1,', f'{100 * processes},', f'{102 * processes},']
        (folder / 'summary.csv').write_text('\n'.join(lines))
        return folder

    monkeypatch.setattr(scaling, 'train', train)
    command = ['speed', '--output', str(tmp_path / 'out'), '--batch-size', '8', '--', '--compile', 'true']
    assert scaling.main(command) == 0
    assert [processes for processes, _ in calls] == [1, 2]
    for processes, arguments in calls:
        assert arguments[arguments.index('--batch-size') + 1] == str(8 * processes)
        assert arguments[-2:] == ['--compile', 'true']
    assert (tmp_path / 'out' / 'speed.csv').read_text().splitlines()[-1] == '2,202.0,200.0,204.0,1.0'
    assert 'torch' in json.loads((tmp_path / 'out' / 'speed.json').read_text())['versions']
    assert 'efficiency' in capsys.readouterr().out


def test_one_number_of_processes_cannot_be_compared(tmp_path):
    with pytest.raises(UserError, match='two different numbers'):
        scaling.main(['speed', '--processes', '2', '2', '--output', str(tmp_path)])

"""The command that measures what a scan order costs."""

import csv

from hydra_vision.bench.scan_orders import main
from hydra_vision.models.scan_order import SCAN_ORDERS


def test_every_order_is_timed_in_both_modes(tmp_path, capsys):
    argv = ['--model', 'test_hydra_vit', '--img-size', '32', '--batch-size', '1', '--device', 'cpu']
    assert main([*argv, '--rounds', '3', '--time-limit', '0', '--output', str(tmp_path)]) == 0
    with (tmp_path / 'scan_orders.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['mode'], row['scan_order']) for row in rows] == [
        (m, o) for m in ('infer', 'train') for o in SCAN_ORDERS
    ]
    assert all(float(row['median_ms']) > 0 for row in rows)
    assert [row['time_over_row'] for row in rows if row['scan_order'] == 'row'] == ['1.0', '1.0']
    assert 'hilbert' in capsys.readouterr().out

"""The command that measures what a scan order costs."""

import csv

import pytest
import torch

from hydra_vision.bench import scan_orders
from hydra_vision.bench.scan_orders import main
from hydra_vision.errors import UserError
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
    ms = {row['scan_order']: row for row in rows if row['mode'] == 'train'}
    over = float(ms['hilbert']['median_ms']) / float(ms['row']['median_ms'])
    assert float(ms['hilbert']['time_over_row']) == pytest.approx(over, rel=1e-3)
    assert [row['time_over_row'] for row in rows if row['scan_order'] == 'row'] == ['1.0', '1.0']
    assert 'hilbert' in capsys.readouterr().out


def test_an_order_that_fails_does_not_end_the_others(tmp_path, capsys, monkeypatch):
    def faulty(arguments, order, mode, device):
        if mode == 'train' and order == 'row':
            raise RuntimeError('no kernel')
        if mode == 'train' and order == 'hilbert':
            raise KeyboardInterrupt
        return lambda: None

    monkeypatch.setattr(scan_orders, '_step', faulty)
    argv = ['--model', 'test_hydra_vit', '--device', 'cpu', '--rounds', '3', '--output', str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        main(argv)
    assert (tmp_path / 'scan_orders.csv').read_text().count('infer,') == len(SCAN_ORDERS)  # written already
    monkeypatch.setattr(scan_orders, 'SCAN_ORDERS', ('row', 'snake'))
    assert main(argv) == 1
    text = (tmp_path / 'scan_orders.csv').read_text()
    assert text.count(',ok,') == 3
    assert 'failed: RuntimeError: no kernel' in capsys.readouterr().out
    with pytest.raises(UserError, match='unknown model'):
        main(['--model', 'no_such_model'])
    with pytest.raises(UserError, match="--device 'tpu'"):
        main(['--device', 'tpu'])


def test_every_order_is_compiled(tmp_path, monkeypatch):
    """All orders and modes are models of one class; past its limit the compiler would go on in eager mode unnoticed."""
    compiled = []

    class Model(torch.nn.Module):
        def __init__(self, order, mode):
            super().__init__()
            self.name = order + mode

        def forward(self, x):
            return x + len(self.name)

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def step(arguments, order, mode, device):
        model = torch.compile(Model(order, mode), dynamic=False, backend=backend)
        return lambda: model(torch.ones(2))

    monkeypatch.setattr(scan_orders, '_step', step)
    argv = ['--model', 'test_hydra_vit', '--device', 'cpu', '--compile', '--rounds', '3', '--time-limit', '0']
    assert main([*argv, '--output', str(tmp_path)]) == 0
    assert len(compiled) == 2 * len(SCAN_ORDERS)

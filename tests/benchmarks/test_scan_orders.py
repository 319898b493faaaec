import pytest

from benchmarks.scan_orders import main
from hydra_vision import bench
from hydra_vision.io import read_csv
from hydra_vision.models.scan_order import SCAN_ORDERS

OPTIONS = '--model test_hydra_vit --img-size 32 --batch-size 1 --device cpu --rounds 3 --time-limit 0'


@pytest.fixture(autouse=True)
def no_roofline(monkeypatch):
    monkeypatch.setattr(bench, 'measure_roofline', lambda *a: bench.Roofline(1e12, 1e12))


def rows_of(folder) -> list[dict[str, str]]:
    return read_csv(folder / 'scan_orders.csv')


@pytest.mark.slow
def test_every_order_is_timed_in_both_modes(tmp_path, capsys):
    assert main([*OPTIONS.split(), '--output', str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert [(row['mode'], row['scan_order']) for row in rows] == [
        (mode, order) for mode in ('infer', 'train') for order in SCAN_ORDERS
    ]
    ms = {row['scan_order']: row for row in rows if row['mode'] == 'train'}
    over = float(ms['hilbert']['median_ms']) / float(ms['row']['median_ms'])
    assert float(ms['hilbert']['time_over_row']) == pytest.approx(over, rel=1e-3)
    assert [row['time_over_row'] for row in rows if row['scan_order'] == 'row'] == ['1.0', '1.0']
    assert 'hilbert' in capsys.readouterr().out


def test_an_order_that_fails_does_not_end_the_others(tmp_path, capsys, monkeypatch):
    build = bench.build_step

    def faulty(case, device):
        if case.mode == 'train':
            raise KeyboardInterrupt
        if 'snake' in case.kwargs:
            raise RuntimeError('no kernel')
        return build(case, device)

    monkeypatch.setattr(bench, 'build_step', faulty)
    with pytest.raises(KeyboardInterrupt):
        main([*OPTIONS.split(), '--output', str(tmp_path)])
    status = {row['scan_order']: row['status'] for row in rows_of(tmp_path)}  # written already
    assert status == {**dict.fromkeys(SCAN_ORDERS, 'ok'), 'snake': 'failed: RuntimeError: no kernel'}

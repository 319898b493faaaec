"""Efficiency length: crossings and fits on made-up curves, points on real mixers, the command."""

import pytest
import torch

from benchmarks import efficiency_length
from benchmarks.efficiency_length import (
    ATTENTIONS,
    build_step,
    crossing_rows,
    find_crossing,
    fit_power_law,
    fitted_crossing,
    grid_of,
    main,
    make_mixer,
    measure_length,
    plot_points,
    table_lines,
    to_do,
    variants,
)
from benchmarks.record import Record
from hydra_vision import mixers
from hydra_vision.errors import UserError
from hydra_vision.io import read_csv

LENGTHS = [64, 128, 256, 512, 1024]


def curve(factor, exponent):
    return {n: factor * n**exponent for n in LENGTHS}


BUMPY = {64: 0.5, 128: 2.0, 256: 0.5, 512: 2.0, 1024: 0.5}


@pytest.mark.parametrize(
    ('mixer', 'attention', 'kind', 'length'),
    [
        (curve(300.0, 0.0), curve(1.0, 1.0), 'at', 300),  # exact: both are straight on logarithmic axes
        (curve(1.0, 0.0), curve(2.0, 0.5), 'always', None),
        (curve(1e6, 0.0), curve(1.0, 1.0), 'none in range', None),
        ({}, curve(1.0, 1.0), 'not measured', None),
        (BUMPY, curve(1.0, 0.0), 'at', (512 * 1024) ** 0.5),  # the last one counts
        ({**BUMPY, 1024: 1.5}, curve(1.0, 0.0), 'none in range', None),
        # out of memory costs more than any result
        (curve(5.0, 0.0), {**curve(1.0, 0.0), 512: None, 1024: None}, 'at', 512.0),
        ({**curve(0.5, 0.0), 1024: None}, curve(1.0, 0.0), 'none in range', None),
        (dict.fromkeys(LENGTHS), dict.fromkeys(LENGTHS), 'not measured', None),
    ],
)
def test_crossings(mixer, attention, kind, length):
    found = find_crossing(mixer, attention)
    assert found.kind == kind
    assert found.length == (None if length is None else pytest.approx(length))


def test_fits():
    fit = fit_power_law({16: 1e9, **curve(3.0, 1.5), 2048: None})  # the longest lengths only
    assert (fit.exponent, fit.factor) == (pytest.approx(1.5), pytest.approx(3.0))
    assert fit_power_law({64: 1.0, 128: None}) is None
    slow, fast = fit_power_law(curve(300.0, 0.1)), fit_power_law(curve(1.0, 1.1))
    assert fitted_crossing(slow, fast, 1024) == pytest.approx(300)
    assert fitted_crossing(fast, slow, 1024) is None  # it grows faster: no crossing however long
    assert fitted_crossing(fit_power_law(curve(1e6, 0.1)), fast, 1024) is None  # too far away to believe


def test_every_mixer_of_the_family_is_there():
    assert {name for name, _ in variants().values()} == set(mixers.list_mixers()) - {'vit_attention'}
    assert (grid_of(128), grid_of(7)) == ((8, 16), (1, 7))


def test_attentions_differ_in_how_they_compute_only():
    unfused, fused = (make_mixer(name, 64, 16, torch.device('cpu')) for name in ATTENTIONS)
    assert (unfused.fused_attn, fused.fused_attn) == (False, True)
    fused.load_state_dict(unfused.state_dict())
    u = torch.randn(2, 16, 64)
    torch.testing.assert_close(unfused(u), fused(u))


def test_what_is_timed():
    mixer, u = make_mixer('low_rank', 64, 32, torch.device('cpu')), torch.randn(2, 32, 64, requires_grad=True)
    y = build_step(mixer, u, 'infer', None)()
    assert not y.requires_grad
    torch.testing.assert_close(y, mixer(u).detach())
    assert build_step(mixer, u, 'infer', torch.bfloat16)().dtype == torch.bfloat16
    gradients = build_step(mixer, u, 'train', None)()
    assert [g.shape for g in gradients] == [u.shape, *(p.shape for p in mixer.parameters())]
    assert all(g.any() for g in gradients)


def measured(names, **kwargs):
    options = {'tokens': 64, 'd_model': 64, 'dtype': None, 'rounds': 3, 'time_limit': 0.0, **kwargs}
    return measure_length(names, 32, 'train', torch.device('cpu'), **options)


def test_points_in_their_order():
    names = [*ATTENTIONS, 'toeplitz, fixed']
    points = measured(names)
    assert [point['mixer'] for point in points] == names
    assert [point['attention'] for point in points] == ['', 'flash', '']
    for point in points:
        assert [point[key] for key in ('L', 'batch', 'status', 'peak_memory_gib')] == [32, 2, 'ok', None]
        assert 0 < point['p10_ms'] <= point['median_ms'] <= point['p90_ms']
        assert point['ns_per_token'] == pytest.approx(point['median_ms'] * 1e6 / 64, rel=1e-3)
    (point,) = measured([ATTENTIONS[1]], tokens=1, attention='math')
    assert (point['batch'], point['attention']) == (1, 'math')


def point(mixer, length, ns=None, peak=None, status='ok', passes='forward'):
    times = {'ns_per_token': ns, 'peak_memory_gib': peak}
    return {'mixer': mixer, 'L': length, 'passes': passes, 'status': status, 'attention': '', **times}


def made_up(mixer, seconds, peak=None):
    return [point(mixer, n, seconds(n), peak and peak(n)) for n in LENGTHS]


def test_rows_table_and_picture(tmp_path):
    points = made_up(ATTENTIONS[0], lambda n: n, lambda n: n**2) + made_up(ATTENTIONS[1], lambda n: n / 8)
    points += made_up('hydra', lambda n: 100, lambda n: 150 * n) + made_up('dense', lambda n: 2 * n)
    rows = crossing_rows(points)
    found = {(row['mixer'], row['quantity'], row['against']): row for row in rows}
    assert found['hydra', 'time', ATTENTIONS[0]]['measured_length'] == pytest.approx(100)
    assert found['hydra', 'time', ATTENTIONS[1]]['measured_length'] == pytest.approx(800)
    assert found['hydra', 'memory', ATTENTIONS[0]]['measured_length'] == pytest.approx(150)
    assert found['hydra', 'time', ATTENTIONS[0]]['exponent'] == pytest.approx(0)
    assert found['dense', 'time', ATTENTIONS[0]]['measured'] == 'none in range'
    assert found['dense', 'time', ATTENTIONS[0]]['fitted_length'] is None
    lines = {line[0]: line for line in table_lines(rows)}
    assert lines['hydra'][2:5] in (['L^0.00', '100', '800'], ['L^-0.00', '100', '800'])
    assert lines['dense'][3] == 'none in range'
    plot_points(points, tmp_path / 'a.png', 'title')
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


def test_a_failed_point_says_nothing_about_cost():
    points = made_up(ATTENTIONS[0], lambda n: n) + made_up('hydra', lambda n: 100)
    points[-1] = point('hydra', LENGTHS[-1], status='failed: x')
    points += [point('dense', n, status='failed: x') for n in LENGTHS]
    (row,) = crossing_rows(points)
    assert (row['mixer'], row['measured']) == ('hydra', 'at')  # not 'none in range'


def test_what_never_was_measured_comes_first(tmp_path):
    path = tmp_path / 'points.csv'
    record = Record(path, ('passes', 'L', 'mixer'), {'device': 'x'})
    record.add([point('dft', 16, status='failed: a "quoted", text'), point('dft', 32, 1.5, 2.0)])
    record.add([point('dft', 64, status='out of memory')])
    again = Record(path, ('passes', 'L', 'mixer'), {'device': 'x'})
    assert [row['status'] for row in again.rows] == ['failed: a "quoted", text', 'ok', 'out of memory']
    groups = [('infer', length) for length in (16, 32, 64, 128)]
    for one in (record, again):
        assert to_do(one, groups, ['dft']) == [('infer', 128), ('infer', 16)]
        assert to_do(one, groups[:1], ['dft', 'm2']) == groups[:1]


OPTIONS = '--device cpu --mixers low_rank --lengths 16,32 --tokens 32 --mode infer --time-limit 0'


def test_an_interrupted_measurement_continues(tmp_path, capsys, monkeypatch):
    """What is measured is on the disk at once; the same command measures the rest only."""
    asked = []

    def stopping(names, length, mode, *args, **kwargs):
        asked.append((mode, length))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return measure_length(names, length, mode, *args, **kwargs)

    monkeypatch.setattr(efficiency_length, 'measure_length', stopping)
    argv = [*OPTIONS.split(), '--output', str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        main(argv)
    first = (tmp_path / 'points.csv').read_text()
    assert first.count('\n') == 1 + 3
    assert main(argv) == 0
    assert asked == [('infer', 16), ('infer', 32), ('infer', 32)]
    assert '1 of 2 lengths and passes are measured already' in capsys.readouterr().out
    last = (tmp_path / 'points.csv').read_text()
    assert last.startswith(first)
    rows = read_csv(tmp_path / 'points.csv')
    assert {(row['L'], row['batch']) for row in rows} == {('16', '2'), ('32', '1')}
    assert main([*argv, '--mode', 'train,infer']) == 0  # more of the same kind joins them
    assert asked[3:] == [('train', 16), ('train', 32)]
    assert (tmp_path / 'points.csv').read_text().startswith(last)
    found = read_csv(tmp_path / 'crossings.csv')
    assert {row['passes'] for row in found} == {'forward', 'forward+backward'}
    assert {row['quantity'] for row in found} == {'time'}  # memory is not measured on the CPU
    assert (tmp_path / 'efficiency_length.png').is_file()


def test_a_failed_mixer_is_reported_and_tried_again(tmp_path, capsys, monkeypatch):
    def faulty(variant, d_model, length, device):
        if variant == 'low_rank' and device.type != 'meta':
            raise RuntimeError('no kernel')
        return make_mixer(variant, d_model, length, device)

    argv = [*OPTIONS.split(), '--lengths', '16', '--output', str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(efficiency_length, 'make_mixer', faulty)
        assert main(argv) == 1
    out = capsys.readouterr().out
    assert out.count('low_rank: failed: RuntimeError: no kernel') == 1
    assert '1 of 3 points failed' in out
    assert main(argv) == 0
    assert 'failed' not in (tmp_path / 'points.csv').read_text()


def test_other_settings_are_rejected(tmp_path, monkeypatch):
    argv = [*OPTIONS.split(), '--lengths', '16', '--output', str(tmp_path)]
    assert main(argv) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for more, message in [
        (['--tokens', '64'], 'measured with tokens=32, this command has 64; choose another --output'),
        (['--mixers', 'dft'], 'measured with mixers='),
        (['--amp', 'bf16'], "measured with dtype='float32', this command has 'bfloat16'"),
    ]:
        with pytest.raises(UserError, match=message):
            main([*argv, *more])
    with monkeypatch.context() as patch:
        patch.setattr(efficiency_length, 'device_name', lambda device: 'another processor')
        with pytest.raises(UserError, match="this command has 'another processor'"):
            main(argv)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert main([*argv, '--tokens', '64', '--overwrite']) == 0
    for name, content in (('points.csv', 'mixer,L\nlow_rank,16\n'), ('environment.json', '{}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=r'cannot be read|not of this command'):
            main([*argv, '--tokens', '64'])
    (tmp_path / 'environment.json').unlink()
    with pytest.raises(UserError, match=r'points\.csv but no environment\.json'):
        main(argv)


@pytest.mark.parametrize('argv', ['--mixers hydar', '--device cpu --d-model 33', '--lengths 16,32 --tokens 20'])
def test_wrong_arguments(argv, tmp_path):
    with pytest.raises(UserError):
        main([*argv.split(), '--output', str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()


def test_protocol_of_the_benchmark(tmp_path, capsys):
    from benchmarks import cab

    # 100 + 2 L meets L^2 / 100 at 241.4; the first length is left out of the times' line
    line = {n: 100.0 + 2 * n for n in cab.LENGTHS}
    parabola = {n: 0.01 * n * n for n in cab.LENGTHS}
    assert cab.efficiency_length(line, parabola) == pytest.approx(241.42, abs=0.01)
    assert cab.efficiency_length({**line, 256: 9e9}, parabola, without_first=True) == pytest.approx(241.42, abs=0.01)
    assert cab.efficiency_length({n: -1.0 - n for n in line}, parabola) == 0  # below at every length
    assert cab.efficiency_length(dict.fromkeys(line, 1e9), {n: 1.0 - n * n for n in line}) is None
    common = ['--device', 'cpu', '--protocol', 'cab', '--mixers', 'low_rank', '--lengths', '8,16,32']
    assert main([*common, '--rounds', '4', '--output', str(tmp_path / 'cab')]) == 0
    printed = capsys.readouterr().out
    assert 'Nystromformer' in printed
    assert 'low_rank' in printed
    rows = read_csv(tmp_path / 'cab' / 'points.csv')
    assert [(row['mixer'], row['L'], row['status']) for row in rows] == [
        (name, length, 'ok') for length in ('8', '16', '32') for name in ('attention, unfused', 'low_rank')
    ]
    with pytest.raises(UserError, match='--d-model 64: --protocol cab fixes it'):
        main([*common, '--d-model', '64'])

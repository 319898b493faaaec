"""Efficiency length: crossings and fits on made-up curves, points on real mixers, the command."""

import csv

import pytest
import torch

from hydra_vision import mixers
from hydra_vision.bench import turns
from hydra_vision.bench.efficiency import main as main_module
from hydra_vision.bench.efficiency import points as points_module
from hydra_vision.bench.efficiency.crossing import Crossing, find_crossing, fit_power_law, fitted_crossing
from hydra_vision.bench.efficiency.main import main
from hydra_vision.bench.efficiency.points import ATTENTIONS, Point, grid_of, make_mixer, measure_length, variants
from hydra_vision.bench.efficiency.record import Record
from hydra_vision.bench.efficiency.report import crossing_rows, plot_points, table_lines
from hydra_vision.errors import UserError

LENGTHS = [64, 128, 256, 512, 1024]


def curve(factor, exponent):
    return {n: factor * n**exponent for n in LENGTHS}


def test_crossing_is_between_the_points_around_it():
    found = find_crossing(curve(300.0, 0.0), curve(1.0, 1.0))
    assert found.kind == 'at'
    assert found.length == pytest.approx(300)  # exact: both are straight on logarithmic axes


def test_always_and_none_in_range():
    assert find_crossing(curve(1.0, 0.0), curve(2.0, 0.5)) == Crossing('always')
    assert find_crossing(curve(1e6, 0.0), curve(1.0, 1.0)) == Crossing('none in range')
    assert find_crossing({}, curve(1.0, 1.0)) == Crossing('not measured')


def test_the_last_crossing_counts():
    attention = curve(1.0, 0.0)
    mixer = {64: 0.5, 128: 2.0, 256: 0.5, 512: 2.0, 1024: 0.5}  # a noisy or bumpy curve
    found = find_crossing(mixer, attention)
    assert found.length == pytest.approx((512 * 1024) ** 0.5)
    assert find_crossing({**mixer, 1024: 1.5}, attention) == Crossing('none in range')


def test_out_of_memory_costs_more_than_any_result():
    attention = {**curve(1.0, 0.0), 512: None, 1024: None}
    assert find_crossing(curve(5.0, 0.0), attention) == Crossing('at', 512.0)
    assert find_crossing({**curve(0.5, 0.0), 1024: None}, curve(1.0, 0.0)) == Crossing('none in range')
    assert find_crossing(dict.fromkeys(LENGTHS), dict.fromkeys(LENGTHS)) == Crossing('not measured')


def test_fit_uses_the_longest_lengths():
    costs = {16: 1e9, **curve(3.0, 1.5), 2048: None}
    fit = fit_power_law(costs)
    assert fit.exponent == pytest.approx(1.5)
    assert fit.factor == pytest.approx(3.0)
    assert fit_power_law({64: 1.0, 128: None}) is None


def test_fitted_crossing():
    slow, fast = fit_power_law(curve(300.0, 0.1)), fit_power_law(curve(1.0, 1.1))
    assert fitted_crossing(slow, fast, 1024) == pytest.approx(300)
    assert fitted_crossing(fast, slow, 1024) is None  # it grows faster: no crossing however long
    assert fitted_crossing(fit_power_law(curve(1e6, 0.1)), fast, 1024) is None  # too far away to believe


def test_every_mixer_of_the_family_is_there():
    names = {name for name, _ in variants().values()}
    assert names == set(mixers.list_mixers()) - {'vit_attention'}
    assert grid_of(128) == (8, 16)
    assert grid_of(7) == (1, 7)


def test_attentions_differ_in_how_they_compute_only():
    torch.manual_seed(0)
    unfused = make_mixer(ATTENTIONS[0], 64, 16, torch.device('cpu'))
    fused = make_mixer(ATTENTIONS[1], 64, 16, torch.device('cpu'))
    assert (unfused.fused_attn, fused.fused_attn) == (False, True)
    fused.load_state_dict(unfused.state_dict())
    u = torch.randn(2, 16, 64)
    torch.testing.assert_close(unfused(u), fused(u))


def measured(names, **kwargs):
    options = dict(tokens=64, d_model=64, dtype=torch.float32, rounds=3, burst=0.0)
    return measure_length(names, 32, 'train', torch.device('cpu'), **{**options, **kwargs})


def test_points_in_their_order():
    names = [ATTENTIONS[0], 'hydra', 'toeplitz, fixed']
    points = measured(names)
    assert [point.mixer for point in points] == names
    for point in points:
        assert (point.length, point.batch, point.status, point.peak_bytes) == (32, 2, 'ok', None)
        assert 0 < point.p10 <= point.median <= point.p90
        assert point.seconds_per_token == point.median / 64
    assert measured(['low_rank'], tokens=1)[0].batch == 1


def test_as_many_rounds_as_asked_for(monkeypatch):
    seen, measure = [], turns.measure
    monkeypatch.setattr(turns, 'measure', lambda *args, **kwargs: seen.append(measure(*args, **kwargs)) or seen[-1])
    measured(['low_rank'], rounds=5)
    assert [len(timing.seconds) for timing in seen[0].values()] == [5]


def test_what_is_timed():
    mixer, u = make_mixer('low_rank', 64, 32, torch.device('cpu')), torch.randn(2, 32, 64, requires_grad=True)
    y = points_module._step(mixer, u, 'infer', torch.float32)()
    assert not y.requires_grad
    torch.testing.assert_close(y, mixer(u).detach())
    assert points_module._step(mixer, u, 'infer', torch.bfloat16)().dtype == torch.bfloat16
    gradients = points_module._step(mixer, u, 'train', torch.float32)()
    assert [g.shape for g in gradients] == [u.shape, *(p.shape for p in mixer.parameters())]
    assert all(g.any() for g in gradients)


def test_what_does_not_fit_beside_the_others_is_tried_alone(monkeypatch):
    attempts = []

    def scarce(variant, *args):
        attempts.append(variant)
        if variant == 'hydra' or (variant == 'low_rank' and attempts.count('low_rank') == 1):
            raise torch.OutOfMemoryError('full')
        return make_mixer(variant, *args)

    monkeypatch.setattr(points_module, 'make_mixer', scarce)
    points = {point.mixer: point for point in measured(['hydra', ATTENTIONS[1], 'low_rank'])}
    assert points['hydra'].status == 'out of memory'
    assert points['hydra'].median is None
    assert points['low_rank'].status == 'ok'
    assert points['low_rank'].median > 0
    assert attempts == ['hydra', ATTENTIONS[1], 'low_rank', 'hydra', 'low_rank']


def test_no_room_for_all_of_them_at_once(monkeypatch):
    together = turns.measure

    def scarce(steps, *args, **kwargs):
        if len(steps) > 1:
            raise torch.OutOfMemoryError('full')
        return together(steps, *args, **kwargs)

    monkeypatch.setattr(turns, 'measure', scarce)
    for point in measured(['low_rank', ATTENTIONS[0]]):
        assert (point.status, point.median > 0) == ('ok', True)


def test_what_fails_is_reported_and_the_others_are_measured(monkeypatch):
    """When it is built, when it is first called, or only in the middle of timing."""

    def faulty(variant, *args):
        if variant == 'dft':
            raise RuntimeError('no such kernel\nand more')
        mixer = make_mixer(variant, *args)
        if variant in ('low_rank', 'hydra'):
            calls = iter(range(1 if variant == 'low_rank' else 4))
            mixer.register_forward_pre_hook(lambda *_: (next(calls), None)[1])
        return mixer

    monkeypatch.setattr(points_module, 'make_mixer', faulty)
    points = {point.mixer: point for point in measured(['dft', 'low_rank', ATTENTIONS[1], 'hydra'])}
    assert points['dft'].status == 'failed: RuntimeError: no such kernel'
    assert points['low_rank'].status == points['hydra'].status == 'failed: StopIteration: StopIteration'
    assert {points[name].median for name in ('dft', 'low_rank', 'hydra')} == {None}
    assert (points[ATTENTIONS[1]].status, points[ATTENTIONS[1]].median > 0) == ('ok', True)


def made_up(mixer, seconds, mode='infer', peak=None):
    return [Point(mixer, n, 1, mode, seconds(n) * n, peak_bytes=peak and peak(n)) for n in LENGTHS]


def test_rows_table_and_picture(tmp_path):
    points = made_up(ATTENTIONS[0], lambda n: n, peak=lambda n: n**2) + made_up(ATTENTIONS[1], lambda n: n / 8)
    points += made_up('hydra', lambda n: 100, peak=lambda n: 150 * n) + made_up('dense', lambda n: 2 * n)
    rows = crossing_rows(points)
    found = {(row['mixer'], row['quantity'], row['against']): row for row in rows}
    assert found['hydra', 'time', ATTENTIONS[0]]['measured_length'] == pytest.approx(100)
    assert found['hydra', 'time', ATTENTIONS[1]]['measured_length'] == pytest.approx(800)
    assert found['hydra', 'memory', ATTENTIONS[0]]['measured_length'] == pytest.approx(150)
    assert found['hydra', 'time', ATTENTIONS[0]]['exponent'] == pytest.approx(0)
    assert found['dense', 'time', ATTENTIONS[0]]['measured'] == 'none in range'
    assert found['dense', 'time', ATTENTIONS[0]]['fitted_length'] is None
    lines = {line[0]: line for line in table_lines(rows)}
    assert lines['hydra'][2:5] == ['L^0.00', '100', '800']
    assert lines['dense'][3] == 'none in range'
    plot_points(points, tmp_path / 'a.png', 'title')
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


def test_command(tmp_path, capsys):
    argv = ['--device', 'cpu', '--mixers', 'hydra; toeplitz, fixed', '--lengths', '16,32', '--tokens', '32']
    assert main([*argv, '--mode', 'infer', '--output', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert 'toeplitz, fixed' in out
    with (tmp_path / 'points.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4
    assert {(row['L'], row['batch']) for row in rows} == {('16', '2'), ('32', '1')}
    assert all(float(row['ns_per_token']) > 0 and row['peak_memory_gib'] == '' for row in rows)
    with (tmp_path / 'crossings.csv').open(newline='') as file:
        assert {row['quantity'] for row in csv.DictReader(file)} == {'time'}  # memory is not measured on the CPU
    assert (tmp_path / 'efficiency_length.png').is_file()


def test_a_call_holds_the_longest_sequence(tmp_path, monkeypatch):
    asked = []

    def no_time(names, length, mode, device, *, tokens, **kwargs):
        asked.append(tokens)
        return [Point(name, length, tokens // length, mode, 1.0, 1.0, 1.0) for name in names]

    monkeypatch.setattr(main_module, 'measure_length', no_time)
    argv = ['--device', 'cpu', '--mixers', 'low_rank', '--mode', 'infer', '--lengths']
    for lengths in ('64', '1024'):
        main([*argv, lengths, '--output', str(tmp_path / lengths)])
    assert asked == [512, 1024]


def test_points_survive_the_file():
    points = [
        Point('dense', 64, 2, 'train', 1.2345678e-3, 1e-3, 2e-3, 123_456_789),
        Point('dft, x', 64, 1, 'infer', status='out of memory'),
        Point('m2', 16384, 1, 'infer', status='failed: ValueError: a "quoted", text'),
    ]
    for point in points:
        row = {key: '' if value is None else str(value) for key, value in point.csv({'device': 'x'}).items()}
        again = Point.from_csv(row)
        assert again.csv({'device': 'x'}) == point.csv({'device': 'x'})
        assert (again.mixer, again.mode, again.status) == (point.mixer, point.mode, point.status)


def test_a_failed_point_says_nothing_about_cost(tmp_path):
    points = made_up(ATTENTIONS[0], lambda n: n) + made_up('hydra', lambda n: 100)
    points[-1] = Point('hydra', LENGTHS[-1], 1, 'infer', status='failed: x')
    points += [Point('dense', n, 1, 'infer', status='failed: x') for n in LENGTHS]
    (row,) = crossing_rows(points)
    assert (row['mixer'], row['measured']) == ('hydra', 'at')  # not 'none in range'
    plot_points(points, tmp_path / 'a.png', 'title')
    assert (tmp_path / 'a.png').is_file()


ARGV = ['--device', 'cpu', '--mixers', 'low_rank', '--lengths', '16,32', '--tokens', '32', '--mode', 'infer']


def test_an_interrupted_measurement_goes_on(tmp_path, capsys, monkeypatch):
    """What is measured is on the disk at once; the same command measures the rest only."""
    asked = []

    def stopping(names, length, mode, *args, **kwargs):
        asked.append((mode, length))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return measure_length(names, length, mode, *args, **kwargs)

    monkeypatch.setattr(main_module, 'measure_length', stopping)
    argv = [*ARGV, '--output', str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        main(argv)
    first = (tmp_path / 'points.csv').read_text()
    assert first.count('\n') == 1 + 3
    assert main(argv) == 0
    assert asked == [('infer', 16), ('infer', 32), ('infer', 32)]
    assert '1 of 2 lengths and passes are measured already' in capsys.readouterr().out
    last = (tmp_path / 'points.csv').read_text()
    assert last.startswith(first)
    assert main([*argv, '--mode', 'train,infer']) == 0  # more of the same kind joins them
    assert asked[3:] == [('train', 16), ('train', 32)]
    assert (tmp_path / 'points.csv').read_text().startswith(last)
    assert (tmp_path / 'crossings.csv').read_text().count('forward+backward') == 2


def test_a_failed_mixer_is_told_and_tried_again(tmp_path, capsys, monkeypatch):
    def faulty(variant, d_model, length, device):
        if variant == 'low_rank' and device.type != 'meta':
            raise RuntimeError('no kernel')
        return make_mixer(variant, d_model, length, device)

    argv = [*ARGV, '--lengths', '16', '--output', str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(points_module, 'make_mixer', faulty)
        assert main(argv) == 1
    out = capsys.readouterr().out
    assert out.count('low_rank: failed: RuntimeError: no kernel') == 1
    assert '1 of 3 points failed' in out
    assert main(argv) == 0
    assert 'failed' not in (tmp_path / 'points.csv').read_text()


def test_what_never_was_measured_comes_first(tmp_path):
    record = Record(tmp_path, dict.fromkeys(('device', 'dtype', 'd_model', 'threads'), 'x'))
    record.add([Point('dft', 16, 1, 'infer', status='failed: x'), Point('dft', 32, 1, 'infer', 1.0, 1.0, 1.0)])
    record.add([Point('dft', 64, 1, 'infer', status='out of memory')])
    groups = [('infer', length) for length in (16, 32, 64, 128)]
    assert record.to_do(groups, ['dft']) == [('infer', 128), ('infer', 16)]
    assert record.to_do(groups[:1], ['dft', 'm2']) == groups[:1]


def test_other_settings_are_refused(tmp_path, monkeypatch):
    argv = [*ARGV, '--output', str(tmp_path)]
    assert main(argv) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for more, message in [
        (['--tokens', '64'], 'measured with tokens = 32, this command has 64; choose another --output'),
        (['--mixers', 'dft'], 'measured with mixers = '),
        (['--dtype', 'bfloat16'], "measured with dtype = 'float32', this command has 'bfloat16'"),
    ]:
        with pytest.raises(UserError, match=message):
            main([*argv, *more])
    with monkeypatch.context() as patch:
        patch.setattr(main_module, 'device_name', lambda device: 'another processor')
        with pytest.raises(UserError, match="this command has 'another processor'"):
            main(argv)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / 'points.csv').write_text('mixer,L\nlow_rank,16\n')
    with pytest.raises(UserError, match='cannot be read'):
        main(argv)
    (tmp_path / 'environment.json').write_text('{}')
    with pytest.raises(UserError, match='not of this command'):
        main(argv)
    (tmp_path / 'environment.json').unlink()
    with pytest.raises(UserError, match=r'points\.csv but no environment\.json'):
        main(argv)


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--mixers', 'hydar'], "'hydra'"),
        (['--device', 'tpu'], "'tpu'"),
        (['--device', 'cpu', '--d-model', '33'], 'd_model'),
        (['--device', 'cpu', '--lengths', '16,32', '--tokens', '20'], '--tokens 20: .* the longest has 32 tokens'),
    ],
)
def test_wrong_arguments(argv, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main([*argv, '--output', str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()

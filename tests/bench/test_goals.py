"""The project's goals against made-up rows."""

import pytest
import torch

from hydra_vision.bench.goals import GOALS, OPERATOR_GOALS, check_goals, check_operator_goals, goal_cases
from hydra_vision.bench.models import Case, Result
from hydra_vision.bench.operators import OperatorCase, OperatorResult, Shape
from hydra_vision.bench.peers import PEERS, SCANS
from hydra_vision.bench.report import model_ratios, operator_table, verdict_row, verdict_table
from hydra_vision.bench.timing import Timing

CPU = torch.device('cpu')


def row(model: str, img_size: int, batch: int, seconds: float, **kwargs) -> Result:
    backend = 'auto' if 'hydra' in model else None
    peak = kwargs.pop('peak', None)
    return Result(Case(model, img_size, batch, backend=backend, **kwargs), Timing((seconds,) * 3), peak)


def cpu_rows(at_224: float, at_896: float, at_1024: float) -> list[Result]:
    return [
        row('hydra_vit_tiny', 224, 8, at_224),
        row('deit_tiny_patch16_224', 224, 8, 1.0),
        row('hydra_vit_tiny', 448, 1, 1.0),
        row('hydra_vit_tiny', 896, 1, at_896),
        row('hydra_vit_tiny', 1024, 1, at_1024),
        row('deit_tiny_patch16_224', 1024, 1, 1.0),
    ]


def test_cpu_goals_are_the_three_of_the_specification():
    verdicts = check_goals(cpu_rows(1.4, 4.5, 0.9), CPU)
    assert [v.goal.title[:3] for v in verdicts] == ['(a)', '(b)', '(c)']
    assert [(v.goal.sign, v.goal.limit) for v in verdicts] == [('<=', 1.5), ('<=', 4.6), ('<', 1.0)]
    assert [v.value for v in verdicts] == pytest.approx([1.4, 4.5, 0.9])
    assert all(v.met for v in verdicts)


def test_limits():
    assert [v.met for v in check_goals(cpu_rows(1.5, 4.6, 1.0), CPU)] == [True, True, False]
    assert [v.met for v in check_goals(cpu_rows(1.501, 4.601, 1.001), CPU)] == [False, False, False]


def test_a_goal_without_its_rows_is_left_out():
    assert [v.goal.title[:3] for v in check_goals(cpu_rows(1.4, 4.5, 0.9)[2:], CPU)] == ['(b)', '(c)']
    assert check_goals(cpu_rows(1.4, 4.5, 0.9), torch.device('cuda')) == []
    other_dtype = [row(r.case.model, 224, 8, 1.0, dtype=torch.bfloat16) for r in cpu_rows(1, 1, 1)[:2]]
    assert check_goals(other_dtype, CPU) == []


def test_cuda_goals():
    settings = {'compiled': True, 'dtype': torch.bfloat16, 'mode': 'train'}
    rows = [
        row('hydra_vit_base', 512, 64, 1.0, peak=90, **settings),
        row('vit_base_patch16_224', 512, 64, 2.0, peak=100, **settings),
    ]
    verdicts = {v.goal.quantity: v for v in check_goals(rows, torch.device('cuda'))}
    assert set(verdicts) == {'speed', 'memory'}
    assert verdicts['speed'].value == pytest.approx(2.0)
    assert verdicts['speed'].met
    assert verdicts['memory'].value == pytest.approx(0.9)
    assert verdicts['memory'].met


def test_linear_in_tokens():
    settings = {'compiled': True, 'dtype': torch.bfloat16}
    at_224, tokens = 256 * 1e-3, 4 * 128 * 128 / (256 * 196)
    rows = [
        row('hydra_vit_base', 224, 256, at_224, **settings),
        row('hydra_vit_base', 2048, 4, 1.1 * at_224 * tokens, **settings),
    ]
    (verdict,) = check_goals(rows, torch.device('cuda'))
    assert verdict.value == pytest.approx(1.1)
    assert verdict.lowest is None  # two groups: no rounds in turns
    assert verdict.met


def test_spread_of_a_ratio_is_over_rounds_in_turns():
    settings = {'compiled': True, 'dtype': torch.bfloat16}
    ours = Result(Case('hydra_vit_base', 224, 256, backend='auto', **settings), Timing((1.0, 2.0, 4.0)))
    other = Result(Case('vit_base_patch16_224', 224, 256, **settings), Timing((1.0, 3.0, 2.0)))
    (verdict,) = check_goals([ours, other], torch.device('cuda'))
    assert (verdict.value, verdict.lowest, verdict.highest) == (1.0, 0.5, 1.5)


def test_cuda_graphs_are_a_way_of_compiling():
    settings = {'compiled': True, 'dtype': torch.bfloat16, 'graphs': True}
    rows = [row('hydra_vit_tiny', 224, 256, 1.0, **settings), row('deit_tiny_patch16_224', 224, 256, 0.5, **settings)]
    (verdict,) = check_goals(rows, torch.device('cuda'))
    assert verdict.value == 0.5
    assert rows[0].case.execution == 'compiled, CUDA graphs'


def test_rows_that_the_goals_need():
    cases = goal_cases(torch.device('cuda'))
    assert len(set(cases)) == len(cases)
    for img_size, batch in ((224, 256), (512, 64), (1024, 16)):
        for model in ('hydra_vit_base', 'vit_base_patch16_224'):
            assert [(c.mode, c.batch) for c in cases if c.compiled and (c.model, c.img_size) == (model, img_size)] == [
                ('infer', batch),
                ('train', batch),
            ]
    results = [Result(case, Timing((1.0,) * 3), 1) for case in cases]
    assert len(check_goals(results, torch.device('cuda'))) == sum(goal.device == 'cuda' for goal in GOALS)
    assert {c.img_size for c in goal_cases(CPU)} == {224, 448, 896, 1024}


def operator_rows(**seconds: float) -> list[OperatorResult]:
    """Ours in a second, the others in 9 if not said otherwise (-1: failed); underscores double for slashes."""
    times = {'triton': 1.0, **dict.fromkeys((*PEERS, *SCANS), 9.0), 'sdpa': 0.1}
    times |= {name.replace('__', '/'): t for name, t in seconds.items()}
    return [
        OperatorResult(
            OperatorCase(name, Shape(256, 196, 24, 64, 64), 'infer', torch.bfloat16),
            Timing((t,) * 3) if t > 0 else None,
            gemm_share=0.5,
            memory_share=0.5,
        )
        for name, t in times.items()
    ]


def test_operator_goals_take_the_better_peer_complete_and_alone():
    rows = operator_rows(mamba_ssm__64=7.0, simple_gla=6.0, mamba_ssm__128__scan=3.0, simple_gla__scan=5.0)
    scan, complete = check_operator_goals(rows, torch.device('cuda'))
    assert (scan.value, scan.met, str(scan.goal)) == (3.0, False, '>= 4')
    assert 'scan alone' in scan.goal.title
    assert (complete.value, complete.met, str(complete.goal)) == (6.0, None, '')
    assert 'complete peer' in complete.goal.title
    assert (verdict_row(complete)['goal'], verdict_row(complete)['met']) == ('', None)
    (counts, _) = check_operator_goals(operator_rows(mamba_ssm__scan=4.0), torch.device('cuda'))
    assert (counts.value, counts.met) == (4.0, True)
    assert [goal.limit for goal in OPERATOR_GOALS] == [4.0] * 4 + [None] * 4


@pytest.mark.parametrize('missing', ['triton', *PEERS, *SCANS])
def test_a_missing_or_failed_peer_is_no_row(missing):
    """The fastest of the others would be an easier goal."""
    left_out = [row for row in operator_rows() if row.case.backend != missing]
    failed = operator_rows(**{missing.replace('/', '__'): -1.0})
    for rows in (left_out, failed):
        limits = [verdict.goal.limit for verdict in check_operator_goals(rows, torch.device('cuda'))]
        assert limits == ([] if missing == 'triton' else [None] if missing in SCANS else [4.0])


def test_operator_table_has_the_speed_against_both():
    table = operator_table(operator_rows(mamba_ssm__scan=3.0, simple_gla=6.0))
    cells = {column.header: next(iter(column.cells)) for column in table.columns}
    assert (cells['operator'], cells['speed / better peer'], cells['speed / better scan alone']) == (
        'triton',
        '6.00',
        '3.00',
    )


def test_titles_are_unique():
    assert len({goal.title for goal in (*GOALS, *OPERATOR_GOALS)}) == len(GOALS) + len(OPERATOR_GOALS)


def test_verdicts_are_marked(capsys):
    from hydra_vision.console import stdout_console

    stdout_console().print(verdict_table(check_goals(cpu_rows(1.6, 4.5, 0.9), CPU)))
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith('│ (')}
    assert 'FAIL' in lines['(a)']
    assert '1.600' in lines['(a)']
    assert 'PASS' in lines['(b)']


def test_ratios_pair_the_same_place():
    rows = cpu_rows(2.0, 4.5, 0.5)
    ratios = model_ratios(rows, {'hydra_vit_tiny': 'deit_tiny_patch16_224'})
    assert [(r['result'].case.img_size, r['speed']) for r in ratios] == [(224, 0.5), (1024, 2.0)]
    assert all(r['memory'] is None for r in ratios)

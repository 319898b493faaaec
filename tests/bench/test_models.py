"""Cases, groups and steps of the model benchmark."""

import pytest
import torch

from hydra_vision.bench import models
from hydra_vision.bench.models import OUT_OF_MEMORY, Case, build_step, groups, run_group
from hydra_vision.bench.roofline import Roofline

CPU = torch.device('cpu')
ROOFLINE = Roofline(1e15, 1e15)


def small(model: str = 'test_vit', img_size: int = 32, mode: str = 'infer', **kwargs) -> Case:
    return Case(model, img_size, 2, mode, **kwargs)


def test_eager_sizes_are_measured_together_on_the_cpu_only():
    cases = [small(img_size=s, mode=m) for m in ('infer', 'train') for s in (32, 64)]
    assert [len(group) for group in groups(cases, CPU)] == [2, 2]
    assert [len(group) for group in groups(cases, torch.device('cuda'))] == [1, 1, 1, 1]
    compiled = [small(img_size=s, compiled=True) for s in (32, 64)]
    assert [len(group) for group in groups(compiled, CPU)] == [1, 1]


def test_infer_step():
    step = build_step(small('test_hydra_vit', backend='reference'), CPU)
    output = step()
    assert output.shape == (2, 1000)
    assert not output.requires_grad


def test_train_step_runs_the_backward_pass(monkeypatch):
    built = []
    create = models.create_model
    monkeypatch.setattr(models, 'create_model', lambda *a: built.append(create(*a)) or built[0])
    step = build_step(small('test_hydra_vit', mode='train', backend='auto'), CPU)
    step()
    first = [p.grad.clone() for p in built[0].parameters()]
    step()  # no optimizer: the same gradients again, not their sum
    for before, parameter in zip(first, built[0].parameters()):
        torch.testing.assert_close(parameter.grad, before)


def test_dtype_is_autocast():
    assert build_step(small(dtype=torch.bfloat16), CPU)().dtype == torch.bfloat16
    assert build_step(small(dtype=torch.float32), CPU)().dtype == torch.float32


def test_out_of_memory_is_a_result(monkeypatch):
    def build(case: Case, device: torch.device):
        def step() -> None:
            if case.model == 'test_vit':
                raise torch.OutOfMemoryError('CUDA out of memory')

        return step

    monkeypatch.setattr(models, 'build_step', build)
    cases = [small('test_vit'), small('test_hydra_vit', backend='auto')]
    lines: list[str] = []
    vit, hydra = run_group(cases, CPU, ROOFLINE, rounds=3, time_limit=0.0, progress=lines.append)
    assert (vit.status, vit.timing, vit.images_per_second) == (OUT_OF_MEMORY, None, None)
    assert hydra.status == 'ok'
    assert hydra.images_per_second == pytest.approx(2 / hydra.timing.median)
    assert hydra.peak_bytes is None
    assert len(lines) == 3


@pytest.mark.gpu
def test_compiled_group_on_cuda():
    device = torch.device('cuda')
    cases = [
        Case(name, 160, 4, 'train', compiled, torch.bfloat16, backend)
        for name, backend in (('test_hydra_vit', 'auto'), ('test_vit', None))
        for compiled in (False, True)
    ]
    results = run_group(cases, device, ROOFLINE, rounds=3, time_limit=0.0, progress=lambda text: None)
    for result in results:
        assert result.status == 'ok'
        assert result.peak_bytes > 4 * 3 * 160 * 160 * 4  # the images at least
        assert result.timing.median > 0

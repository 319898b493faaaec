"""Which attention runs: chosen, seen and compared."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hydra_vision.sdpa import ATTENTION, attention_backend, attention_shapes, attention_that_ran, fastest_attention

CPU = torch.device('cpu')


def attend(training: bool = False) -> torch.Tensor:
    q = torch.randn(1, 2, 8, 16, requires_grad=training)
    return F.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize(('name', 'ran'), [('math', 'math'), ('flash', 'flash'), ('auto', 'flash')])
def test_a_chosen_backend_is_the_one_that_ran(name, ran):
    def step():
        with attention_backend(name):
            attend()

    assert attention_that_ran(step, CPU) == ran


def test_what_has_no_attention():
    assert attention_that_ran(lambda: torch.ones(2) + 1, CPU) == ''
    model = timm.create_model('test_resnet').eval()
    images = torch.randn(1, 3, 64, 64)
    assert attention_that_ran(lambda: model(images), CPU, model) == ''
    assert attention_shapes(model, images) == []


def test_compiled_math_is_told_from_nothing():
    """Compiled code inlines it: no operator carries its name."""
    model = timm.create_model('test_vit').eval()
    assert attention_that_ran(lambda: torch.ones(2) + 1, CPU, model) == 'math'


def test_a_backend_that_cannot_run_is_an_error_and_is_not_replaced():
    with attention_backend('efficient'), pytest.raises(RuntimeError, match='kernel'):
        attend()
    assert set(ATTENTION) == {'auto', 'cudnn', 'flash', 'efficient', 'math'}


def test_shapes_of_a_model_without_computing():
    with torch.device('meta'):
        model, images = timm.create_model('test_vit', img_size=64).eval(), torch.empty(1, 3, 64, 64)
    assert attention_shapes(model, images) == [(1, 2, 17, 32)]


@pytest.mark.parametrize('training', [False, True])
def test_the_fastest_is_one_of_those_that_can_run(training):
    name, times = fastest_attention((2, 2, 9, 16), torch.float32, CPU, training=training)
    assert set(times) == {'flash', 'math'}
    assert name == min(times, key=times.get)


@pytest.mark.gpu
def test_on_cuda_the_names_are_those_of_the_kernels():
    q = torch.randn(4, 8, 197, 64, device='cuda', dtype=torch.bfloat16)
    for name, backend in (('flash', SDPBackend.FLASH_ATTENTION), ('efficient', SDPBackend.EFFICIENT_ATTENTION)):
        with sdpa_kernel(backend):
            assert attention_that_ran(lambda: F.scaled_dot_product_attention(q, q, q), q.device) == name
    name, times = fastest_attention((4, 8, 197, 64), torch.bfloat16, q.device, training=True)
    assert name in times
    assert {'flash', 'efficient', 'math'} <= set(times)

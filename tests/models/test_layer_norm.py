"""The blocks' LayerNorm: timm's everywhere, one kernel in eager half precision on CUDA."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm

from hydra_vision.models._layer_norm import BlockNorm


def test_same_as_timms_on_the_cpu():
    norm, plain = BlockNorm(24), LayerNorm(24)
    assert norm.eps == plain.eps
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(2, 5, 24)
    assert torch.equal(norm(x), plain(x))
    with torch.autocast('cpu', torch.bfloat16):
        assert norm(x.bfloat16()).dtype == plain(x.bfloat16()).dtype


def test_the_default_norm_of_the_blocks_only():
    model = timm.create_model('test_hydra_vit', mlp_ratio=2.0, backend='chunked')
    assert {type(block.norm1) for block in model.blocks} == {type(block.norm2) for block in model.blocks} == {BlockNorm}
    assert model.blocks[0].norm1.backend == 'chunked'
    assert type(model.norm) is LayerNorm  # its result is what the user gets, in the dtype that PyTorch gives it
    other = timm.create_model('test_hydra_vit', norm_layer='layernorm2d')
    assert not any(isinstance(module, BlockNorm) for module in other.modules())


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_one_kernel_under_autocast(dtype):
    torch.manual_seed(0)
    norm = BlockNorm(192).cuda()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    weight = torch.randn(64, 192, device='cuda')
    values = torch.randn(3, 50, 192, device='cuda').to(dtype)
    found = []
    for run in (norm, lambda t: F.layer_norm(t, (192,), norm.weight, norm.bias, norm.eps)):
        x = values.clone().requires_grad_()
        with torch.autocast('cuda', dtype):
            y = run(x)
            out = F.linear(y, weight)
        grads = torch.autograd.grad(out, (x, norm.weight, norm.bias), torch.ones_like(out))
        found.append((y.dtype, out, *grads))
    assert [y for y, *_ in found] == [dtype, torch.float32]
    for ours, theirs in zip(found[0][1:], found[1][1:]):
        difference = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert difference < 2 * torch.finfo(dtype).eps


@pytest.mark.gpu
def test_not_where_it_would_not_pay_or_is_not_wanted():
    x = torch.randn(2, 5, 24, device='cuda')
    plain = BlockNorm(24, backend='chunked').cuda()
    with torch.autocast('cuda', torch.bfloat16):
        assert plain(x.bfloat16()).dtype == torch.float32
    assert torch.equal(BlockNorm(24).cuda()(x), F.layer_norm(x, (24,), eps=1e-6))
    compiled = torch.compile(BlockNorm(24).cuda(), fullgraph=True, backend='aot_eager')
    with torch.autocast('cuda', torch.bfloat16):
        assert compiled(x.bfloat16()).dtype == torch.float32


@pytest.mark.gpu
def test_blocks_of_a_model_agree_with_compiled_ones():
    torch.manual_seed(0)
    model = timm.create_model('test_hydra_vit', num_classes=5).cuda().eval()
    images = torch.randn(2, 3, 160, 160, device='cuda')
    with torch.no_grad(), torch.autocast('cuda', torch.bfloat16):
        eager, features = model(images), model.forward_features(images)
        traced = torch.compile(model, fullgraph=True, backend='aot_eager')(images)
    assert features.dtype == torch.float32
    assert (eager.float() - traced.float()).norm() / traced.float().norm() < 2e-2

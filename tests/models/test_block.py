"""The blocks' LayerNorm and the sums before it: PyTorch's everywhere, one kernel in eager half precision on CUDA."""

import copy
import statistics

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, drop_path

from hydra_vision.mixers import hydra
from hydra_vision.models._block import BlockNorm
from hydra_vision.models.hydra_vit import HydraBlock


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


@pytest.fixture
def calls(monkeypatch):
    """The way of the kernels on the CPU, with PyTorch's arithmetic in their place; names of the calls."""
    layernorm = pytest.importorskip('hydra_vision.ops.triton.layernorm')
    from hydra_vision.ops.triton import api

    seen, inner = [], hydra.hydra_inner_late

    def add_rows(x, branch, factors):
        seen.append('add_rows')
        return x + branch * factors[..., None]

    def add_layer_norm(x, branch, factors, weight, bias, eps, dtype):
        seen.append('add_layer_norm')
        total = x + (branch if factors is None else branch * factors[..., None])
        return total, F.layer_norm(total, weight.shape, weight, bias, eps).to(dtype)

    def layer_norm(x, weight, bias, eps, dtype):
        return F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype)

    def hydra_inner_late(*arguments, late, **kwargs):
        y, _ = inner(*arguments, late=False, **kwargs)
        return (4 * y, torch.full(y.shape[:2], 0.25)) if late else (y, None)

    for function in (add_rows, add_layer_norm, layer_norm):
        monkeypatch.setattr(layernorm, function.__name__, function)
    monkeypatch.setattr(api, 'scale_rows', lambda x, factors: x * factors[..., None])
    monkeypatch.setattr(hydra, 'hydra_inner_late', hydra_inner_late)
    monkeypatch.setattr(BlockNorm, 'fuses', lambda norm, x: not torch.compiler.is_compiling())
    return seen


def logits_and_grads(model, images):
    """Of the same random numbers each time."""
    torch.manual_seed(0)
    out = model(images)
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


def as_without_kernels(model, images, monkeypatch):
    """Asserts that logits and all gradients are what they are where no sum is fused."""
    found = logits_and_grads(model, images)
    with monkeypatch.context() as patch:
        patch.setattr(HydraBlock, 'fuses', lambda block, x: False)
        torch.testing.assert_close(found, logits_and_grads(model, images))


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_hydra_vit', depth=4, embed_dim=32, headdim=16, num_classes=3, **kwargs).double()


IMAGES = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ('kwargs', 'norms', 'sums'),
    [
        ({}, 4, 0),  # four blocks: three norms and the last one
        (dict(mlp_ratio=2.0), 8, 0),
        (dict(drop_path_rate=0.5), 4, 0),
        (dict(drop_path_rate=0.5, mlp_ratio=2.0, proj_drop_rate=0.2), 8, 0),
        (dict(mixer=('hydra', 'vit_attention'), mixer_kwargs=(None, dict(num_heads=2)), drop_path_rate=0.3), 4, 0),
        (dict(mixer='toeplitz', mixer_kwargs=dict(data_dependent=False), img_size=48), 4, 0),
        (dict(mixer_bias=True, class_token=True, class_token_position='middle'), 4, 0),
        (dict(scan_order='hilbert'), 4, 0),
        (dict(scan_order='alternate', mlp_ratio=2.0), 4, 0),  # the tokens between two blocks change their places
        (dict(scan_order='alternate'), 0, 4),
    ],
    ids=str,
)
def test_sums_left_open_change_nothing(calls, monkeypatch, kwargs, norms, sums):
    model = small(**kwargs).train()
    as_without_kernels(model, IMAGES, monkeypatch)
    assert (calls.count('add_layer_norm'), calls.count('add_rows')) == (norms, sums)


def test_checkpointed_blocks_close_their_sums(calls, monkeypatch):
    model = small(drop_path_rate=0.3).train()
    model.set_grad_checkpointing()
    as_without_kernels(model, IMAGES, monkeypatch)
    assert set(calls) == {'add_rows'}


def test_intermediate_tokens_and_padded_batches(calls, monkeypatch):
    model = small().eval()
    valid = torch.ones(4, 9, dtype=torch.bool)
    valid[0, 6:] = False

    def run():
        final, between = model.forward_intermediates(IMAGES)
        return [final, *between, model(IMAGES, patch_valid=valid)]

    found = run()
    assert calls == ['add_rows'] * 4  # of the padded batch none
    with monkeypatch.context() as patch:
        patch.setattr(HydraBlock, 'fuses', lambda block, x: False)
        torch.testing.assert_close(found, run())


class Wrapped(nn.Module):
    """As adapters wrap modules."""

    takes_grid = False

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x, *arguments):
        self.seen.append(x.detach())
        return self.inner(x, *arguments)


@pytest.mark.parametrize(
    'path', ['blocks.2', 'blocks.2.norm1', 'blocks.2.mixer', 'blocks.2.drop1', 'blocks.2.drop_path1', 'norm']
)
@pytest.mark.parametrize('how', ['hook', 'pre-hook', 'wrapped', 'forward'])
def test_who_watches_is_called_with_what_was_there(calls, monkeypatch, path, how):
    """Once a forward pass, with the tensor that it would be given without kernels."""
    model = small(drop_path_rate=0.3).train()
    module = model.get_submodule(path)
    seen = []
    if how == 'hook':
        module.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    elif how == 'pre-hook':
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    elif how == 'wrapped':
        wrapped = Wrapped(module)
        seen = wrapped.seen
        model.set_submodule(path, wrapped)
    else:
        inner = module.forward
        module.forward = lambda x, *arguments: (seen.append(x.detach()), inner(x, *arguments))[1]
    as_without_kernels(model, IMAGES, monkeypatch)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1])
    assert calls


def test_global_hooks_see_every_module(calls):
    model, seen = small().eval(), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(m))
    try:
        model(IMAGES)
    finally:
        handle.remove()
    assert {id(m) for m in model.blocks.modules()} - {id(model.blocks)} <= {id(m) for m in seen}
    assert not calls


def test_other_norms_and_parametrised_ones_are_called(calls, monkeypatch):
    rms = small(norm_layer='rmsnorm')
    as_without_kernels(rms, IMAGES, monkeypatch)
    model = small()
    torch.nn.utils.parametrize.register_parametrization(model.blocks[1].norm1, 'weight', nn.Softplus())
    expected = copy.deepcopy(model)
    assert not calls
    as_without_kernels(model, IMAGES, monkeypatch)
    torch.testing.assert_close(model(IMAGES), expected(IMAGES))


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


GPU_MODELS = [
    ({}, 'the norm after out_proj on Hopper'),
    (dict(mixer_bias=True, mlp_ratio=2.0, pos_embed='learn'), 'no factors of the norm, sums in float32'),
]


def gpu_model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_hydra_vit', num_classes=5, drop_path_rate=0.4, **kwargs).cuda().train()


def run_on_gpu(model, images):
    torch.manual_seed(3)
    with torch.autocast('cuda', torch.bfloat16, enabled=images.dtype == torch.float32):
        features = model.forward_features(images)
        loss = model.forward_head(features).float().square().sum()
    return [features, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.gpu
@pytest.mark.parametrize('kwargs', [kwargs for kwargs, _ in GPU_MODELS], ids=[name for _, name in GPU_MODELS])
def test_sums_in_the_norms_kernel_are_no_less_exact(monkeypatch, kwargs):
    """Features and gradients, with drop path, against float64: not further off than with sums of their own.

    Of a mixer's parameters of one number a head (here two heads) either is often twice as far off by chance: they count
    in the median only.
    """
    model = gpu_model(**kwargs)
    images = torch.randn(6, 3, 160, 160, device='cuda')
    found = run_on_gpu(model, images)
    assert all(torch.equal(a, b) for a, b in zip(found, run_on_gpu(model, images)))
    with monkeypatch.context() as patch:
        patch.setattr(HydraBlock, 'fuses', lambda block, x: False)
        apart = run_on_gpu(model, images)
        double = copy.deepcopy(model).double()
        for block in double.blocks:
            block.mixer.backend = 'chunked'

        def drawn_as_float32(module, x):
            ones = torch.ones(x.shape[0], *(1,) * (x.ndim - 1), device=x.device)
            return x * drop_path(ones, module.drop_prob, module.training)

        patch.setattr(DropPath, 'forward', drawn_as_float32)
        exact = run_on_gpu(double, images.double())
    assert [t.dtype for t in found] == [t.dtype for t in apart]
    ours, theirs = ([float((a.double() - b).norm() / b.norm()) for a, b in zip(ts, exact)] for ts in (found, apart))
    names = ['features', *(name for name, _ in model.named_parameters())]
    few = ('A_log', 'dt_bias', 'mixer.D', 'fc_D.weight', 'conv1d.weight', 'conv1d.bias')
    far = [(n, a, b) for n, a, b in zip(names, ours, theirs) if a > max(1.5 * b, 1e-2) and not n.endswith(few)]
    assert not far
    assert statistics.median(a / b for a, b in zip(ours, theirs)) < 1.1


@pytest.mark.gpu
def test_one_graph_without_the_kernel_when_compiled(monkeypatch):
    from hydra_vision.ops.triton import layernorm

    model, graphs = gpu_model().eval(), []
    images = torch.randn(2, 3, 160, 160, device='cuda')

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def refuse(*arguments):
        raise AssertionError('the kernel was called')

    for name in ('add_rows', 'add_layer_norm', 'layer_norm'):
        monkeypatch.setattr(layernorm, name, refuse)
    torch._dynamo.reset()
    with torch.no_grad(), torch.autocast('cuda', torch.bfloat16):
        torch.compile(model, fullgraph=True, backend=backend)(images)
        with pytest.raises(AssertionError, match='the kernel was called'):
            model(images)
    assert len(graphs) == 1

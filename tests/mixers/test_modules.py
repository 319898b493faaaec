"""Whatever replaces, wraps, prunes, quantises or watches a module of a mixer is called; plain ones run fused."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.utils.prune
from matrix_definitions import cases, make

from hydra_vision import mixers
from hydra_vision.mixers import hydra

FAMILY = {
    'hydra': ('hydra', dict(d_state=3, learnable_init_states=True)),
    'hydra-shared': ('hydra', dict(d_state=2, ngroups=2, share_bc=True, dt_limit=(0.02, 0.05), conv_bias=False)),
    **{name: cases()[name] for name in ('causal-dd', 'causal-even', 'quasiseparable-di', 'toeplitz-dd', 'm2')},
    **{name: cases()[name] for name in ('m2-own', 'mamba', 'vim', 'scout', 'low_rank-dd')},
}
LAYERS = (nn.Linear, nn.Conv1d)


class Called(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args):
        self.calls += 1
        return self.inner(*args)


def vit(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model('test_hydra_vit', depth=1, img_size=32, num_classes=5, **kwargs).eval()


def images(B: int = 2) -> torch.Tensor:
    return torch.randn(B, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def two_steps(model: nn.Module) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize('name', FAMILY)
@pytest.mark.parametrize('how', ['wrapped', 'hooked'])
def test_every_module_is_called_with_the_same_result(name, how):
    mixer = make(*FAMILY[name], (3, 4))
    u = torch.randn(2, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, matrix = mixer(u), mixer.matrix(u)
    modules = [(n, m) for n, m in mixer.named_modules() if n and not list(m.children())]
    silent = {n for n, _ in modules}
    for n, module in modules:
        if how == 'hooked':
            module.register_forward_hook(lambda *_, n=n: silent.discard(n))
        else:
            mixer.set_submodule(n, Called(module))
    torch.testing.assert_close(mixer(u), expected, rtol=1e-10, atol=1e-12)
    if how == 'wrapped':
        silent = {n for n, _ in modules if not mixer.get_submodule(n).calls}
    assert not silent
    torch.testing.assert_close(mixer.matrix(u), matrix, rtol=1e-10, atol=1e-12)


def test_the_memorys_mixer_calls_its_modules():
    mixer, u, memory = mixers.HydraCross(8, d_state=3, headdim=4), torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    expected = mixer(u, memory)
    for part in ('fc_D', 'norm'):
        setattr(mixer, part, Called(getattr(mixer, part)))
    torch.testing.assert_close(mixer(u, memory), expected)
    assert mixer.fc_D.calls == mixer.norm.calls == 1


@pytest.mark.parametrize('part', ['conv1d', 'fc_D', 'norm'])
def test_plain_modules_run_fused(part, monkeypatch):
    fused = []
    monkeypatch.setattr(hydra, '_hydra_inner', lambda zxbcdt, *others: fused.append(1) or zxbcdt[..., :128])
    mixer, u = hydra.Hydra(64, d_state=16), torch.randn(1, 5, 64)
    torch.func.functional_call(mixer, {n: p.detach() for n, p in mixer.named_parameters()}, (u,))
    mixer(u)
    assert len(fused) == 2
    getattr(mixer, part).register_full_backward_hook(lambda *args: None)
    mixer(u)
    assert len(fused) == 2


def test_graphs_of_called_modules():
    model = vit()
    mixer = model.blocks[0].mixer
    mixer.fc_D, mixer.conv1d = Called(mixer.fc_D), nn.utils.parametrizations.weight_norm(mixer.conv1d)
    expected = model(images())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(images()), expected)
    assert mixer.fc_D.calls == 2
    batch = ({0: torch.export.Dim('batch', min=1, max=64)},)
    exported = torch.export.export(model, (images(),), dynamic_shapes=batch).module()
    torch.testing.assert_close(exported(images(3)), model(images(3)))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images()), expected)


@pytest.mark.parametrize('mixer', ['hydra', 'quasiseparable', 'm2', 'vim'])
def test_peft_adapters_act_learn_and_merge(mixer):
    peft = pytest.importorskip('peft')
    model = vit(mixer=mixer)
    plain = model(images())
    config = peft.LoraConfig(target_modules='all-linear', r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    y = adapted(images())
    assert (y - plain).abs().max() > 1e-2
    y.sum().backward()
    still = [n for n, p in adapted.named_parameters() if p.requires_grad and not (p.grad is not None and p.grad.any())]
    assert not still
    torch.testing.assert_close(adapted.merge_and_unload()(images()), y, rtol=1e-4, atol=1e-5)


def test_peft_under_ddp_uses_every_parameter(tmp_path):
    peft = pytest.importorskip('peft')
    model = peft.get_peft_model(vit(), peft.LoraConfig(target_modules=['fc_D', 'in_proj'], r=2))
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/meet', rank=0, world_size=1)
    try:
        two_steps(nn.parallel.DistributedDataParallel(model))  # the second step fails where one had no gradient
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings('ignore::FutureWarning')  # the old weight_norm
@pytest.mark.parametrize('mixer', ['hydra', 'quasiseparable', 'm2', 'vim'])
@pytest.mark.parametrize(
    'change',
    [
        lambda m: torch.nn.utils.prune.l1_unstructured(m, 'weight', 0.0),
        nn.utils.weight_norm,
        nn.utils.parametrizations.weight_norm,
    ],
    ids=['prune', 'old weight_norm', 'weight_norm'],
)
def test_changed_weights_learn(mixer, change):
    model = vit(mixer=mixer)
    expected = model(images())
    for module in [m for m in model.modules() if isinstance(m, LAYERS)]:
        change(module)
    torch.testing.assert_close(model(images()), expected)
    two_steps(model)


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning', 'ignore::FutureWarning')
@pytest.mark.parametrize('mixer', ['hydra', 'quasiseparable'])
def test_dynamic_quantization(mixer):
    model = vit(mixer=mixer)
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert type(small.blocks[0].mixer.fc_D) is not nn.Linear
    difference = (small(images()) - model(images())).abs().max()
    assert 0 < difference < 0.02
    if mixer == 'hydra':
        torch.testing.assert_close(torch.jit.script(small)(images()), small(images()))


@pytest.mark.filterwarnings('ignore')
def test_torchao_quantizes_every_linear():
    torchao = pytest.importorskip('torchao.quantization')
    model = vit()
    small = copy.deepcopy(model)
    torchao.quantize_(small, torchao.Int8WeightOnlyConfig())
    assert type(small.blocks[0].mixer.fc_D.weight) is not nn.Parameter
    assert 0 < (small(images()) - model(images())).abs().max() < 0.02

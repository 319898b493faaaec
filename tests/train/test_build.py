from pathlib import Path

import pytest
import timm
import torch

from hydra_vision.errors import CheckpointError, ConfigError
from hydra_vision.train import build, data, tasks
from hydra_vision.train.config import Config, merge

NANO = {'model': {'name': 'hydra_vit_nano', 'kwargs': {'patch_size': 4, 'depth': 2}}, 'data': {'img_size': 16}}


def recipe(**sections: dict) -> Config:
    return Config.from_dict(merge(NANO, sections))


def names_of(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, dict]:
    """Parameter name -> the group that holds it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in optimizer.param_groups for parameter in group['params']}


# What must not decay, by the end of its name; every other parameter must.
_VIT = ('.bias', 'pos_embed', 'cls_token', 'norm.weight', 'norm1.weight', 'norm2.weight')
EXEMPT = {
    'hydra_vit_nano': (*_VIT, 'A_log', 'dt_bias', '.D'),
    'vit_base_patch16_224': _VIT,
    'deit3_small_patch16_224': (*_VIT, 'gamma'),
    'convnext_tiny': ('.bias', 'gamma', 'norm.weight', 'stem.1.weight', 'downsample.0.weight'),
}


@pytest.mark.parametrize('name', EXEMPT)
def test_no_decay_for_biases_norms_embeddings_and_the_state_space_parameters(name):
    """The same rule for the Hydra family and for timm's models, on models without memory."""
    kwargs = {'pos_embed': 'learn', 'class_token': True} if name.startswith('hydra') else {}
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=10, **kwargs)
    config = recipe(model={'name': name}, optim={'weight_decay': 0.1})
    groups = names_of(build.create_optimizer(config, model), model)
    assert groups.keys() == {parameter for parameter, _ in model.named_parameters()}
    for parameter, group in groups.items():
        assert group['weight_decay'] == (0 if parameter.endswith(EXEMPT[name]) else 0.1), parameter
    assert sum(group['weight_decay'] > 0 for group in groups.values()) > 10
    if name.startswith('hydra'):
        assert groups['blocks.0.mixer.in_proj.weight']['weight_decay'] == 0.1
        assert groups['blocks.0.mixer.A_log']['weight_decay'] == 0
        assert groups['blocks.0.mixer.conv1d.weight']['weight_decay'] == 0.1


def test_muon_takes_the_projections_and_leaves_the_state_space_parameters_to_adam():
    config = Config.from_dict({'model': {'name': 'test_hydra_vit'}, 'optim': {'name': 'nadamuon'}})
    model = build.create_model(config, 10)
    optimizer = build.create_optimizer(config, model)
    model(torch.randn(2, 3, 160, 160)).sum().backward()
    optimizer.step()
    muon = {name for name, p in model.named_parameters() if optimizer.state[p]['use_muon']}
    assert {name.split('mixer.')[-1] for name in muon if 'mixer.' in name} == {'in_proj.weight', 'out_proj.weight'}


def test_a_timm_vit_trains_through_the_same_code(tiny, run, tmp_path):
    """The baseline under the recipe of the Hydra family; only the model's own arguments differ."""
    text = Path(tiny[1]).read_text().replace('kwargs: {patch_size: 4, depth: 1, embed_dim: 64}', 'kwargs: {depth: 1}')
    (tmp_path / 'vit.yaml').write_text(text)
    sizes = ('--set', 'model.kwargs.patch_size=4', '--set', 'model.kwargs.embed_dim=64')
    command = ('--config', 'vit.yaml', *tiny[2:], '--model', 'vit_base_patch16_224', *sizes)
    code, out, error = run(*command, '--set', 'model.kwargs.num_heads=2', '--set', 'log.every=5', '--output', 'run')
    assert code == 0, error
    assert 'vit_base_patch16_224' in out
    assert (tmp_path / 'run' / 'steps.csv').read_text().splitlines()[1].endswith(',,,,,')  # no Hydra layer
    assert not (tmp_path / 'run' / 'mixers.csv').exists()


@pytest.mark.parametrize(
    ('augment', 'name'),
    [
        ({'mixup': 0.2, 'smoothing': 0.1}, 'SoftTargetCrossEntropy'),
        ({'smoothing': 0.1}, 'LabelSmoothingCrossEntropy'),
        ({}, 'CrossEntropyLoss'),
    ],
)
def test_the_loss_follows_from_the_labels(augment, name):
    assert type(tasks.create_loss(recipe(augment=augment))).__name__ == name


def test_rates_of_dropping_reach_the_model():
    for name, kwargs in (('hydra_vit_nano', NANO['model']['kwargs']), ('test_vit', {'patch_size': 4, 'depth': 2})):
        rates = {'name': name, 'kwargs': kwargs, 'drop_rate': 0.3, 'drop_path_rate': 0.2}
        model = build.create_model(recipe(model=rates), 10)
        assert model.head_drop.p == 0.3
        paths = [module.drop_prob for module in model.modules() if type(module).__name__ == 'DropPath']
        assert max(paths) == pytest.approx(0.2)


def test_the_schedule_counts_the_last_step_of_an_epoch_and_the_cooldown():
    config = recipe(schedule={'epochs': 10, 'cooldown_epochs': 1})
    optimizer = build.create_optimizer(config, build.create_model(config, 10))
    assert build.create_schedule(config, optimizer, updates_per_epoch=4)[1] == 11
    assert [build.updates_in(batches, 4) for batches in (4, 5, 6, 8)] == [1, 2, 2, 2]


@pytest.mark.parametrize(
    ('sections', 'message'),
    [
        (
            {'model': {'name': 'hydra_vit_nan'}},
            "'hydra_vit_nan'; the nearest valid name is 'hydra_vit_nano'",
        ),
        ({'model': {'kwargs': {'patchsize': 4}}}, "unexpected keyword argument 'patchsize'"),
        ({'data': {'img_size': 18}}, r'data.img_size=18 is not valid .* patches of \(4, 4\)'),
    ],
)
def test_models_that_cannot_be_built(sections, message):
    with pytest.raises(ConfigError, match=message):
        build.create_model(recipe(**sections), 10)


def test_optimizers_and_schedules_that_cannot_be_built():
    config = recipe(optim={'name': 'adamx'})
    model = build.create_model(config, 10)
    with pytest.raises(ConfigError, match=r"cannot build optim.name='adamx'"):
        build.create_optimizer(config, model)
    config = recipe(schedule={'kwargs': {'decay': 3}})
    with pytest.raises(ConfigError, match=r"cannot build schedule.name='cosine'"):
        build.create_schedule(config, build.create_optimizer(config, model), 1)


def test_device_and_precision_that_are_not_here():
    with pytest.raises(ConfigError, match=r"run.device='gpu' is not available"):
        build.pick_device(recipe(run={'device': 'gpu'}))
    with pytest.raises(ConfigError, match=r"run.amp='fp16' needs CUDA"):
        build.amp_dtype(recipe(run={'amp': 'fp16'}), torch.device('cpu'))


def test_attention_lengths_are_those_of_the_model():
    """100 patches and no prefix token; a Hydra layer has no attention."""
    for name, lengths in (('test_vit', {101}), ('test_hydra_vit', set())):
        model = timm.create_model(name).train()
        assert build.attention_lengths(model, (3, 160, 160), torch.device('cpu')) == lengths
        assert model.training


@pytest.mark.parametrize(
    ('capability', 'tokens', 'amp', 'runs'),
    [
        ((9, 0), {64, 197}, torch.bfloat16, False),
        ((9, 0), {197}, torch.bfloat16, True),
        ((8, 0), {64}, torch.bfloat16, True),
        ((9, 0), {64}, None, None),
    ],
)
def test_cudnn_attention_is_off_only_where_its_gradients_are_nan(monkeypatch, capability, tokens, amp, runs):
    calls = []
    monkeypatch.setattr(torch.backends.cuda, 'enable_cudnn_sdp', calls.append)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: capability)
    monkeypatch.setattr(build, 'attention_lengths', lambda *_: tokens)
    note = build.avoid_faulty_attention(torch.nn.Identity(), (3, 8, 8), torch.device('cuda'), amp)
    assert calls == ([] if runs is None else [runs])
    assert (note is None) == (runs is not False)


@pytest.mark.parametrize('channels', [1, 3])
def test_initial_weights_for_grey_images(tmp_path, caplog, channels):
    """Those of a grey model are taken as they are, those of a coloured one are added up over the channels."""
    kwargs = NANO['model']['kwargs']
    source = timm.create_model('hydra_vit_nano', img_size=16, num_classes=10, in_chans=channels, **kwargs)
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'weights.pt')
    start = recipe(model={'checkpoint': str(tmp_path / 'weights.pt'), 'in_chans': 1})
    model = build.create_model(start, 10)
    assert torch.allclose(model.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(dim=1, keepdim=True))
    assert not [record for record in caplog.records if record.levelname == 'WARNING']
    assert data.resolve_input(start, model)['input_size'] == (1, 16, 16)


def test_initial_weights_that_do_not_fit(tmp_path):
    (tmp_path / 'text.pt').write_text('not a checkpoint')
    for path in (tmp_path / 'none.pt', tmp_path / 'text.pt'):
        with pytest.raises(CheckpointError, match=str(path)):
            build.create_model(recipe(model={'checkpoint': str(path)}), 10)
    torch.save({'state_dict': {'foo.weight': torch.zeros(1)}}, tmp_path / 'other.pt')
    with pytest.raises(CheckpointError, match=r'initial weights: .*other.pt'):
        build.create_model(recipe(model={'checkpoint': str(tmp_path / 'other.pt')}), 10)

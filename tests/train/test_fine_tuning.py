"""Starting from other weights: other classes, other sizes, a frozen backbone, a teacher."""

import pytest
import timm
import torch

from hydra_vision.errors import ConfigError
from hydra_vision.train import build, data, tasks
from hydra_vision.train.checkpoint import BEST, LAST, load_checkpoint
from hydra_vision.train.config import Config, merge

CPU = torch.device('cpu')


def recipe(**sections) -> Config:
    base = {'model': {'name': 'test_hydra_vit', 'kwargs': {'depth': 2}}, 'data': {'img_size': 32}}
    return Config.from_dict(merge(base, sections))


def saved(tmp_path, name='test_hydra_vit', num_classes=7, **kwargs) -> str:
    torch.manual_seed(0)
    path = tmp_path / f'{name}.pth'
    torch.save(timm.create_model(name, num_classes=num_classes, **kwargs).state_dict(), path)
    return str(path)


@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [('test_hydra_vit', {'depth': 2, 'pos_embed': 'learn'}), ('test_vit', {'depth': 2})],
)
def test_another_size_and_other_classes(tmp_path, name, kwargs):
    path = saved(tmp_path, name, img_size=32, **kwargs)
    model = {'name': name, 'kwargs': kwargs, 'checkpoint': path}
    built = build.create_model(recipe(model=model, data={'img_size': 64}), 3)
    assert built.initial_weights.startswith(
        f'weights of {path}, new head (7 -> 3 classes), position embedding resampled'
    )
    assert built(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    weights = torch.load(path)
    for key, value in built.state_dict().items():
        assert key.startswith('head.') or key == 'pos_embed' or torch.equal(value, weights[key]), key
    same = build.create_model(recipe(model=model), 7)
    assert same.initial_weights == f'weights of {path}'
    assert torch.equal(same.head.weight, weights['head.weight'])


@pytest.mark.parametrize('name', ['test_hydra_vit', 'test_resnet'])
def test_only_the_classifier_learns_in_a_linear_probe(name):
    values = {'model': {'name': name, 'freeze_backbone': True}, 'data': {'img_size': 32}}
    config = Config.from_dict(values)
    model = build.create_model(config, 5)
    head = set(map(id, model.get_classifier().parameters()))
    assert {id(p) for p in model.parameters() if p.requires_grad} == head
    groups = build.create_optimizer(config, model).param_groups
    assert {id(p) for group in groups for p in group['params']} == head
    model.train()
    build.frozen_parts_to_eval(model)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert bool(norms) == (name == 'test_resnet')
    assert not any(norm.training for norm in norms)
    assert model.get_classifier().training


def test_a_linear_probe_leaves_the_backbone_and_its_average_as_they_were(tiny, finished, run, tmp_path):
    start = load_checkpoint(tmp_path / 'run' / BEST)['state_dict_ema']
    options = ('--set', 'model.checkpoint=run/best.pt', '--set', 'model.freeze_backbone=true', '--epochs', 2)
    code, out, error = run(*tiny, *options, '--output', 'probe')
    assert code == 0, error
    assert 'start   weights of run/best.pt' in out
    state = load_checkpoint(tmp_path / 'probe' / LAST)
    for key in ('state_dict', 'state_dict_ema'):
        changed = {name for name, value in state[key].items() if not torch.equal(value, start[name])}
        assert changed == {'head.weight', 'head.bias'}, key


def test_a_model_without_a_classifier_is_no_probe():
    with pytest.raises(ConfigError, match=r'test_hydra_vit has no classifier'):
        build.create_model(recipe(model={'freeze_backbone': True}), 0)
    with pytest.raises(ConfigError, match=r'layer_decay has no effect with model.freeze_backbone'):
        recipe(model={'freeze_backbone': True}, optim={'layer_decay': 0.7})


@pytest.mark.parametrize('name', ['test_hydra_vit', 'test_vit'])
def test_layer_decay_slows_lower_layers(name):
    config = recipe(model={'name': name, 'kwargs': {}}, optim={'layer_decay': 0.5})
    model = build.create_model(config, 3)
    scales = {}
    for group in build.create_optimizer(config, model).param_groups:
        for parameter in group['params']:
            scales[id(parameter)] = group['lr_scale']
    scale = {key: scales[id(value)] for key, value in model.named_parameters()}
    assert scale['head.weight'] == 1.0
    first, second = (next(v for k, v in scale.items() if k.startswith(f'blocks.{n}.')) for n in (0, 1))
    assert second == pytest.approx(2 * first)
    assert scale['patch_embed.proj.weight'] == pytest.approx(first / 2)


def test_the_teachers_loss_by_hand(tmp_path):
    path = saved(tmp_path, 'test_vit', num_classes=3, img_size=32)
    distill = {'teacher': 'test_vit', 'checkpoint': path, 'task_weight': 0.25, 'temperature': 2.0}
    config = recipe(distill=distill, data={'img_size': 32, 'mean': [0.1, 0.2, 0.3], 'std': [0.4, 0.5, 0.6]})
    student = build.create_model(config, 3)
    task = tasks.create_task(config, student, CPU)
    task.train()
    assert student.training
    assert not any(module.training for module in task.teacher.modules())
    assert not any(p.requires_grad for p in task.teacher.parameters())
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    result = task(images, targets)
    teacher = timm.create_model('test_vit', num_classes=3, img_size=32, checkpoint_path=path).eval()
    with torch.no_grad():
        p = torch.log_softmax(teacher(images) / 2, -1)
    q = torch.log_softmax(result['output'] / 2, -1)
    kl = (p.exp() * (p - q)).sum() / 4 * 4  # mean over the batch, times the temperature squared
    expected = 0.25 * torch.nn.functional.cross_entropy(result['output'], targets) + 0.75 * kl
    torch.testing.assert_close(result['loss'], expected)
    result['loss'].backward()
    assert {id(p) for g in build.create_optimizer(config, student).param_groups for p in g['params']} == {
        id(p) for p in student.parameters()
    }


def test_a_run_with_a_teacher(tiny, finished, run, tmp_path):
    kwargs = '{patch_size: 4, depth: 1, embed_dim: 64}'
    options = ('--set', 'distill.teacher=hydra_vit_nano', '--set', f'distill.kwargs={kwargs}')
    options = (*options, '--set', 'distill.checkpoint=run/best.pt', '--set', 'augment.mixup=0.5')
    code, out, error = run(*tiny, *options, '--epochs', 2, '--output', 'student')
    assert code == 0, error
    assert 'teacher hydra_vit_nano' in out
    state = load_checkpoint(tmp_path / 'student' / LAST)
    assert state['state_dict'].keys() == load_checkpoint(finished / LAST)['state_dict'].keys()


def test_teachers_that_cannot_teach(tmp_path):
    path = saved(tmp_path, 'test_vit', num_classes=7, img_size=32)
    student = build.create_model(recipe(), 3)
    for section, message in (
        ({'teacher': 'test_vit', 'checkpoint': path}, r'has 7 classes, the data has 3'),
        ({'teacher': 'vit_base_patch16_224'}, r'was trained for 1000 classes, the data has 3'),
        ({'teacher': 'test_hydra_vit'}, r'has no published weights; set distill.checkpoint'),
        (
            {'teacher': 'test_vitt', 'checkpoint': path},
            r"teacher='test_vitt'; the nearest valid name is 'test_vit",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            tasks.create_task(recipe(distill=section), student, CPU)
    with pytest.raises(ConfigError, match=r'distill.temperature has no effect without distill.teacher'):
        recipe(distill={'temperature': 2.0})


@pytest.mark.parametrize(
    ('model', 'kwargs'),
    [('hydra_vit_nano', '{patch_size: 4, depth: 1, embed_dim: 64, pos_embed: learn}'), ('test_vit', '{patch_size: 4}')],
)
def test_training_images_grow_over_the_run(tiny, run, tmp_path, monkeypatch, model, kwargs):
    seen = []
    create = data.train_loader

    def spy(config, *arguments):
        seen.append(config.data.img_size)
        return create(config, *arguments)

    monkeypatch.setattr(data, 'train_loader', spy)
    options = ('--model', model, '--set', f'model.kwargs={kwargs}', '--set', 'model.drop_path_rate=0')
    options = (*options, '--img-size', 16, '--set', 'data.progressive_sizes=[8, 16]', '--epochs', 4)
    code, out, error = run('--config', tiny[1], *tiny[2:], *options, '--output', 'run')
    assert code == 0, error
    assert 'sizes   8, 16 px' in out
    assert seen == [8, 16]
    state = load_checkpoint(tmp_path / 'run' / LAST)
    assert state['history'][-1]['val_loss'] > 0
    seen.clear()
    assert run('--resume', 'run', '--epochs', 5)[0] == 0
    assert seen == [16]


@pytest.mark.parametrize(
    ('sizes', 'epochs', 'seen'),
    [([8, 16], 4, [8, 8, 16, 16, 16]), ([8, 16], 5, [8, 8, 8, 16, 16, 16]), ([8, 12, 16], 3, [8, 12, 16, 16])],
)
def test_the_sizes_have_equal_parts_of_the_epochs(sizes, epochs, seen):
    """And the last one all of the cool-down."""
    config = recipe(data={'img_size': 16, 'progressive_sizes': sizes}, schedule={'epochs': epochs})
    assert [config.at_epoch(epoch).data.img_size for epoch in range(epochs + 1)] == seen


def test_sizes_that_cannot_grow(fails, tiny):
    sizes = 'data.progressive_sizes'
    assert 'must end with data.img_size=8' in fails(*tiny, '--set', f'{sizes}=[4, 16]', code=2)
    assert 'has 4 sizes for schedule.epochs=3' in fails(*tiny, '--set', f'{sizes}=[4, 4, 4, 8]', code=2)
    assert 'progressive_sizes[0]=6 is not valid' in fails(*tiny, '--set', f'{sizes}=[6, 8]', code=2)

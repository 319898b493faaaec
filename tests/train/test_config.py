import re

import pytest
import yaml

from hydra_vision.errors import ConfigError
from hydra_vision.train.config import Config, keys, merge, parse_override, read_recipe, recipe_names


def config(*overrides: str) -> Config:
    values: dict = {}
    for text in overrides:
        values = merge(values, parse_override(text))
    return Config.from_dict(values)


@pytest.mark.parametrize('name', recipe_names())
def test_packaged_recipes_are_valid_and_survive_yaml(name):
    recipe = Config.from_dict(read_recipe(name))
    assert Config.from_dict(recipe.to_dict()) == recipe
    assert Config.from_dict(yaml.safe_load(recipe.to_yaml(comments=True))) == recipe


def test_imagenet_recipe_is_the_published_one():
    recipe = Config.from_dict(read_recipe('hydra_vit_base_imagenet1k'))
    assert recipe.data.batch_size * recipe.optim.accum_steps == recipe.optim.lr_batch_size == 1024
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.betas) == (1e-3, 0.05, (0.9, 0.999))
    assert (recipe.schedule.epochs, recipe.schedule.warmup_epochs, recipe.schedule.min_lr) == (300, 10, 1e-5)
    assert (recipe.model.drop_path_rate, recipe.ema.decay, recipe.augment.smoothing) == (0.5, 0.99996, 0.1)
    assert (recipe.augment.mixup, recipe.augment.cutmix, recipe.augment.erase_prob) == (0.8, 1.0, 0.25)


@pytest.mark.parametrize('name', ['hydra_vit_small_imagenet1k', 'hydra_vit_tiny_imagenet1k', 'vit_base_imagenet1k'])
def test_variants_differ_from_the_base_recipe_only_where_they_say_so(name):
    base, variant = Config.from_dict(read_recipe('hydra_vit_base_imagenet1k')), Config.from_dict(read_recipe(name))
    assert variant.augment == base.augment
    assert variant.schedule == base.schedule
    assert variant.data.batch_size * variant.optim.accum_steps == 1024


@pytest.mark.parametrize(
    ('text', 'section', 'key', 'value'),
    [
        ('optim.lr=1e-3', 'optim', 'lr', 1e-3),  # YAML alone reads text here
        ('augment.scale=[0.5, 1]', 'augment', 'scale', (0.5, 1)),
        ('data.img_size=[64, 32]', 'data', 'img_size', (64, 32)),
        ('data.dir=2024', 'data', 'dir', '2024'),
        ('data.dir=null', 'data', 'dir', None),
        ('data.crop_mode=squash', 'data', 'crop_mode', 'squash'),
        ('model.kwargs.patch_size=4', 'model', 'kwargs', {'patch_size': 4}),
        ('model.kwargs={patch_size: 4}', 'model', 'kwargs', {'patch_size': 4}),
    ],
)
def test_overrides_are_read_as_the_type_of_their_field(text, section, key, value):
    assert getattr(getattr(config(text), section), key) == value


def test_every_field_can_be_set_from_the_command_line():
    for key in keys():
        section, name = key.split('.')
        value = Config().to_dict()[section][name]
        text = yaml.safe_dump([value], default_flow_style=True, width=10**6).strip()[1:-1] if value != '' else ''
        assert getattr(getattr(config(f'{key}={text}'), section), name) == getattr(getattr(Config(), section), name)


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ('optim.lrr=1', "unknown key 'optim.lrr'; the nearest valid name is 'optim.lr'"),
        ('lr=1', "the nearest valid name is 'optim.lr'"),
        ('optim.lr', 'expected KEY=VALUE'),
        ('optim.lr.x=1', 'optim.lr has no keys of its own'),
        ('optim.lr=fast', "optim.lr='fast' is not valid; allowed: a number"),
        ('optim.lr=nan', 'optim.lr=nan is not valid'),
        ('optim.lr=0', 'optim.lr=0 is not valid; allowed: > 0'),
        ('data.batch_size=1.5', 'data.batch_size=1.5 is not valid; allowed: an integer'),
        ('augment.scale=[1, 2, 3]', 'augment.scale=[1, 2, 3] is not valid; allowed: [2 x float]'),
        ('augment.scale=[1.0, 0.5]', 'must be [smallest, largest]'),
        ('run.amp=bf61', 'allowed: auto, none, bf16 or fp16'),
        ('model.kwargs=[1]', 'allowed: a mapping'),
        ('model.kwargs.img_size=8', 'model.kwargs.img_size is set by data.img_size'),
        ('model.in_chans=4', 'model.in_chans=4 is not valid'),
        ('schedule.warmup_epochs=100', 'must be smaller than schedule.epochs=100'),
        ('data.download=true', 'data.download has no effect'),
        ('data.name=sklearn/iris', 'the only scikit-learn set'),
        ('run.compile_mode=default', 'needs run.torch_compile=true'),
        ('ema.warmup=true', 'needs ema.decay'),
        ('data.mean=[1', 'cannot read the value'),
        # values that contradict each other
        ('augment.mixup=0.2 data.batch_size=15', 'data.batch_size=15 must be even'),
        ('augment.color_jitter=0.3 augment.auto_augment=rand-m9', 'has no effect with augment.auto_augment'),
        ('schedule.name=none optim.layer_decay=0.7', "schedule.name='none' would ignore it"),
        ('data.name=hdfs/cifar10 data.dir=images', "data.name='hdfs/cifar10' is not valid; allowed:"),
        ('model.pretrained=true model.checkpoint=a.pt', 'both name the initial weights'),
    ],
)
def test_a_wrong_override_says_what_is_allowed(overrides, message):
    with pytest.raises(ConfigError) as caught:
        config(*re.split(r' (?=[a-z]+\.)', overrides))
    assert message in str(caught.value)


def test_a_recipe_file_may_build_on_another(tmp_path):
    (tmp_path / 'below.yaml').write_text('optim: {lr: 2e-3}\nmodel: {kwargs: {depth: 2, patch_size: 4}}\n')
    (tmp_path / 'top.yaml').write_text('base: below.yaml\nmodel: {kwargs: {depth: 3}}\n')
    recipe = Config.from_dict(read_recipe(str(tmp_path / 'top.yaml')))
    assert recipe.optim.lr == 2e-3
    assert recipe.model.kwargs == {'depth': 3, 'patch_size': 4}


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('optim: {lrr: 1}', "unknown key 'optim.lrr'; the nearest valid name is 'optim.lr'"),
        ('optimizer: {lr: 1}', "unknown section 'optimizer'; the nearest valid name is 'optim"),
        ('optim: 3', 'optim is a section with keys, got 3'),
        ('- 1', 'expected sections with keys'),
        ('base: 3', 'allowed: the name of another recipe'),
        ('base: mine.yaml', 'circular base: mine.yaml'),
        ('base: nowhere.yaml', "no recipe 'nowhere.yaml'"),
        ('optim: {lr: 1}\noptim: {lr: 2}', "duplicate key 'optim'"),
        ('optim: {', 'cannot read recipe'),
    ],
)
def test_a_wrong_recipe_file_says_what_is_wrong(tmp_path, text, message):
    (tmp_path / 'mine.yaml').write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_recipe(str(tmp_path / 'mine.yaml'))
    assert message in str(caught.value)

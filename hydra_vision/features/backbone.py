"""A model with weights and the preprocessing that belongs to it, from a name, a file or a training run."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform
from timm.data.model_config import resolve_input_data_config
from torch import nn

import hydra_vision  # noqa: F401  registers the models

from ..console import check_model_name
from ..device import pick_device
from ..errors import FeatureError, first_line
from ..hub import constructor_args
from ..images import ImageRules
from ..io import to_path
from ..weights import brief_mismatch, read_file, state_dict_of

__all__ = ['Backbone', 'load_backbone']

Size = int | tuple[int, int]

# Arguments that a card leaves out: the size is in its data, classes are no features, the rest are ways to compute.
_SAME_FEATURES = ('img_size', 'num_classes', 'dynamic_img_size', 'backend')


@dataclasses.dataclass
class Backbone:
    """A model in eval mode on its device.

    Args:
        model: The model.
        name: Its name for `timm.create_model`.
        weights: Where its weights are from: 'pretrained', 'random', or a path.
        data: timm's data config: input_size (C, H, W), mean, std, interpolation, crop_pct, crop_mode.
        rules: What becomes of grey, 16-bit, rotated images; by default what the trainer does by default.
        classes: Names of the classes of its head, where they are known.
        build: Makes the same model without weights.
        arguments: What it was built with, where the model keeps no record of it.
    """

    model: nn.Module
    name: str
    weights: str
    data: dict[str, Any]
    rules: ImageRules
    classes: list[str] | None = None
    build: Callable[[], nn.Module] | None = None
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        name: str | None = None,
        weights: str = 'in memory',
        build: Callable[[], nn.Module] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> 'Backbone':
        """A timm model that is loaded already, with the preprocessing that its `pretrained_cfg` states.

        Raises:
            FeatureError: It is in training mode.
        """
        if model.training and weights == 'in memory':
            raise FeatureError('the model is in training mode: call model.eval() first')
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        data = resolve_input_data_config(model)  # of its own size and number of channels
        channels = data['input_size'][0]
        names = cfg.get('label_names') if weights != 'random' else None
        name = name or cfg.get('architecture') or type(model).__name__
        return cls(
            model,
            name,
            weights,
            data,
            ImageRules('L' if channels == 1 else 'RGB'),
            list(names) if names else None,
            build,
            dict(arguments or {}),
        )

    @property
    def img_size(self) -> tuple[int, int]:
        """(H, W) of its input."""
        return tuple(self.data['input_size'][1:])

    def transform(self, whole: bool = False) -> Any:
        """timm's eval transform, PIL image -> normalised tensor (C, H, W).

        Args:
            whole: The whole image instead of its centre: squashed to the input size.
        """
        data = {**self.data, 'crop_pct': 1.0, 'crop_mode': 'squash'} if whole else self.data
        return create_transform(**data, is_training=False)

    def untrained(self, seed: int = 0) -> 'Backbone':
        """The same model with the weights that training starts from.

        Raises:
            FeatureError: It is not known how the model was built.
        """
        if self.build is None:
            raise FeatureError(f'{self.name} was not loaded by name: there is no untrained model to compare it with')
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
        other = dataclasses.replace(self, model=model, weights='random', data=dict(self.data))
        _resize(other, self.img_size)
        model.eval().requires_grad_(False).to(next(self.model.parameters()).device)
        return other

    def card(self) -> dict[str, Any]:
        """What features follow from, as JSON gives it back: weights, constructor arguments, preprocessing."""
        arguments = {**self.arguments, **constructor_args(self.model)}
        arguments = {key: value for key, value in arguments.items() if key not in _SAME_FEATURES}
        card = {
            'model': self.name,
            'weights': self.weights,
            'fingerprint': self.fingerprint(),
            'arguments': arguments,
            'data': self.data,
            'rules': dataclasses.asdict(self.rules),
        }
        return json.loads(json.dumps(card, default=_text))

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and values of all weights.

        Models that differ in what has no weights, as the order of a scan, share it: see `card`.
        """
        digest = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(f'{key} {tuple(value.shape)} {value.dtype}'.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def load_backbone(
    name: str | None = None,
    *,
    checkpoint: str | Path | None = None,
    random_init: bool = False,
    img_size: Size | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    device: str | torch.device = 'cpu',
    seed: int = 0,
) -> Backbone:
    """Build a model and load its weights: from a checkpoint where one is given, else the published ones.

    Args:
        name: Any name that `timm.create_model` takes, 'hf-hub:...' and 'local-dir:...' included. May be left out
            where the checkpoint is one of `train_imagenet.py`: it carries its recipe.
        checkpoint: A run folder or checkpoint of `train_imagenet.py` (of raw and averaged weights, those that
            validated best), or any file of weights that timm reads.
        random_init: Use untrained weights, drawn with `seed`. Never happens unasked.
        img_size: Side or (H, W) of the input; by default the model's own.
        model_kwargs: Further arguments of `timm.create_model`.
        data: Replaces entries of timm's data config (mean, std, interpolation, crop_pct, crop_mode).
        device: Where the model goes.
        seed: Seed of `random_init`.

    Raises:
        FeatureError: An unknown name, no weights, weights that do not fit, a size that the patches do not divide.
    """
    if checkpoint is not None and random_init:
        raise FeatureError('checkpoint and random_init exclude each other')
    if name is None and checkpoint is None:
        raise FeatureError('no model: give its name, or a checkpoint of train_imagenet.py')
    if name is not None and ':' not in name:
        check_model_name(name)
    size, device = _size(img_size), pick_device(device)
    _check_data(data)
    state = None if checkpoint is None else _read_checkpoint(to_path(checkpoint, 'checkpoint'))
    if state is not None and 'config' in state:
        backbone = _from_run(state, name, str(checkpoint), model_kwargs)
    else:
        backbone = _from_timm(name, state, str(checkpoint), random_init, size, dict(model_kwargs or {}), seed)
    for key, value in (data or {}).items():
        channels = backbone.data['input_size'][0]
        if key in ('mean', 'std') and len(value) not in (1, channels):
            raise FeatureError(f'{key} has {len(value)} values, the model {channels} channels')
        backbone.data[key] = value
    if size is not None:
        _resize(backbone, size)
    backbone.model.eval().requires_grad_(False).to(device)
    return backbone


def _size(img_size: Size | None) -> tuple[int, int] | None:
    if img_size is None:
        return None
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise FeatureError(f'img_size={img_size}; allowed: a positive number, or (H, W)')
    return size


def _check_data(data: Mapping[str, Any] | None) -> None:
    allowed = ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
    unknown = sorted(set(data or {}) - set(allowed))
    if unknown:
        raise FeatureError(f'data={unknown}; allowed keys: {", ".join(allowed)}')
    for key, value in (data or {}).items():
        if key == 'crop_pct' and not 0 < value <= 1:
            raise FeatureError(f'crop_pct={value}; allowed: 0 < crop_pct <= 1')
        if key == 'mean' and not all(map(math.isfinite, value)):
            raise FeatureError(f'mean={tuple(value)}; allowed: finite numbers')
        if key == 'std' and not all(0 < each < math.inf for each in value):
            raise FeatureError(f'std={tuple(value)}; allowed: numbers above 0')


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds: a run with its recipe (key 'config'), or weights alone."""
    from ..train.checkpoint import BEST, LAST, find_checkpoint, load_run

    if path.is_dir():
        if (path / 'config.json').is_file():
            raise FeatureError(f'{path} is a saved model: give it as the model, local-dir:{path}')
        path = next((path / name for name in (BEST, LAST) if (path / name).is_file()), find_checkpoint(str(path), BEST))
    if not path.is_file():
        raise FeatureError(f'checkpoint={str(path)!r} is no file; allowed: a run folder or a file of weights')
    held = read_file(path)
    if isinstance(held, dict) and {'format', 'config', 'state_dict'} <= held.keys():
        return load_run(path)
    return state_dict_of(held, path)


def _from_run(state: dict[str, Any], name: str | None, path: str, model_kwargs: Mapping[str, Any] | None) -> Backbone:
    """The model of a checkpoint that this package's trainer wrote."""
    from ..train.build import create_model
    from ..train.data import image_rules, resolve_input
    from ..train.runs import trained_model

    if name is not None and name != state['arch']:
        raise FeatureError(f'model={name!r}, but {path} holds a {state["arch"]}')
    if model_kwargs:
        raise FeatureError(f'model_kwargs={dict(model_kwargs)}: the recipe in {path} says how the model is built')
    model, config = trained_model(state, 'auto', path)
    data, rules = resolve_input(config, model), image_rules(config)
    build = partial(create_model, config, state['num_classes'], load_weights=False)
    return Backbone(model, state['arch'], path, data, rules, state['classes'], build)


def _from_timm(
    name: str | None,
    weights: dict[str, Any] | None,
    path: str,
    random_init: bool,
    size: tuple[int, int] | None,
    kwargs: dict[str, Any],
    seed: int,
) -> Backbone:
    if name is None:
        raise FeatureError(f'{path} holds weights alone: name the model that they belong to')
    local = ':' not in name
    cfg = timm.models.get_pretrained_cfg(name) if local else None
    if weights is not None:
        head = weights.get(f'{cfg.classifier if cfg else "head"}.weight')
        classes = 0 if head is None else head.shape[0]
        if kwargs.setdefault('num_classes', classes) != classes:  # timm would leave the head untrained in silence
            raise FeatureError(f'num_classes={kwargs["num_classes"]}, but the head in {path} has {classes} classes')
        kwargs['pretrained_cfg_overlay'] = {'state_dict': weights, 'num_classes': classes}
    elif not random_init and local and (cfg is None or not cfg.has_weights):
        raise FeatureError(f'{name} has no published weights: give a checkpoint, or ask for random_init')
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = timm.create_model(name, pretrained=not random_init, **kwargs)
            if size is not None and cfg is not None and cfg.fixed_input_size and not hasattr(model, 'set_input_size'):
                kwargs['img_size'] = size
                model = timm.create_model(name, pretrained=not random_init, **kwargs)
    except Exception as error:  # constructors check little of what they are given, and raise anything
        own = {key: value for key, value in kwargs.items() if key != 'pretrained_cfg_overlay'}
        if weights is not None and 'loading state_dict' in str(error):
            text = f'the weights in {path} do not fit {name} with {own}'
            raise FeatureError(f'{text}; {brief_mismatch(error)}') from error
        raise FeatureError(f'cannot build {name} with {own}: {first_line(error)}') from error
    trained = (getattr(model, 'pretrained_cfg', None) or {}).get('num_classes')
    if not random_init and trained and getattr(model, 'num_classes', 0) not in (0, trained):
        raise FeatureError(f'num_classes={model.num_classes}, but the weights of {name} have {trained} classes')
    kwargs.pop('pretrained_cfg_overlay', None)
    origin = path if weights is not None else 'random' if random_init else 'pretrained'
    build = partial(timm.create_model, name, **kwargs)
    return Backbone.of(model, name=name, weights=origin, build=build, arguments=kwargs)


def _text(value: Any) -> Any:
    """A layer class or function as JSON: its name, without an address that changes from run to run."""
    if isinstance(value, partial):
        return [_text(value.func), *value.args, value.keywords]
    return getattr(value, '__qualname__', type(value).__qualname__)


def _resize(backbone: Backbone, size: tuple[int, int]) -> None:
    """Another input size: position embeddings are resampled where the model has them."""
    model, embed = backbone.model, getattr(backbone.model, 'patch_embed', None)
    patch = getattr(embed, 'patch_size', None)
    if patch is not None and not getattr(embed, 'dynamic_img_pad', False):
        patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
        if any(side % step for side, step in zip(size, patch)):
            raise FeatureError(f'img_size={size} is no multiple of the {patch} patches of {backbone.name}')
    if hasattr(model, 'set_input_size') and tuple(getattr(embed, 'img_size', None) or ()) != size:
        try:
            model.set_input_size(img_size=size)
        except (AssertionError, ValueError, TypeError) as error:
            raise FeatureError(f'{backbone.name} does not take img_size={size}: {first_line(error)}') from error
    backbone.data['input_size'] = (backbone.data['input_size'][0], *size)

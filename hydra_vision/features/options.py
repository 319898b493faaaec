"""Command-line options that every command with a model and images shares."""

import argparse
import ast
from typing import Any

from ..console import image_size, non_empty, non_negative, number_list, positive
from ..device import AMP_NAMES
from .backbone import Backbone, load_backbone

__all__ = [
    'add_image_options',
    'add_model_options',
    'add_run_options',
    'backbone_from',
    'model_arguments',
    'run_arguments',
]


def add_model_options(parser: argparse.ArgumentParser, *, device: bool = True) -> None:
    """Which model, with which weights, at which size; without `device` for commands that work on the CPU alone."""
    group = parser.add_argument_group('model')
    group.add_argument('--model', type=non_empty, metavar='NAME', help='any timm model; hf-hub:... and local-dir:PATH')
    group.add_argument(
        '--checkpoint',
        type=non_empty,
        metavar='PATH',
        help='run folder or checkpoint of hydra-vision train, or a file of weights',
    )
    group.add_argument('--random-init', action='store_true', help='untrained weights')
    group.add_argument(
        '--model-kwargs', nargs='+', type=_key_value, default=[], metavar='KEY=VALUE', help='for timm.create_model'
    )
    group.add_argument('--img-size', type=image_size, metavar='N|HxW', help="input size (default: the model's)")
    if device:
        group.add_argument(
            '--device', type=non_empty, default='auto', help='auto, cpu, cuda, ... (default: %(default)s)'
        )


def add_image_options(parser: argparse.ArgumentParser, *, crop: bool = True) -> None:
    """What becomes of an image before the model sees it; without `crop` for commands that take it whole."""
    group = parser.add_argument_group('preprocessing')
    group.add_argument('--mean', type=number_list, metavar='R,G,B', help="default: the model's")
    group.add_argument('--std', type=number_list, metavar='R,G,B', help="default: the model's")
    if crop:
        group.add_argument(
            '--crop-pct', type=float, metavar='X', help="share of the image that is used (default: the model's)"
        )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """How images run through the model; None where an option is not given."""
    group = parser.add_argument_group('extraction')
    group.add_argument('--batch-size', type=positive, metavar='N', help='default: 64')
    group.add_argument('--workers', type=non_negative, metavar='N', help='loader processes (default: one per core, 16)')
    group.add_argument('--amp', choices=AMP_NAMES, help='autocast (default: auto, bf16 on CUDA)')
    group.add_argument(
        '--max-unreadable', type=non_negative, metavar='N', help='images that may be skipped (default: 10)'
    )


def model_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_model_options` and `add_image_options` as arguments of `extract`."""
    data = {key: getattr(arguments, key, None) for key in ('mean', 'std', 'crop_pct')}
    return {
        'model': arguments.model,
        'checkpoint': arguments.checkpoint,
        'random_init': arguments.random_init,
        'model_kwargs': dict(arguments.model_kwargs),
        'img_size': arguments.img_size,
        'data': {key: value for key, value in data.items() if value is not None},
        'device': getattr(arguments, 'device', 'cpu'),
    }


def run_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_run_options` that were given, as arguments of `extract`."""
    given = {key: getattr(arguments, key) for key in ('batch_size', 'workers', 'amp', 'max_unreadable')}
    return {key: value for key, value in given.items() if value is not None}


def backbone_from(arguments: argparse.Namespace) -> Backbone:
    """The model that the options mean."""
    given = model_arguments(arguments)
    return load_backbone(given.pop('model'), **given)


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition('=')
    if not equals or not key:
        raise argparse.ArgumentTypeError(f'{text!r}: write KEY=VALUE')
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return key, value

"""Command-line options that every command with a model and images shares."""

import argparse
import ast
from typing import Any

from .backbone import Backbone, load_backbone

__all__ = [
    'add_image_options',
    'add_model_options',
    'add_run_options',
    'backbone_from',
    'img_size',
    'integers',
    'numbers',
]


def add_model_options(parser: argparse.ArgumentParser, *, device: bool = True) -> None:
    """Which model, with which weights, at which size; without ``device`` for commands that work on the CPU alone."""
    group = parser.add_argument_group('model')
    group.add_argument('--model', metavar='NAME', help='any timm model; hf-hub:... and local-dir:PATH too')
    group.add_argument(
        '--checkpoint', metavar='PATH', help='run folder or checkpoint of train_imagenet.py, or a file of weights'
    )
    group.add_argument('--random-init', action='store_true', help='untrained weights')
    group.add_argument(
        '--model-kwargs', nargs='+', type=_key_value, default=[], metavar='KEY=VALUE', help='for timm.create_model'
    )
    group.add_argument('--img-size', type=img_size, metavar='N|H,W', help="input size; default: the model's")
    if device:
        group.add_argument('--device', default='auto', help='auto, cpu, cuda, ...')


def add_image_options(parser: argparse.ArgumentParser, *, crop: bool = True) -> None:
    """What becomes of an image before the model sees it; without ``crop`` for commands that take it whole."""
    group = parser.add_argument_group('preprocessing')
    group.add_argument('--mean', type=numbers, metavar='R,G,B', help="default: the model's")
    group.add_argument('--std', type=numbers, metavar='R,G,B', help="default: the model's")
    if crop:
        group.add_argument(
            '--crop-pct', type=float, metavar='X', help="share of the image that is used; default: the model's"
        )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """How images run through the model."""
    group = parser.add_argument_group('extraction')
    group.add_argument('--batch-size', type=int, default=64, metavar='N')
    group.add_argument('--workers', type=int, metavar='N', help='loader processes; default: one a core, at most 16')
    group.add_argument('--amp', default='auto', help='auto (bf16 on CUDA), none, bf16, fp16')
    group.add_argument('--max-unreadable', type=int, default=10, metavar='N', help='images that may be skipped (10)')


def backbone_from(arguments: argparse.Namespace) -> Backbone:
    """The model that the options of ``add_model_options`` and, where the command has them, of images mean."""
    given = {key: getattr(arguments, key, None) for key in ('mean', 'std', 'crop_pct')}
    return load_backbone(
        arguments.model,
        checkpoint=arguments.checkpoint,
        random_init=arguments.random_init,
        model_kwargs=dict(arguments.model_kwargs),
        img_size=arguments.img_size,
        data={key: value for key, value in given.items() if value is not None},
        device=getattr(arguments, 'device', 'cpu'),
    )


def img_size(text: str) -> tuple[int, int]:
    """'224' or '224,320' (H,W); an argparse type."""
    sides = integers(text)
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is no size; write N or H,W')
    return (sides[0], sides[-1])


def integers(text: str) -> tuple[int, ...]:
    """'3,-1' -> (3, -1); an argparse type."""
    try:
        return tuple(int(part) for part in text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r}: write whole numbers with commas between them') from None


def numbers(text: str) -> tuple[float, ...]:
    """'0.1,1' -> (0.1, 1.0); an argparse type."""
    try:
        return tuple(float(part) for part in text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r}: write numbers with commas between them') from None


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition('=')
    if not equals or not key:
        raise argparse.ArgumentTypeError(f'{text!r}: write KEY=VALUE')
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value

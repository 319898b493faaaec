"""The command `hydra-vision show-matrix`: one picture of the mixing matrices of one block on one image."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import timm
import torch
import yaml
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from ..command_line import Parser, UserError, check_model_name
from ..tables import stdout_console
from .matrix import find_mixers, mixing_matrices, plot_block

__all__ = ['main', 'prepare_image']


def main(argv: Optional[Sequence[str]] = None, prog: str = 'hydra-vision show-matrix') -> int:
    """Draw the picture.

    Raises:
        UserError: arguments that do not fit.
    """
    arguments = _parser(prog).parse_args(argv)
    image = _open(arguments.image)
    output = arguments.output or Path(f'{arguments.image.stem}-matrix.png')
    if output.suffix.lower() != '.png':
        raise UserError(f'--output {str(output)!r}: the picture is a .png')
    if not output.parent.is_dir():
        raise UserError(f'--output {str(output)!r}: there is no folder {str(output.parent)!r}')
    model = _create_model(arguments)
    pixels, picture = prepare_image(image, model, arguments.img_size)
    try:
        (block,) = mixing_matrices(model, pixels, blocks=[arguments.block], heads=arguments.head)
        patch = arguments.patch or (block.grid[0] // 2, block.grid[1] // 2)
        block.position(*patch)
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise UserError(str(error)) from error
    figure = plot_block(
        block,
        picture,
        patch,
        heads=arguments.head,
        title=f'{arguments.model}{"" if arguments.checkpoint else " (random weights)"}, {block.name}, '
        f'{arguments.image.name} (colours saturate at the 99.5 % quantile of |M| off the diagonal)',
    )
    try:
        figure.savefig(output, dpi=120)
    except OSError as error:
        raise UserError(f'--output {str(output)!r}: {error.strerror}') from error
    tokens = block.matrix.shape[-1]
    stdout_console().print(
        f'wrote {output}: {block.name} (block {block.block} of {len(find_mixers(model))}), {len(block.matrix)} heads, '
        f'{tokens} tokens on a {block.grid[0]} x {block.grid[1]} grid, patch {patch[0]},{patch[1]}',
        soft_wrap=True,
    )
    return 0


def prepare_image(image: Image.Image, model: nn.Module, img_size: Optional[int] = None) -> tuple[Tensor, Tensor]:
    """An image as a model is validated on it.

    Args:
        image: Any PIL image.
        model: A timm model; its ``pretrained_cfg`` gives mean, standard deviation, crop and interpolation.
        img_size: Side in px; None for the model's own size.

    Returns:
        The normalised input (1, C, height, width), and the same crop in 0..1 as (height, width, 3).
    """
    channels = getattr(model, 'in_chans', 3)
    size = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    config = resolve_data_config({}, model=model)
    side = (img_size, img_size) if img_size else tuple(size or config['input_size'][1:])
    mean, std = (torch.tensor(config[key]).mean().expand(channels) for key in ('mean', 'std'))
    if channels == len(config['mean']):
        mean, std = torch.tensor(config['mean']), torch.tensor(config['std'])
    transform = create_transform(
        (channels, *side),
        is_training=False,
        interpolation=config['interpolation'],
        crop_pct=config['crop_pct'],
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
    )
    pixels = transform(image.convert('L' if channels == 1 else 'RGB'))
    picture = pixels.permute(1, 2, 0).expand(-1, -1, 3).clamp(0, 1)
    return ((pixels - mean[:, None, None]) / std[:, None, None])[None], picture


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f'{str(path)!r} cannot be read as an image: {error}') from error


def _create_model(arguments: argparse.Namespace) -> nn.Module:
    check_model_name(arguments.model)
    kwargs: dict[str, Any] = dict(arguments.model_kwargs)
    if arguments.checkpoint is not None:
        if not arguments.checkpoint.is_file():
            raise UserError(f'--checkpoint {str(arguments.checkpoint)!r} is not a file')
        kwargs['checkpoint_path'] = str(arguments.checkpoint)
    if arguments.img_size is not None:
        kwargs.setdefault('img_size', arguments.img_size)
    try:
        return timm.create_model(arguments.model, **kwargs).eval()
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f'cannot build {arguments.model}: {error}') from error


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description='Draw the mixing matrices of one block on an image, a head a column, and below each where in the '
        'image one patch looks: its row of the matrix on the patch grid.',
    )
    add = parser.add_argument
    add('image', type=Path, metavar='IMAGE', help='an image file')
    add('--model', required=True, metavar='NAME', help='timm model with mixers, for example hydra_vit_tiny')
    add('--model-kwargs', nargs='*', type=_pair, default=[], metavar='KEY=VALUE', help='arguments of the model')
    add('--checkpoint', type=Path, metavar='FILE', help='weights; without it they are random')
    add('--block', type=int, default=-1, metavar='N', help='index of the block, negative from the end; default -1')
    add('--head', type=_heads, metavar='LIST', help='heads to draw, for example 0,3; default: all')
    add('--patch', type=_patch, metavar='ROW,COLUMN', help='patch on the grid; default: the one in the middle')
    add('--img-size', type=int, metavar='PX', help="side of the image; default: the model's own")
    add('--output', type=Path, metavar='FILE.png', help='default: IMAGE-matrix.png here')
    return parser


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition('=')
    if not key or not equals:
        raise argparse.ArgumentTypeError(f'{text!r} is not KEY=VALUE')
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f'cannot read the value of {text!r}') from error


def _heads(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(',')]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of head numbers such as 0,3') from error


def _patch(text: str) -> tuple[int, int]:
    parts = text.split(',')
    try:
        row, column = (int(part) for part in parts)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not ROW,COLUMN such as 7,7') from error
    return row, column

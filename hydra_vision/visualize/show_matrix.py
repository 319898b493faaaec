"""The command `hydra-vision show-matrix`: one picture of the mixing matrices of one block on one image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from timm.models import get_pretrained_cfg, is_model

from ..command_line import Parser, UserError
from ..features import open_images
from ..features.options import add_model_options, backbone_from, integers
from ..tables import stdout_console
from .figures import check_picture, load_pictures, save_figure
from .matrix import find_mixers, mixing_matrices, plot_block

__all__ = ['main']


def main(argv: Optional[Sequence[str]] = None, prog: str = 'hydra-vision show-matrix') -> int:
    """Draw the picture.

    Raises:
        UserError: arguments that do not fit.
    """
    arguments = _parser(prog).parse_args(argv)
    images = open_images(arguments.image)
    if not 0 <= arguments.index < len(images):
        raise UserError(f'--index {arguments.index}: {images.name} has {len(images)} images')
    if arguments.patch is not None and len(arguments.patch) != 2:
        raise UserError(f'--patch {",".join(map(str, arguments.patch))}: write ROW,COLUMN')
    name = Path(images.paths[arguments.index]).stem
    output = check_picture(arguments.output or f'{name}-matrix.png', arguments.overwrite)
    # A mixer's structure is worth a look before any training; the title says that the weights are random.
    arguments.random_init |= arguments.checkpoint is None and _has_no_weights(arguments.model)
    backbone = backbone_from(arguments)
    try:
        pixels, pictures = load_pictures(backbone, images, [arguments.index])
        (block,) = mixing_matrices(backbone.model, pixels, blocks=[arguments.block], heads=arguments.head)
        patch = arguments.patch or (block.grid[0] // 2, block.grid[1] // 2)
        block.position(*patch)
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    random = ' (random weights)' if backbone.weights == 'random' else ''
    title = (
        f'{backbone.name}{random}, {block.name}, {name} '
        '(colours saturate at the 99.5 % quantile of |M| off the diagonal)'
    )
    figure = plot_block(block, pictures[0], tuple(patch), heads=arguments.head, title=title)
    save_figure(figure, output, dpi=120)
    stdout_console().print(
        f'wrote {output}: {block.name}{random} (block {block.block} of {len(find_mixers(backbone.model))}), '
        f'{len(block.matrix)} heads, {block.matrix.shape[-1]} tokens on a {block.grid[0]} x {block.grid[1]} grid, '
        f'patch {patch[0]},{patch[1]}',
        soft_wrap=True,
    )
    return 0


def _has_no_weights(model: Optional[str]) -> bool:
    return model is not None and ':' not in model and is_model(model) and not get_pretrained_cfg(model).has_weights


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description='Draw the mixing matrices of one block on an image, a head a column, and below each where in the '
        'image one patch looks: its row of the matrix on the patch grid.',
        epilog='A model that has no published weights is drawn with random ones, and the picture says so.',
    )
    add = parser.add_argument
    add('image', metavar='IMAGE', help='an image file, or a folder, .tar or .txt list of them (with --index)')
    add('--index', type=int, default=0, metavar='I', help='which image of several; default 0')
    add('--block', type=int, default=-1, metavar='N', help='index of the block, negative from the end; default -1')
    add('--head', type=integers, metavar='I,J', help='heads to draw; default: all')
    add('--patch', type=integers, metavar='ROW,COLUMN', help='patch on the grid; default: the one in the middle')
    add('--output', type=Path, metavar='FILE.png', help='default: IMAGE-matrix.png here')
    add('--overwrite', action='store_true', help='replace the picture')
    add_model_options(parser)
    return parser

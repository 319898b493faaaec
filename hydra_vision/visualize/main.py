"""The command `hydra-vision visualize`: one kind of picture, or all of them as a gallery."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..console import integer_list, make_table, non_empty, path, stdout_console
from ..errors import FeatureError, UserError, first_line, nearest, require
from ..features import Backbone, Images, image_features, open_images
from ..features.options import add_image_options, add_model_options, backbone_from
from ..features.pooling import check_layers
from ..io import check_output
from .features import plot_pca, plot_similarity
from .figures import caption, load_pictures, save_figure
from .gradcam import grad_cam, plot_grad_cam
from .matrix import mixing_matrices, plot_block
from .receptive_field import effective_receptive_field, plot_receptive_fields

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['KINDS', 'add_arguments', 'main']

_DPI = (10, 1200)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    kinds = '; '.join(f'{name} = {text}' for name, (_, text, _) in KINDS.items())
    add = parser.add_argument
    add('kind', metavar='KIND', help=kinds)
    add('images', type=non_empty, help='folder, .tar, .txt list, an image, sklearn/digits/test or sklearn/photos')
    add('--output', type=path, metavar='PATH', help='default: KIND.png; for gallery a folder, which must exist')
    add('--overwrite', action='store_true', help='replace pictures')
    add('--index', type=integer_list, metavar='I,J', help='which images of them (default: the first four; matrix: one)')
    add('--layer', type=int, metavar='N', help='negative from the end (default: final features; matrix: last block)')
    add('--patch', type=integer_list, metavar='ROW,COLUMN', help='similarity, matrix (default: the middle one)')
    add('--target', metavar='CLASS', help='gradcam: name or number (default: the predicted class)')
    add('--heads', type=integer_list, metavar='I,J', help='matrix (default: all)')
    add('--dpi', type=int, default=80, metavar='N', help=f'{_DPI[0]} to {_DPI[1]} (default: %(default)s)')
    add_model_options(parser)
    add_image_options(parser, crop=False)  # pictures show whole images


def main(arguments: argparse.Namespace) -> int:
    """Draw pictures of the kind that the first argument names."""
    _check_options(arguments)
    kinds = [kind for kind in KINDS if kind != 'gallery'] if arguments.kind == 'gallery' else [arguments.kind]
    paths = _outputs(arguments, kinds)
    if 'gradcam' in kinds:
        require('pytorch_grad_cam', 'explain')
    images = open_images(arguments.images)
    many = 1 if arguments.kind == 'matrix' else 4
    arguments.index = arguments.index or tuple(range(min(many, len(images))))
    backbone = backbone_from(arguments)
    drawn, rows = {}, []
    for kind in kinds:
        start = time.perf_counter()
        try:
            drawn[kind] = KINDS[kind][0](backbone, images, arguments)
        except UserError:
            raise
        except (ValueError, AssertionError, NotImplementedError) as error:
            raise UserError(first_line(error)) from error
        save_figure(drawn[kind], paths[kind], arguments.dpi)
        rows.append(
            [str(paths[kind]), f'{time.perf_counter() - start:.1f}', f'{paths[kind].stat().st_size / 1024:.0f}']
        )
    stdout_console().print(make_table(_title(backbone), ['picture', 'seconds', 'KiB'], rows, right=(1, 2)))
    return 0


def _pca(backbone: Backbone, images: Images, arguments: argparse.Namespace) -> 'Figure':
    x, pictures = load_pictures(backbone, images, arguments.index)
    return plot_pca(
        pictures, _maps(backbone, x, arguments), _captions(images, arguments), _title(backbone, arguments.layer)
    )


def _similarity(backbone: Backbone, images: Images, arguments: argparse.Namespace) -> 'Figure':
    x, pictures = load_pictures(backbone, images, arguments.index)
    maps = _maps(backbone, x, arguments)
    patch = _patch(arguments, maps.shape[2:])
    return plot_similarity(pictures, maps, patch, _captions(images, arguments), _title(backbone, arguments.layer))


def _receptive_field(backbone: Backbone, images: Images, arguments: argparse.Namespace) -> 'Figure':
    x, _ = load_pictures(backbone, images, arguments.index)
    layers = None if arguments.layer is None else [arguments.layer]
    fields = [(f'weights {backbone.weights}', effective_receptive_field(backbone.model, x, layers=layers))]
    if backbone.weights != 'random':
        before = effective_receptive_field(backbone.untrained().model, x, layers=layers)
        fields = [('before training', before), ('after training', fields[0][1])]
    what = f'effective receptive field of the middle patch, mean of {len(x)} images'
    grid = tuple(_maps(backbone, x[:1], arguments).shape[2:])
    return plot_receptive_fields(fields, f'{_title(backbone, arguments.layer)}\n{what}', grid)


def _gradcam(backbone: Backbone, images: Images, arguments: argparse.Namespace) -> 'Figure':
    x, pictures = load_pictures(backbone, images, arguments.index)
    classes = None if arguments.target is None else [_class(backbone, arguments.target)] * len(x)
    maps, classes = grad_cam(backbone.model, x, classes=classes, block=arguments.layer)
    names = [str(int(c)) if backbone.classes is None else backbone.classes[int(c)] for c in classes]
    title = f'{_title(backbone, arguments.layer)}\nGrad-CAM'
    return plot_grad_cam(pictures, maps, names, _captions(images, arguments), title)


def _matrix(backbone: Backbone, images: Images, arguments: argparse.Namespace) -> 'Figure':
    x, pictures = load_pictures(backbone, images, arguments.index[:1])
    block = -1 if arguments.layer is None else arguments.layer
    (matrices,) = mixing_matrices(backbone.model, x, blocks=[block], heads=arguments.heads)
    patch = _patch(arguments, matrices.grid)
    title = f'{_title(backbone)}: {matrices.name} on {caption(images, arguments.index[0])}'
    return plot_block(matrices, pictures[0], patch, heads=arguments.heads, title=title)


KINDS: dict[str, tuple[Callable[..., 'Figure'] | None, str, tuple[str, ...]]] = {
    'pca': (_pca, 'principal components of patch features as colours, all images on one basis', ('layer',)),
    'similarity': (_similarity, 'similarity of all patches to one', ('layer', 'patch')),
    'receptive-field': (_receptive_field, 'effective receptive field, before and after training', ('layer',)),
    'gradcam': (_gradcam, 'which patches speak for a class', ('layer', 'target')),
    'matrix': (_matrix, "mixing matrices of a block's heads, one patch's row on the grid", ('layer', 'patch', 'heads')),
    'gallery': (None, 'all of them, into a folder', ('patch',)),
}


_OPTIONS = ('layer', 'patch', 'target', 'heads')  # that not every kind takes


def _check_options(arguments: argparse.Namespace) -> None:
    if arguments.kind not in KINDS:
        raise UserError(f'kind {arguments.kind!r}{nearest(arguments.kind, KINDS)}; allowed: {", ".join(KINDS)}')
    for option in _OPTIONS:
        if getattr(arguments, option) is not None and option not in KINDS[arguments.kind][2]:
            kinds = [kind for kind, (_, _, options) in KINDS.items() if option in options]
            raise UserError(f'--{option} is for {", ".join(kinds)}')
    if arguments.patch is not None and len(arguments.patch) != 2:
        raise UserError(f'--patch {arguments.patch}: write ROW,COLUMN')
    if arguments.kind == 'matrix' and len(arguments.index or ()) > 1:
        raise UserError(f'--index {",".join(map(str, arguments.index))}: matrix draws one image')
    if not _DPI[0] <= arguments.dpi <= _DPI[1]:
        raise UserError(f'--dpi {arguments.dpi}; allowed: {_DPI[0]} to {_DPI[1]}')


def _outputs(arguments: argparse.Namespace, kinds: Sequence[str]) -> dict[str, Path]:
    if arguments.kind == 'gallery':
        folder = arguments.output or Path('.')
        if not folder.is_dir():
            raise UserError(f'--output {str(folder)!r} is no folder; a gallery needs one that exists')
        files = {kind: folder / f'{kind}.png' for kind in kinds}
    else:
        files = {kind: arguments.output or Path(f'{kind}.png') for kind in kinds}
    return {kind: check_output(file, ('.png',), overwrite=arguments.overwrite) for kind, file in files.items()}


@torch.inference_mode()
def _maps(backbone: Backbone, x: torch.Tensor, arguments: argparse.Namespace) -> torch.Tensor:
    layers = check_layers(backbone.model, None if arguments.layer is None else [arguments.layer])
    return image_features(backbone.model, x, pool='none', layers=layers).float().cpu()


def _captions(images: Images, arguments: argparse.Namespace) -> list[str]:
    return [caption(images, index) for index in arguments.index]


def _patch(arguments: argparse.Namespace, grid: Sequence[int]) -> tuple[int, int]:
    return (grid[0] // 2, grid[1] // 2) if arguments.patch is None else tuple(arguments.patch)


def _class(backbone: Backbone, target: str) -> int:
    if backbone.classes is not None and target in backbone.classes:
        return backbone.classes.index(target)
    if not target.isdecimal():
        known = f'{nearest(target, backbone.classes)}' if backbone.classes else '; the model has no class names'
        raise FeatureError(f'target={target!r} is no class of {backbone.name}{known}')
    return int(target)


def _title(backbone: Backbone, layer: int | None = None) -> str:
    name = Path(backbone.name.partition(':')[2]).name or backbone.name
    weights = ', random weights' if backbone.weights == 'random' else ''
    return f'{name}{weights}' + ('' if layer is None else f', layer {layer}')

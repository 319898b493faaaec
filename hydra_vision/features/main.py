"""The command `hydra-vision extract`."""

import argparse

from ..console import integer_list, make_table, non_empty, path, progress, stdout_console
from .extraction import extract
from .files import card_path, log_path
from .options import add_image_options, add_model_options, add_run_options, model_arguments, run_arguments
from .pooling import POOLS

__all__ = ['add_arguments', 'main']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument('images', type=non_empty, help='folder, .tar, .txt list (path, tab, class), sklearn/digits/...')
    parser.add_argument('--output', type=path, required=True, metavar='FILE', help='.npy, .safetensors or .parquet')
    parser.add_argument('--overwrite', action='store_true', help='replace features that were made in another way')
    pools = '; '.join(f'{name} = {text}' for name, text in POOLS.items())
    parser.add_argument('--pool', default='avg', help=f'{pools} (default: %(default)s)')
    parser.add_argument(
        '--layers',
        type=integer_list,
        metavar='I,J',
        help='layers, joined along the features, as --layers=-2,-1 (default: the final features)',
    )
    parser.add_argument('--dtype', default='float32', help='float32 or float16 (default: %(default)s)')
    add_model_options(parser)
    add_image_options(parser)
    add_run_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Extract features into a file."""
    with progress(f'{arguments.model or arguments.checkpoint} features') as meter:
        features = extract(
            arguments.images,
            arguments.output,
            pool=arguments.pool,
            layers=arguments.layers,
            dtype=arguments.dtype,
            overwrite=arguments.overwrite,
            on_progress=meter,
            **model_arguments(arguments),
            **run_arguments(arguments),
        )
    file, card = features.path, features.card
    rows = [
        ['features', f'{file} ({file.stat().st_size / 1e6:.1f} MB)'],
        ['rows', ' x '.join(map(str, features.shape)) + f' {card["dtype"]}'],
        ['images', f'{card["count"]} of {card["images"]}'],
        ['skipped', f'{len(features.skipped)} unreadable'],
        ['lines, metadata', f'{log_path(file).name}, {card_path(file).name}'],
        ['speed', meter.speed()],
    ]
    console = stdout_console()
    console.print(make_table(f'{card["model"]}, weights {card["weights"]}', ['', ''], rows))
    for image, error in list(features.skipped.items())[:20]:
        console.print(f'skipped {image}: {error}', soft_wrap=True)
    return 0

"""The command `hydra-vision extract`."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Optional

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..console import Parser, make_table, stdout_console
from .extraction import check_target, extract
from .files import card_path, log_path
from .options import add_image_options, add_model_options, add_run_options, backbone_from, integers
from .pooling import POOLS
from .sources import open_images

__all__ = ['main', 'show_progress']

_LINE_SECONDS = 30.0


def main(argv: Optional[Sequence[str]] = None, prog: str = 'hydra-vision extract') -> int:
    """Extract features into a file.

    Returns:
        Exit code 0.

    Raises:
        UserError: Arguments that do not fit, too many unreadable images.
    """
    parser = Parser(
        prog=prog,
        description='Write the features of images to a file. Run it again to continue after an interruption.',
        epilog=f'--pool: {"; ".join(f"{name} = {text}" for name, text in POOLS.items())}',
    )
    parser.add_argument('images', help='folder, .tar, .txt list of paths (tab, class), or sklearn/digits/train')
    parser.add_argument('out', help='file.npy, file.safetensors or file.parquet')
    parser.add_argument('--pool', default='avg', help=f'{", ".join(POOLS)} (see below); default avg')
    parser.add_argument(
        '--layers',
        type=integers,
        metavar='I,J',
        help='layers, joined along the features, as --layers=-2,-1; default: the final features',
    )
    parser.add_argument('--dtype', default='float32', help='float32 or float16')
    parser.add_argument('--overwrite', action='store_true', help='replace features that were made in another way')
    add_model_options(parser)
    add_image_options(parser)
    add_run_options(parser)
    arguments = parser.parse_args(argv)
    check_target(arguments.out)
    source = open_images(arguments.images)
    backbone = backbone_from(arguments)
    with show_progress(f'{backbone.name} features') as on_progress:
        features = extract(
            source,
            arguments.out,
            model=backbone,
            pool=arguments.pool,
            layers=arguments.layers,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            device=arguments.device,
            amp=arguments.amp,
            dtype=arguments.dtype,
            max_unreadable=arguments.max_unreadable,
            overwrite=arguments.overwrite,
            on_progress=on_progress,
        )
    path = features.path
    rows = [
        ['features', f'{path} ({path.stat().st_size / 1e6:.1f} MB)'],
        ['rows', ' x '.join(map(str, features.shape)) + f' {features.card["dtype"]}'],
        ['images', f'{features.card["count"]} of {features.card["images"]}'],
        ['skipped', f'{len(features.skipped)} unreadable'],
        ['lines, card', f'{log_path(path).name}, {card_path(path).name}'],
        ['speed', on_progress.speed()],
    ]
    console = stdout_console()
    console.print(make_table(f'{backbone.name}, weights {backbone.weights}', ['', ''], rows))
    for image, error in list(features.skipped.items())[:20]:
        console.print(f'skipped {image}: {error}', soft_wrap=True)
    return 0


class _Meter:
    """A progress bar on stderr (a line now and then where that is no terminal), with images/s of this session."""

    def __init__(self, progress: Progress, text: str) -> None:
        self.progress, self.text = progress, text
        self.task = progress.add_task(text, total=None, speed='')
        self.first: Optional[tuple[int, float]] = None  # images of an earlier session do not count
        self.last: tuple[int, float] = (0, 0.0)
        self.printed = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        self.last = (done, time.perf_counter())
        self.first = self.first or self.last
        self.progress.update(self.task, completed=done, total=total, speed=self.speed())
        if self.progress.disable and self.last[1] - self.printed > _LINE_SECONDS:
            self.printed = self.last[1]
            print(f'{self.text}: {done}/{total}, {self.speed()}', file=sys.stderr, flush=True)

    def speed(self) -> str:
        """Images a second, loading included."""
        images = self.last[0] - self.first[0] if self.first else 0
        seconds = self.last[1] - self.first[1] if self.first else 0.0
        return f'{images / seconds:.0f} images/s' if images and seconds else 'nothing was left to do'


@contextmanager
def show_progress(text: str) -> Iterator[_Meter]:
    """Progress for ``extract(on_progress=...)``."""
    columns = [
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('{task.fields[speed]}'),
        TimeRemainingColumn(),
    ]
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Meter(progress, text)

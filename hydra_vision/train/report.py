"""What a run shows and leaves behind: one line per epoch, a progress bar, summary.csv, curve.png, tables, run.json."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..console import make_table
from ..environment import device_name, versions
from ..io import write_atomically, write_csv, write_text
from .distributed import World

Row = dict[str, Any]
RUN = 'run.json'
COLUMNS = (
    *('epoch', 'updates', 'lr', 'train_loss', 'val_loss', 'val_top1', 'val_top5'),
    *('ema_loss', 'ema_top1', 'ema_top5', 'images_per_second', 'seconds'),
    *('data_wait', 'mfu', 'peak_memory_gib'),
)
RESULT_HEADER = ['weights', 'top-1 %', 'top-5 %', 'loss', 'images']


# Files


def write_summary(folder: Path, history: Sequence[Row]) -> None:
    """Write summary.csv anew from the whole history, so that a resumed run neither repeats nor loses a row."""
    rows = [{key: f'{v:.6g}' if isinstance(v, float) else v for key, v in row.items()} for row in history]
    write_csv(folder / 'summary.csv', rows, COLUMNS)


def write_curve(folder: Path, history: Sequence[Row], title: str) -> None:
    """Draw curve.png: loss on the left, accuracy on the right, over epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.2), dpi=120, layout='constrained')
    losses, scores = figure.subplots(1, 2)
    series = (
        (losses, 'train_loss', 'training (augmented)', 'tab:blue', '-'),
        (losses, 'val_loss', 'validation', 'tab:orange', '-'),
        (losses, 'ema_loss', 'validation, EMA', 'tab:green', '--'),
        (scores, 'val_top1', 'top-1', 'tab:orange', '-'),
        (scores, 'ema_top1', 'top-1, EMA', 'tab:green', '--'),
        (scores, 'val_top5', 'top-5', 'tab:gray', ':'),
    )
    for axes, key, label, color, style in series:
        points = [(row['epoch'], row[key]) for row in history if row.get(key) is not None]
        if points:
            marker = 'o' if len(points) < 3 else None
            axes.plot(*zip(*points, strict=True), style, color=color, label=label, marker=marker)
    best = max((row['val_top1'] for row in history if row.get('val_top1') is not None), default=None)
    losses.set(title='Loss', xlabel='epoch', ylabel='cross-entropy')
    best_text = '' if best is None else f' (best top-1 {best:.2f} %)'
    scores.set(title=f'Validation accuracy{best_text}', xlabel='epoch', ylabel='accuracy (%)')
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.legend()
    figure.suptitle(title)
    write_atomically(folder / 'curve.png', lambda file: FigureCanvasAgg(figure).print_png(file))


def write_run(folder: Path, facts: dict[str, Any], device: torch.device) -> None:
    """Write run.json: command, git commit, versions, device and what is given.

    A resumed run gets one more entry in `sessions`; earlier ones are kept.

    Args:
        folder: Of the run.
        facts: Of the model and the data, plain JSON values.
        device: Where it is trained.
    """
    path = folder / RUN
    sessions = []
    if path.is_file():
        try:
            sessions = json.loads(path.read_text())['sessions']
        except (ValueError, KeyError, TypeError, OSError):  # damaged: the run matters more than its history
            sessions = []
    session = {
        'started': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
        'command': shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        'git_commit': git_commit(),
        'versions': versions(),
        'device': device_name(device),
    }
    write_text(path, json.dumps({**facts, 'sessions': [*sessions, session]}, indent=2) + '\n')


def git_commit() -> str | None:
    """Commit of the checkout that this package was imported from, with '+changes' where files differ from it.

    None where the package is installed without its repository.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / '.git').exists():
        return None
    try:
        commit = _git(root, 'rev-parse', 'HEAD')
        changes = _git(root, 'status', '--porcelain', '--untracked-files=no')
    except (OSError, subprocess.SubprocessError):  # no git, or a repository of somebody else
        return None
    return commit + ('+changes' if changes else '')


def _git(root: Path, *arguments: str) -> str:
    command = ['git', '-C', str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


# Text


def speed_line(history: Sequence[Row]) -> str:
    """What limited a run: images per second, share of the time spent waiting for data, MFU, memory."""
    seconds = sum(row['seconds'] for row in history)
    images = sum(row['seconds'] * row['images_per_second'] for row in history)
    waited = sum(row['seconds'] * row.get('data_wait', 0.0) for row in history) / max(seconds, 1e-9)
    mfu = [row['mfu'] for row in history if row.get('mfu') is not None]
    memory = [row['peak_memory_gib'] for row in history if row.get('peak_memory_gib') is not None]
    limit = 'the loader keeps up' if waited < 0.1 else 'a faster loader would save up to that'
    limit = 'the loader is the limit' if waited > 0.5 else limit
    parts = [f'training {duration(seconds)}', f'{images / max(seconds, 1e-9):.0f} img/s']
    parts += [f'waiting for data {100 * waited:.0f} % of it ({limit})']
    parts += [f'MFU {100 * sum(mfu) / len(mfu):.1f} %'] if mfu else []
    parts += [f'peak memory {max(memory):.2f} GiB'] if memory else []
    return ', '.join(parts)


def report_unreadable(console: Console, loader: Any, world: World) -> None:
    """Print the images that the loaders of all processes skipped; a collective call."""
    if hasattr(loader.dataset, 'add_up'):
        loader.dataset.add_up(world.sum)
    if getattr(loader.dataset, 'unreadable', list)():
        console.print(f'warning: skipped {loader.dataset.report()}', highlight=False, soft_wrap=True)


def result_rows(results: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Rows of the result table: weights, top-1, top-5, loss, images."""
    return [
        [name, f'{r["top1"]:.2f}', f'{r["top5"]:.2f}', f'{r["loss"]:.4f}', f'{r["images"]:,}']
        for name, r in results.items()
    ]


def print_table(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, the first column left-aligned, the others right-aligned."""
    console.print(title, soft_wrap=True)
    console.print(make_table('', header, rows, right=range(1, len(header))))


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    seconds = round(seconds)
    return f'{seconds // 3600}:{seconds % 3600 // 60:02}:{seconds % 60:02}'


# Progress


class RunProgress:
    """Progress of a run: a live bar on a terminal, only one line per epoch elsewhere (files, CI).

    Args:
        console: Where it is shown.
        epochs: Epochs of the whole run.
        batches: Batches per epoch.
        done: Epochs that were trained before this process.
    """

    def __init__(self, console: Console, epochs: int, batches: int, done: float):
        self.console = console
        self.epochs = epochs
        self.batches = batches
        self.done = done
        self.started = time.monotonic()
        self.bar = Progress(
            TextColumn('{task.description}'),
            BarColumn(),
            TextColumn('{task.fields[text]}'),
            console=console,
            transient=True,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )

    @contextmanager
    def start_pass(self, epoch: int, what: str, total: int) -> Iterator['PassProgress']:
        """One pass over a loader."""
        task = self.bar.add_task(f'epoch {epoch + 1}/{self.epochs} {what}', total=total, text='')
        try:
            yield PassProgress(self, task, total, epoch if what == 'train' else None)
        finally:
            self.bar.remove_task(task)

    def eta(self, position: float) -> float:
        """Seconds left in the run at `position` epochs, from the speed of this process."""
        past = position - self.done
        return (time.monotonic() - self.started) / past * (self.epochs - position) if past > 0 else float('nan')

    def print_epoch(self, row: Row) -> None:
        """Print the line of an epoch."""
        parts = [f'epoch {row["epoch"]:>3}/{self.epochs}', f'loss {row["train_loss"]:.4f}']
        if row.get('val_top1') is not None:
            parts.append(f'val loss {row["val_loss"]:.4f}  top-1 {row["val_top1"]:.2f}  top-5 {row["val_top5"]:.2f}')
        if row.get('ema_top1') is not None:
            parts.append(f'EMA top-1 {row["ema_top1"]:.2f}')
        parts += [f'lr {row["lr"]:.2e}', f'{row["images_per_second"]:.0f} img/s']
        parts += [f'wait {100 * row["data_wait"]:.0f} %']
        parts += [f'MFU {100 * row["mfu"]:.1f} %'] if row['mfu'] is not None else []
        left = self.eta(row['epoch'])
        parts += [f'ETA {duration(left)}'] if row['epoch'] < self.epochs and left == left else []  # unknown: NaN
        self.console.print('  '.join(parts), highlight=False, soft_wrap=True)


class PassProgress:
    """Progress of one pass over a loader."""

    def __init__(self, run: RunProgress, task: Any, total: int, epoch: int | None):
        self.run = run
        self.task = task
        self.total = total
        self.epoch = epoch
        self.images = 0
        self.batches = 0
        self.waited = 0.0  # seconds
        self.started = time.monotonic()

    def resume(self, batches: int, images: int, seconds: float, waited: float) -> None:
        """Add what an earlier process did of this pass."""
        self.batches, self.images, self.waited = batches, images, waited
        self.started -= seconds
        if not self.run.bar.disable:
            self.run.bar.update(self.task, completed=batches)

    def read(self, loader: Iterable) -> Iterator[Any]:
        """The batches of a loader; counts the time that the loop spends waiting for them."""
        iterator = iter(loader)
        while True:
            before = time.monotonic()
            batch = next(iterator, None)
            self.waited += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def waiting(self) -> float:
        """Share of the time since the pass began that was spent waiting for data, 0..1."""
        return self.waited / max(self.seconds(), 1e-9)

    def advance(self, images: int, loss: float | None = None) -> None:
        """Count a batch."""
        self.images += images
        self.batches += 1
        if self.run.bar.disable:
            return
        parts = [f'{self.batches}/{self.total}', f'{self.rate():.0f} img/s']
        if loss is not None:
            parts.append(f'loss {loss:.4f}')
        if self.epoch is not None:
            left = self.run.eta(self.epoch + self.batches / self.run.batches)
            parts.append(f'ETA {duration(left)}' if left == left else '')
        self.run.bar.update(self.task, advance=1, text='  '.join(parts))

    def seconds(self) -> float:
        """Seconds since the pass began."""
        return time.monotonic() - self.started

    def rate(self) -> float:
        """Images per second since the pass began."""
        return self.images / max(self.seconds(), 1e-9)

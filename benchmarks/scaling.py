"""Training on one and on several GPUs: `python -m benchmarks.scaling speed|curve`.

`speed` trains on synthetic images with the same batch per GPU and gives the efficiency: images/s of N GPUs over N times
those of one. `curve` trains with the same batch over all GPUs and the same seed, and gives the losses side by side.
Each number of GPUs is a run of the trainer of its own, started by torchrun. What follows `--` goes to the trainer.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import hydra_vision.bench as bench
from hydra_vision.console import Parser, check_model_name, path, positive, stdout_console
from hydra_vision.environment import device_name, versions
from hydra_vision.errors import UserError
from hydra_vision.io import make_output, read_csv, write_csv, write_text

from . import run

Rows = list[dict[str, float]]


def train(processes: int, arguments: Sequence[str], folder: Path) -> Path:
    """Run the trainer with torchrun.

    Args:
        processes: How many, on this machine.
        arguments: Of the trainer.
        folder: New run folder.

    Returns:
        The run folder.

    Raises:
        SystemExit: The run failed; its last output is printed.
    """
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}']
    command += ['-m', 'hydra_vision.train', *arguments, '--output', str(folder)]
    print(f'{processes} process(es): hydra-vision train {shlex.join(arguments)}', flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f'the run on {processes} process(es) failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}')
    return folder


def read_rows(file: Path) -> Rows:
    """Rows of a CSV file of numbers, empty cells left out."""
    return [{key: float(value) for key, value in row.items() if value} for row in read_csv(file)]


def speed_rows(rates: dict[int, list[float]]) -> Rows:
    """Images/s and efficiency by number of processes.

    Args:
        rates: Processes -> images/s of the epochs that count.
    """
    first = min(rates)
    base = statistics.median(rates[first]) / first
    return [
        {
            'processes': count,
            'images_per_second': round(statistics.median(values), 1),
            'slowest_epoch': round(min(values), 1),
            'fastest_epoch': round(max(values), 1),
            'efficiency': round(statistics.median(values) / (count * base), 4),
        }
        for count, values in sorted(rates.items())
    ]


def curve_rows(curves: dict[int, Rows]) -> Rows:
    """Losses by optimizer step for every number of processes, and the largest difference to the first.

    Args:
        curves: Processes -> rows of steps.csv.
    """
    first = min(curves)
    found = []
    for number, row in enumerate(curves[first]):
        losses = {f'loss_{count}': rows[number]['loss'] for count, rows in sorted(curves.items())}
        others = [abs(loss - row['loss']) for loss in losses.values()]
        found.append({'updates': int(row['updates']), **losses, 'difference': round(max(others), 6)})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index('--') if '--' in argv else len(argv)
    arguments, rest = _parser().parse_args(argv[:split]), argv[split + 1 :]
    if min(arguments.processes) < 1 or len(set(arguments.processes)) < 2:
        raise UserError(f'--processes {arguments.processes}: two different numbers >= 1 are compared')
    if arguments.epochs < 2:
        raise UserError('--epochs: the first one warms up, so at least 2')
    check_model_name(arguments.model)
    file = make_output(arguments.output) / f'{arguments.what}.csv'
    if file.exists() and not arguments.overwrite:
        raise UserError(f'--output {str(arguments.output)!r} holds {file.name} of another run; --overwrite replaces it')
    console = stdout_console()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {count: Path(scratch) / str(count) for count in sorted(arguments.processes)}
        for count, folder in folders.items():
            options = _speed_arguments(arguments, count) if arguments.what == 'speed' else ['--set', 'log.every=1']
            train(count, [*options, *rest], folder)
        if arguments.what == 'speed':
            summaries = {count: read_rows(folder / 'summary.csv')[1:] for count, folder in folders.items()}
            rows = speed_rows({n: [row['images_per_second'] for row in epochs] for n, epochs in summaries.items()})
            title = f'{arguments.model}, {arguments.img_size} px, {arguments.batch_size} per GPU'
        else:
            rows = curve_rows({count: read_rows(folder / 'steps.csv') for count, folder in folders.items()})
            title = 'training loss, the same batch over all GPUs'
            largest = max(row['difference'] for row in rows)
            console.print(f'largest difference of the loss of an optimizer step: {largest:g}')
    write_csv(file, rows)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    command = shlex.join(['python', '-m', 'benchmarks.scaling', *argv])
    facts = {'command': command, 'device': device_name(device), 'versions': versions()}
    write_text(file.with_suffix('.json'), json.dumps(facts, indent=2) + '\n')
    shown = rows if arguments.what == 'speed' else rows[:: max(1, len(rows) // 20)]
    console.print(bench.result_table(title, shown, {name: name for name in rows[0]}))
    console.print(f'{arguments.output}: {file.name}, {file.stem}.json')
    return 0


def _speed_arguments(arguments: argparse.Namespace, count: int) -> list[str]:
    """Synthetic images, nothing but training: one tiny validation at the end, no averaging, no checkpoints inside."""
    batch = arguments.batch_size * count
    fields = {
        'data.name': 'synthetic',
        'data.train_samples': batch * arguments.steps,
        'data.val_samples': 8 * count,
        'data.val_batch_size': 8,
        'log.every': 0,
        'run.validate_every': arguments.epochs,
        'schedule.warmup_epochs': 0,
    }
    options = [text for key, value in fields.items() for text in ('--set', f'{key}={value}')]
    model = ['--model', arguments.model, '--num-classes', '1000', '--img-size', str(arguments.img_size)]
    schedule = ['--batch-size', str(batch), '--epochs', str(arguments.epochs), '--accum-steps', '1']
    return [*model, *schedule, '--config', 'hydra_vit_base_imagenet1k', *options]


def _parser() -> Parser:
    parser = Parser(
        prog='python -m benchmarks.scaling',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        example='python -m benchmarks.scaling speed --processes 1 2 --output output/scaling -- --compile true',
    )
    add = parser.add_argument
    add('what', choices=('speed', 'curve'))
    add('--processes', type=int, nargs='+', default=[1, 2], metavar='N', help='numbers of GPUs; default 1 2')
    add('--model', default='hydra_vit_base', metavar='NAME', help='speed: what is trained; default hydra_vit_base')
    add('--img-size', type=positive, default=224, metavar='N', help='speed: in px; default 224')
    add('--batch-size', type=positive, default=128, metavar='N', help='speed: images per step and GPU; default 128')
    add('--steps', type=positive, default=50, metavar='N', help='speed: steps per epoch; default 50')
    add('--epochs', type=positive, default=3, metavar='N', help='speed: the first one is not counted; default 3')
    add('--output', type=path, required=True, metavar='FOLDER', help='for the tables')
    add('--overwrite', action='store_true', help='replace the table of another run')
    return parser


if __name__ == '__main__':
    run(main, 'scaling')

"""Training on one and on several GPUs: `python -m hydra_vision.bench.scaling speed|curve`.

`speed` trains on synthetic images with the same batch a GPU and gives the efficiency: images a second of N GPUs over N
times those of one. `curve` trains with the same batch over all GPUs and the same seed, and gives the losses side by
side. Each number of GPUs is a run of the trainer of its own, started by torchrun.
"""

import argparse
import csv
import io
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ..console import make_table, stdout_console
from ..environment import device_name, versions
from ..io import write_text

Rows = list[dict[str, float]]


def train(processes: int, arguments: Sequence[str], folder: Path) -> Path:
    """Runs the trainer with torchrun.

    Args:
        processes: how many, on this machine.
        arguments: of the trainer.
        folder: new run folder.

    Returns:
        The run folder.

    Raises:
        SystemExit: the run failed; its last words are printed.
    """
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}']
    command += ['-m', 'hydra_vision.train', *arguments, '--output', str(folder)]
    print(f'{processes} process(es): hydra-vision train {" ".join(arguments)}', flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f'the run on {processes} process(es) failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}')
    return folder


def read_rows(path: Path) -> Rows:
    """Rows of a CSV file, empty cells left out."""
    with open(path, newline='', encoding='utf-8') as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def speed_rows(rates: dict[int, list[float]]) -> list[dict[str, float]]:
    """Images a second and efficiency by number of processes.

    Args:
        rates: processes -> images a second of the epochs that count.
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


def curve_rows(curves: dict[int, Rows]) -> list[dict[str, float]]:
    """Losses by update for every number of processes, and the largest difference to the first.

    Args:
        curves: processes -> rows of steps.csv.
    """
    first = min(curves)
    found = []
    for number, row in enumerate(curves[first]):
        losses = {f'loss_{count}': rows[number]['loss'] for count, rows in sorted(curves.items())}
        others = [abs(loss - row['loss']) for loss in losses.values()]
        found.append({'updates': int(row['updates']), **losses, 'difference': round(max(others), 6)})
    return found


def write_csv(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Writes rows of the same columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def show(title: str, rows: Sequence[dict[str, float]]) -> None:
    """Prints rows as a table."""
    columns = list(rows[0])
    cells = [[f'{row[column]:g}' for column in columns] for row in rows]
    stdout_console().print(make_table(title, columns, cells, right=range(len(columns))))


def environment() -> str:
    """What the numbers were measured with, as JSON."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    command = shlex.join(['python', '-m', 'hydra_vision.bench.scaling', *sys.argv[1:]])
    found = {name: str(text) for name, text in versions().items()}
    facts = {'command': command, 'device': device_name(device), 'versions': found}
    return json.dumps(facts, indent=2) + '\n'


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog='python -m hydra_vision.bench.scaling',
        description=__doc__,
        epilog='What stands behind -- goes to the trainer.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('what', choices=('speed', 'curve'))
    parser.add_argument('--processes', type=int, nargs='+', default=[1, 2], help='numbers of GPUs to compare')
    parser.add_argument('--model', default='hydra_vit_base', help='speed: what is trained')
    parser.add_argument('--img-size', type=int, default=224, help='speed: pixels')
    parser.add_argument('--batch', type=int, default=128, help='speed: images a step of one GPU')
    parser.add_argument('--steps', type=int, default=50, help='speed: steps an epoch; the first epoch warms up')
    parser.add_argument('--epochs', type=int, default=3, help='speed: epochs, the first one not counted')
    parser.add_argument('--output', type=Path, required=True, help='folder for the tables')
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index('--') if '--' in argv else len(argv)
    arguments = parser.parse_args(argv[:split])
    arguments.rest = argv[split + 1 :]
    if min(arguments.processes) < 1 or len(set(arguments.processes)) < 2:
        parser.error(f'--processes {arguments.processes}: two different numbers >= 1 are compared')
    if arguments.epochs < 2:
        parser.error('--epochs: the first one warms up, so at least 2')
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {count: Path(scratch) / str(count) for count in sorted(arguments.processes)}
        if arguments.what == 'speed':
            for count, folder in folders.items():
                train(count, [*_speed_arguments(arguments, count), *arguments.rest], folder)
            rates = {
                count: [row['images_per_second'] for row in read_rows(folder / 'summary.csv')[1:]]
                for count, folder in folders.items()
            }
            rows, title = speed_rows(rates), f'{arguments.model}, {arguments.img_size} px, {arguments.batch} a GPU'
        else:
            for count, folder in folders.items():
                train(count, ['--set', 'log.every=1', *arguments.rest], folder)
            rows = curve_rows({count: read_rows(folder / 'steps.csv') for count, folder in folders.items()})
            title = 'training loss, the same batch over all GPUs'
            largest = max(row['difference'] for row in rows)
            print(f'largest difference of the loss of an update: {largest:g}')
    write_csv(arguments.output / f'{arguments.what}.csv', rows)
    write_text(arguments.output / f'{arguments.what}.json', environment())
    show(title, rows if arguments.what == 'speed' else rows[:: max(1, len(rows) // 20)])
    print(f'{arguments.output}: {arguments.what}.csv, {arguments.what}.json')
    return 0


def _speed_arguments(arguments: argparse.Namespace, count: int) -> list[str]:
    """Synthetic images, nothing but training: one tiny validation at the end, no averaging, no checkpoints inside."""
    batch = arguments.batch * count
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
    return [
        *('--model', arguments.model, '--num-classes', '1000', '--img-size', str(arguments.img_size)),
        *('--batch-size', str(batch), '--epochs', str(arguments.epochs), '--config', 'hydra_vit_base_imagenet1k'),
        *('--accum-steps', '1', *options),
    ]


if __name__ == '__main__':
    sys.exit(main())

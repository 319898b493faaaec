"""What a scan order costs: times of one model with each of them, in turns.

python -m hydra_vision.bench.scan_orders --model hydra_vit_tiny --output FOLDER
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Optional, Sequence

import timm
import torch
import torch.nn.functional as F

import hydra_vision  # noqa: F401  registers the models
from hydra_vision.bench.report import write_csv
from hydra_vision.bench.timing import measure
from hydra_vision.environment import device_name
from hydra_vision.models.scan_order import SCAN_ORDERS
from hydra_vision.tables import make_table, stdout_console

__all__ = ['main']


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure, print a table, write scan_orders.csv."""
    arguments = _parser().parse_args(argv)
    device = torch.device(arguments.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    rows = []
    for mode in ('infer', 'train'):
        steps = {order: _step(arguments, order, mode, device) for order in SCAN_ORDERS}
        timings = measure(steps, device, rounds=arguments.rounds, time_limit=arguments.time_limit)
        for order, timing in timings.items():
            rows.append(
                {
                    'model': arguments.model,
                    'img_size': arguments.img_size,
                    'batch': arguments.batch_size,
                    'mode': mode,
                    'execution': 'compiled' if arguments.compile else 'eager',
                    'device': device_name(device),
                    'scan_order': order,
                    'median_ms': round(timing.median * 1e3, 4),
                    'p10_ms': round(timing.p10 * 1e3, 4),
                    'p90_ms': round(timing.p90 * 1e3, 4),
                    'time_over_row': round(timing.median / timings['row'].median, 4),
                }
            )
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.output / 'scan_orders.csv', rows)
    lines = [[r['mode'], r['scan_order'], f'{r["median_ms"]:.2f}', f'{r["time_over_row"]:.3f}'] for r in rows]
    title = f'{arguments.model}, {arguments.img_size} px, batch {arguments.batch_size}, {device_name(device)}'
    stdout_console().print(make_table(title, ['mode', 'scan order', 'ms', 'time over row'], lines, right=(2, 3)))
    return 0


def _step(arguments: argparse.Namespace, order: str, mode: str, device: torch.device) -> Callable[[], object]:
    size, batch = arguments.img_size, arguments.batch_size
    model = timm.create_model(arguments.model, img_size=size, scan_order=order).to(device).train(mode == 'train')
    run = torch.compile(model, dynamic=False) if arguments.compile else model
    images = torch.randn(batch, 3, size, size, device=device)
    target = torch.randint(model.num_classes, (batch,), device=device)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == 'cuda')

    def infer() -> torch.Tensor:
        with torch.no_grad(), autocast():
            return run(images)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with autocast():
            loss = F.cross_entropy(run(images), target)
        loss.backward()

    return train if mode == 'train' else infer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m hydra_vision.bench.scan_orders', description=__doc__.split('\n')[0]
    )
    parser.add_argument('--model', default='hydra_vit_tiny')
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--batch-size', type=int, default=256)
    parser.add_argument('--device', help='default: cuda where there is one')
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--time-limit', type=float, default=20.0)
    parser.add_argument('--output', type=Path, default=Path('output') / 'scan_orders')
    return parser


if __name__ == '__main__':
    sys.exit(main())

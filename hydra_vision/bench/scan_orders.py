"""What a scan order costs: times of one model with each of them, in turns.

python -m hydra_vision.bench.scan_orders --model hydra_vit_tiny --output FOLDER
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Sequence

import timm
import torch
import torch.nn.functional as F

import hydra_vision  # noqa: F401  registers the models
from hydra_vision.bench.arguments import choose_device
from hydra_vision.bench.models import fresh_compiler
from hydra_vision.bench.report import write_csv
from hydra_vision.bench.turns import failed, time_in_turns
from hydra_vision.console import check_model_name, make_table, positive, stdout_console
from hydra_vision.environment import device_name
from hydra_vision.errors import UserError
from hydra_vision.io import make_output
from hydra_vision.models.scan_order import SCAN_ORDERS

__all__ = ['main']


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure, print a table, write scan_orders.csv.

    Returns:
        Exit code: 0; 1 where an order failed (the others are measured).
    """
    arguments = _parser().parse_args(argv)
    check_model_name(arguments.model)
    device = choose_device(arguments.device)
    make_output(arguments.output)
    rows = []
    for mode in ('infer', 'train'):
        with fresh_compiler() if arguments.compile else contextlib.nullcontext():
            outcomes = time_in_turns(
                SCAN_ORDERS,
                lambda order, mode=mode: _step(arguments, order, mode, device),
                device,
                rounds=arguments.rounds,
                time_limit=arguments.time_limit,
            )
        by_rows = outcomes['row'].timing
        for order, outcome in outcomes.items():
            timing = outcome.timing
            rows.append(
                {
                    'model': arguments.model,
                    'img_size': arguments.img_size,
                    'batch': arguments.batch_size,
                    'mode': mode,
                    'execution': 'compiled' if arguments.compile else 'eager',
                    'device': device_name(device),
                    'scan_order': order,
                    'status': outcome.status,
                    'median_ms': None if timing is None else round(timing.median * 1e3, 4),
                    'p10_ms': None if timing is None else round(timing.p10 * 1e3, 4),
                    'p90_ms': None if timing is None else round(timing.p90 * 1e3, 4),
                    'time_over_row': round(timing.median / by_rows.median, 4) if timing and by_rows else None,
                }
            )
        write_csv(arguments.output / 'scan_orders.csv', rows)  # after each mode: what is measured is not lost
    lines = [[r['mode'], r['scan_order'], *_cells(r)] for r in rows]
    title = f'{arguments.model}, {arguments.img_size} px, batch {arguments.batch_size}, {device_name(device)}'
    stdout_console().print(make_table(title, ['mode', 'scan order', 'ms', 'time over row'], lines, right=(2, 3)))
    return 1 if any(failed(row['status']) for row in rows) else 0


def _cells(row: dict[str, Any]) -> list[str]:
    """Time and ratio, or why there is no time."""
    time, ratio = row['median_ms'], row['time_over_row']
    return [row['status'] if time is None else f'{time:.2f}', '' if ratio is None else f'{ratio:.3f}']


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
    parser.add_argument('--img-size', type=positive, default=224)
    parser.add_argument('--batch-size', type=positive, default=256)
    parser.add_argument('--device', help='cpu, cuda or cuda:N; default: cuda where there is one')
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--rounds', type=positive, default=10)
    parser.add_argument('--time-limit', type=float, default=20.0)
    parser.add_argument('--output', type=Path, default=Path('output') / 'scan_orders')
    return parser


if __name__ == '__main__':
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f'scan_orders: error: {error}')

"""What a scan order costs: times of one model with each of them, in interleaved rounds."""

import json
from collections.abc import Sequence

import hydra_vision.bench as bench
from hydra_vision.console import Parser, check_model_name, image_size, positive
from hydra_vision.io import write_csv
from hydra_vision.models.scan_order import SCAN_ORDERS

from . import run


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write scan_orders.csv.

    Returns:
        Exit code: 0; 1 where an order failed (the others are measured).
    """
    arguments = _parser().parse_args(argv)
    check_model_name(arguments.model)
    device, dtype = bench.timing_device(arguments)
    bench.check_backends(['auto'], device)
    session = bench.start_run(arguments, 'scan-orders')
    how = {'execution': arguments.execution, 'dtype': dtype, 'backend': 'auto'}
    cases = [
        bench.Case(arguments.model, arguments.img_size, arguments.batch_size, mode, **how, kwargs=kwargs)
        for mode in bench.MODES
        for kwargs in (json.dumps({'scan_order': order}) for order in SCAN_ORDERS)
    ]
    limits = {'rounds': arguments.rounds, 'time_limit': arguments.time_limit}
    rows = []
    for results in bench.time_models(cases, device, **limits, progress=session.progress):
        by_order = {json.loads(case.kwargs)['scan_order']: (case, measured) for case, measured in results.items()}
        base = by_order['row'][1].median
        for order, (case, measured) in by_order.items():
            over = round(measured.median / base, 4) if measured.median and base else None
            columns = {**case.columns(), **session.columns, 'scan_order': order, **measured.columns()}
            rows.append({**columns, 'time_over_row': over})
        write_csv(session.output / 'scan_orders.csv', rows)  # after each mode: a run that is cut off keeps these
    size = 'x'.join(map(str, arguments.img_size))
    title = f'{arguments.model}, {size} px, batch {arguments.batch_size}, {arguments.execution}'
    columns = {'mode': 'mode', 'scan_order': 'scan order', 'median_ms': 'ms', 'p10_ms': '10 %', 'p90_ms': '90 %'}
    session.console.print(bench.result_table(title, rows, {**columns, 'time_over_row': 'time over row'}))
    session.list_files()
    return 1 if any(row['status'].startswith('failed') for row in rows) else 0


def _parser() -> Parser:
    parser = Parser(
        prog='python -m benchmarks.scan_orders',
        description=__doc__,
        example='python -m benchmarks.scan_orders --model hydra_vit_tiny --batch-size 64',
    )
    add = parser.add_argument
    add('--model', default='hydra_vit_tiny', metavar='NAME', help='default hydra_vit_tiny')
    add('--img-size', type=image_size, default=(224, 224), metavar='N', help='in px, N or HxW; default 224')
    add('--batch-size', type=positive, default=256, metavar='N', help='default 256')
    add('--execution', choices=bench.EXECUTIONS, default='eager', help='default eager')
    bench.add_timing_arguments(parser, rounds=10, time_limit=20.0)
    return parser


if __name__ == '__main__':
    run(main, 'scan_orders')

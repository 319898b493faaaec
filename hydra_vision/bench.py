"""The command `hydra-vision bench`: any timm models next to each other, inference and training, as table, CSV and PNG.

What it stands on is used by the project's own benchmarks too (folder `benchmarks/` of a checkout): `Case` and
`time_models` for whole models, `add_timing_arguments` and `start_run` for every command that takes times.
"""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from rich.console import Console
from rich.table import Table

from .console import (
    check_model_name,
    comma_list,
    image_sizes,
    make_table,
    path,
    positive,
    positive_list,
    stdout_console,
)
from .device import AMP_NAMES, amp_dtype, pick_device
from .environment import device_name, environment
from .errors import UserError, first_line, nearest
from .flops import count_model, create_model, family_models
from .io import make_output, write_csv, write_text
from .ops.dispatch import BACKENDS, backend_reasons
from .sdpa import ATTENTION, attention_backend, attention_that_ran
from .timing import MIN_ROUNDS, Measurement, Roofline, Step, Timing, measure, measure_roofline

__all__ = [
    'Case',
    'Run',
    'add_arguments',
    'add_timing_arguments',
    'build_step',
    'check_backends',
    'choices',
    'fresh_compiler',
    'main',
    'measure_models',
    'model_step',
    'result_table',
    'speed_ratio',
    'start_run',
    'time_models',
    'timing_device',
    'write_samples',
]

MODES = {
    'infer': 'inference: forward without gradients, eval mode',
    'train': 'training: forward, cross entropy and backward in train mode; no optimizer, no data loading',
}
EXECUTIONS = {'eager': 'eager', 'compiled': 'compiled', 'graphs': 'compiled, CUDA graphs'}
# timm's ViT of the same width and patch.
PEERS = {
    'test_hydra_vit': 'test_vit',
    'hydra_vit_nano': 'deit_tiny_patch16_224',
    'hydra_vit_tiny': 'deit_tiny_patch16_224',
    'hydra_vit_small': 'deit_small_patch16_224',
    'hydra_vit_base': 'vit_base_patch16_224',
    'hydra_vit_large': 'vit_large_patch16_224',
    'm2_vit_base': 'vit_base_patch16_224',
    'vim_tiny_patch16_224': 'deit_tiny_patch16_224',
    'vim_small_patch16_224': 'deit_small_patch16_224',
    'vim_base_patch16_224': 'vit_base_patch16_224',
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    'cpu': {
        'models': ['hydra_vit_tiny'],
        'img_sizes': [(224, 224), (448, 448)],
        'mode': ['infer'],
        'execution': ['eager'],
        'threads': 2,
    },
    'cuda': {
        'models': ['hydra_vit_base'],
        'img_sizes': [(224, 224), (512, 512), (1024, 1024)],
        'mode': ['infer', 'train'],
        'execution': ['compiled'],
        'threads': None,
    },
}


@dataclass(frozen=True)
class Case:
    """One model at one image size, run in one way.

    Attributes:
        model: Name of a timm model.
        img_size: Height and width in pixels.
        batch: Images per call.
        mode: 'infer' or 'train'.
        execution: 'eager', 'compiled', or 'graphs': compiled with CUDA graphs (mode='reduce-overhead').
        dtype: Of autocast, None without; weights are float32 in any case.
        backend: Of the mixers' operator, 'auto' for the default; None for a model that has none.
        attention: Backend of ``scaled_dot_product_attention``, 'auto' for PyTorch's choice. In results, what ran: ''
            where the model has no such attention.
        kwargs: More arguments of the model, as JSON.
    """

    model: str
    img_size: tuple[int, int]
    batch: int
    mode: str = 'infer'
    execution: str = 'eager'
    dtype: torch.dtype | None = None
    backend: str | None = None
    attention: str = 'auto'
    kwargs: str = '{}'

    @property
    def label(self) -> str:
        """The model's line in tables and pictures."""
        backend = '' if self.backend in (None, 'auto') else f' [{self.backend}]'
        return self.model + backend + (f' {self.kwargs}' if self.kwargs != '{}' else '')

    @property
    def place(self) -> tuple:
        """What two cases must share to be compared."""
        return self.img_size, self.batch, self.mode, self.execution

    def columns(self) -> dict[str, Any]:
        """Columns of a CSV row that tell it from other rows."""
        height, width = self.img_size
        return {
            'model': self.model,
            'backend': self.backend,
            'img_size': height if height == width else f'{height}x{width}',
            'batch': self.batch,
            'mode': self.mode,
            'execution': EXECUTIONS[self.execution],
            'attention': self.attention,
        }


Results = Mapping[Case, Measurement]


# What is timed


def build_step(case: Case, device: torch.device) -> tuple[torch.nn.Module, Step]:
    """The model and the call that is timed, on random images that stay on the device."""
    kwargs = json.loads(case.kwargs)
    if case.backend not in (None, 'auto'):
        kwargs['backend'] = case.backend
    with torch.device(device):
        model = create_model(case.model, case.img_size, **kwargs)
        channels = kwargs.get('in_chans', model.default_cfg['input_size'][0])
        images = torch.randn(case.batch, channels, *case.img_size)
        target = torch.randint(model.num_classes, (case.batch,))
    run: Callable = model
    if case.execution != 'eager':
        # One graph per case: a dynamic one, shared by the sizes of a run, would be slower for all but the first. Ours
        # is one graph without a break, or it is an error.
        whole = case.backend not in (None, 'mamba_ssm')
        mode = 'reduce-overhead' if case.execution == 'graphs' else None
        run = torch.compile(model, dynamic=False, fullgraph=whole, mode=mode)

    def forward(images: torch.Tensor) -> torch.Tensor:
        if case.execution == 'graphs':  # what the last call returned may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        with attention_backend(case.attention):
            return run(images)

    return model, model_step(model, forward, images, target, case.mode, case.dtype)


def model_step(
    model: torch.nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    target: torch.Tensor,
    mode: str,
    dtype: torch.dtype | None,
) -> Step:
    """A call to be timed, see ``MODES``.

    Args:
        model: Put into the training or evaluation mode that belongs to ``mode``.
        forward: The model, or a function that calls it.
        images: (B, C, H, W), of the device.
        target: (B,) class indices.
        mode: 'infer' or 'train'.
        dtype: Of autocast, None without.
    """
    model.train(mode == 'train')

    def autocast() -> torch.autocast:
        return torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None)

    def infer() -> torch.Tensor:
        with torch.no_grad(), autocast():
            return forward(images)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with autocast():
            loss = F.cross_entropy(forward(images), target)
        loss.backward()

    return train if mode == 'train' else infer


def time_models(
    cases: Sequence[Case],
    device: torch.device,
    *,
    rounds: int,
    time_limit: float,
    progress: Callable[[str], object] = lambda text: None,
) -> Iterator[dict[Case, Measurement]]:
    """Time models in interleaved rounds, as many as may be resident together.

    Always those of one image size and mode. In eager mode on the CPU, where memory is plenty and the machine is often
    shared, those of all image sizes: the times of two sizes are compared as well.

    Args:
        cases: What to time, each once.
        device: Where to run.
        rounds: Most rounds.
        time_limit: Seconds of measuring per image size and mode.
        progress: Called with a line of text before each step that takes long.

    Yields:
        The results of one group, keyed by its cases with the attention backend that ran.
    """
    together: dict[tuple, list[Case]] = {}
    all_sizes = device.type == 'cpu' and all(case.execution == 'eager' for case in cases)
    for case in cases:
        together.setdefault((case.mode, None if all_sizes else case.img_size), []).append(case)
    for group in together.values():
        ran: dict[Case, str] = {}

        def build(case: Case, ran: dict[Case, str] = ran) -> Step:
            model, step = build_step(case, device)
            for _ in range(3 if case.execution == 'graphs' else 1):  # seen where the graph is replayed, not recorded
                step()
            ran[case] = attention_that_ran(step, device, model)
            return step

        limit = time_limit * len({case.img_size for case in group})
        with fresh_compiler():
            found = measure(
                {case: lambda case=case, build=build: build(case) for case in group},
                device,
                rounds=rounds,
                time_limit=limit,
                progress=lambda case: progress(
                    f'preparing {case.label}, {case.columns()["img_size"]} px, batch {case.batch}, {case.mode}, '
                    f'{EXECUTIONS[case.execution]}'
                ),
            )
        yield {
            # A replayed graph allocates nothing that could be counted.
            replace(case, attention=ran.get(case, case.attention)): replace(measured, peak_bytes=None)
            if case.execution == 'graphs'
            else measured
            for case, measured in found.items()
        }


@contextlib.contextmanager
def fresh_compiler() -> Iterator[None]:
    """Compiled code of one group only; many models may share a class, and none may fall back to eager unnoticed.

    Without the cache of traced graphs: the choice of attention is made while tracing, but is no part of its key.
    """
    import torch._dynamo  # costs seconds
    import torch._functorch.config

    torch._dynamo.reset()
    limits = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    with limits, torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


# What a run leaves behind


@dataclass(frozen=True)
class Run:
    """Where a command measures, and into which folder it writes.

    Attributes:
        device: Of the measurements.
        output: Folder, which exists.
        columns: What is the same in every CSV row: dtype, device, threads.
        roofline: Rates of the device in this dtype.
        console: For tables and progress.
    """

    device: torch.device
    output: Path
    columns: dict[str, Any]
    roofline: Roofline
    console: Console

    def progress(self, text: str) -> None:
        self.console.print(f'... {text}')

    def list_files(self) -> None:
        files = ', '.join(sorted(path.name for path in self.output.iterdir()))
        self.console.print(f'wrote {self.output}: {files}', soft_wrap=True)


def add_timing_arguments(parser: argparse.ArgumentParser, *, rounds: int = 20, time_limit: float = 30.0) -> None:
    """The options of every command that takes times: device, autocast, threads, rounds, time limit, output folder."""
    add = parser.add_argument
    add('--device', default='auto', metavar='NAME', help='cpu, cuda or cuda:N; default: cuda where there is one')
    add('--amp', choices=AMP_NAMES, default='auto', help='autocast; default: bf16 on CUDA, none on the CPU')
    add('--threads', type=positive, metavar='N', help='CPU threads')
    add('--rounds', type=_rounds, default=rounds, metavar='N', help=f'most rounds; default {rounds}')
    add(
        '--time-limit',
        type=_seconds,
        default=time_limit,
        metavar='S',
        help=f'seconds of measuring per group of variants, after {MIN_ROUNDS} rounds; default {time_limit:g}',
    )
    add('--output', type=path, metavar='FOLDER', help='for CSV, PNG and JSON; default: output/NAME-DEVICE-TIME')
    add('--overwrite', action='store_true', help='replace the results of another run')


def start_run(arguments: argparse.Namespace, name: str, **facts: Any) -> Run:
    """The device and the folder of a command with the options above; prints what its numbers depend on.

    Writes `environment.json` and sets the number of CPU threads.

    Args:
        arguments: Of a parser with ``add_timing_arguments``.
        name: Of the default output folder.
        **facts: More of what the results depend on, for `environment.json`.

    Raises:
        UserError: No such device here, or a folder that cannot be written to.
    """
    device, dtype = timing_device(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    folder = arguments.output or Path('output') / f'{name}-{device.type}-{time.strftime("%Y%m%d-%H%M%S")}'
    if (folder / 'environment.json').exists() and not arguments.overwrite:
        raise UserError(f'--output {str(folder)!r} holds the results of another run; --overwrite replaces them')
    seen, output = environment(), make_output(folder)
    columns = {
        'dtype': 'float32' if dtype is None else str(dtype).removeprefix('torch.'),
        'device': device_name(device),
        'threads': torch.get_num_threads(),
    }
    console = stdout_console()
    versions = ', '.join(f'{key} {version}' for key, version in seen['versions'].items() if version is not None)
    console.print(f'device {device}: {columns["device"]}, {columns["threads"]} CPU threads\n{versions}')
    precision = seen['precision']
    tf32 = 'off' if precision['float32_matmul_precision'] == 'highest' else 'allowed'
    cudnn = 'allowed' if precision['cudnn_allow_tf32'] else 'off'
    autocast = '' if dtype is None else f', autocast to {columns["dtype"]}'
    console.print(f'weights in float32{autocast}; TF32 {tf32} in matrix products, {cudnn} in cuDNN (CUDA only)')
    roofline = measure_roofline(device, dtype or torch.float32)
    console.print(f'measured {roofline} (large random matrices; bytes read + written)')
    run = {**columns, 'started': time.strftime('%Y-%m-%dT%H:%M:%S%z'), **facts}
    rates = {'flops_per_second': roofline.flops_per_second, 'bytes_per_second': roofline.bytes_per_second}
    write_text(output / 'environment.json', json.dumps({**seen, 'run': run, 'roofline': rates}, indent=2) + '\n')
    return Run(device, output, columns, roofline, console)


def timing_device(arguments: argparse.Namespace) -> tuple[torch.device, torch.dtype | None]:
    """Device, made the current one, and autocast type of the options above.

    Raises:
        UserError: No such device here, or one on which no times can be taken.
    """
    device = pick_device(arguments.device)
    if device.type not in _DEFAULTS:
        raise UserError(f'--device {arguments.device}: times can be taken on cuda and cpu')
    if device.type == 'cuda':
        device = torch.device('cuda', device.index or 0)
        torch.cuda.set_device(device)
    return device, amp_dtype(arguments.amp, device)


def model_row(case: Case, measured: Measurement, run: Run) -> dict[str, Any]:
    """One row of results.csv."""
    counts, training = count_model(case.model, case.img_size), case.mode == 'train'
    flops = counts.gemm_flops(case.batch, training)
    traffic = counts.traffic(case.batch, 4 if case.dtype is None else case.dtype.itemsize, training)
    return {
        **case.columns(),
        **run.columns,
        'images_per_s': None if measured.median is None else round(case.batch / measured.median, 3),
        **measured.columns(),
        **run.roofline.shares(flops, traffic, measured.median),
    }


def write_samples(path: Path, results: Iterable[tuple[Mapping[str, Any], Measurement]]) -> None:
    """samples.csv: one row per round; nothing where no variant was timed."""
    rows = [{**key, **sample} for key, measured in results for sample in measured.samples()]
    if rows:
        write_csv(path, rows)


def result_table(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Table:
    """Rows of a CSV file as a table; where there is no time, the status is in its place.

    Args:
        title: Of the table.
        rows: As they are written.
        columns: Keys of the rows -> headings.
    """
    cells = []
    for row in rows:
        cells.append([number(row.get(key)) for key in columns])
        if row.get('median_ms', '') is None:
            cells[-1][list(columns).index('median_ms')] = row['status']
    numeric = [i for i, key in enumerate(columns) if any(isinstance(row.get(key), int | float) for row in rows)]
    return make_table(title, list(columns.values()), cells, right=numeric)


def number(value: Any) -> str:
    """A cell: four digits of a float; nothing for None."""
    if not isinstance(value, float):
        return '' if value is None else str(value)
    return f'{value:.0f}' if abs(value) >= 1000 else f'{value:.4g}'


def speed_ratio(ours: Timing, other: Timing) -> tuple[float, float, float]:
    """How many times as fast: by the medians, and the lowest and highest value within one round."""
    by_round = [b / a for a, b in zip(ours.seconds, other.seconds)]
    return other.median / ours.median, min(by_round), max(by_round)


def _ratio_rows(results: Results) -> list[dict[str, Any]]:
    """Each Hydra model against its peer in the same place: its own, else the first model that is not ours."""
    family = family_models()
    others = list(dict.fromkeys(case.model for case in results if case.model not in family))
    rows = []
    for case, measured in results.items():
        peer = PEERS.get(case.model) if PEERS.get(case.model) in others else next(iter(others), None)
        for other, theirs in results.items():
            if case.model in family and other.model == peer and other.place == case.place:
                row = {**case.columns(), 'peer': peer, 'attention': other.attention}
                if measured.timing and theirs.timing:
                    row |= zip(('speed', 'lowest', 'highest'), speed_ratio(measured.timing, theirs.timing))
                    peaks = measured.peak_bytes, theirs.peak_bytes
                    row['memory'] = peaks[0] / peaks[1] if all(peaks) else None
                    rows.append({key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()})
    return rows


def _plot(results: Results, file: Path, title: str) -> None:
    """A column per mode; a row for speed and, where it was measured, one for memory."""
    values: dict[str, dict[Case, float]] = {
        'images / s': {case: case.batch / m.median for case, m in results.items() if m.timing},
        'peak memory (GiB)': {case: m.peak_bytes / 2**30 for case, m in results.items() if m.timing and m.peak_bytes},
    }
    values = {name: points for name, points in values.items() if points or name == 'images / s'}
    modes = list(dict.fromkeys(case.mode for case in results))
    labels = list(dict.fromkeys(case.label for case in results))
    several = len({case.execution for case in results}) > 1
    figure = Figure(figsize=(6.4 * len(modes), 0.6 + 4.2 * len(values)), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for axes, (name, points) in zip(figure.subplots(len(values), len(modes), squeeze=False), values.items()):
        for axis, mode in zip(axes, modes):
            lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
            for case, value in points.items():
                if case.mode == mode:
                    side = math.sqrt(case.img_size[0] * case.img_size[1])
                    lines.setdefault((case.label, case.execution), []).append((side, value))
            for (label, execution), line in lines.items():  # a model keeps its colour; how it ran shows in the line
                axis.plot(
                    *zip(*sorted(line)),
                    color=f'C{labels.index(label) % 10}',
                    marker='osD^vP*X'[labels.index(label) % 8],
                    linestyle='--' if several and execution == 'eager' else '-',
                    label=f'{label}, {EXECUTIONS[execution]}' if several else label,
                )
            axis.set(title=MODES[mode].partition(':')[0], ylabel=name, xlabel='side of the image (px)', xscale='log')
            heights = [y for line in lines.values() for _, y in line]
            if heights and max(heights) > 4 * min(heights):
                axis.set_yscale('log')
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # a run may stay inside one decade
                axis.yaxis.set_minor_locator(NullLocator())
            else:  # a few per cent between two lines should look like that
                axis.set_ylim(0, 1.1 * max(heights, default=1))
            axis.xaxis.set_major_locator(FixedLocator(sorted({x for line in lines.values() for x, _ in line})))
            axis.xaxis.set_minor_locator(NullLocator())
            for one in (axis.xaxis, axis.yaxis):
                one.set_major_formatter(FuncFormatter(lambda value, _: f'{value:.4g}'))
            axis.grid(True, alpha=0.3)
            if lines:
                axis.legend()
    figure.savefig(file, dpi=120)


# The command


def main(arguments: argparse.Namespace) -> int:
    """Run the benchmark.

    Args:
        arguments: Of a parser with ``add_arguments``.

    Returns:
        Exit code: 0; 1 where a model failed (the others are measured; out of memory is a result).

    Raises:
        UserError: Arguments that do not fit, before any work is done.
    """
    device, dtype = timing_device(arguments)
    arguments.threads = arguments.threads or _DEFAULTS[device.type]['threads']
    cases = _cases(arguments, device, dtype)
    before = torch.get_num_threads()
    try:
        run = start_run(arguments, 'bench', attention=arguments.attention)
        for mode in dict.fromkeys(case.mode for case in cases):
            run.console.print(MODES[mode])
        results = measure_models(cases, run, arguments)
    finally:
        torch.set_num_threads(before)
    ratios = _ratio_rows(results)
    if ratios:
        write_csv(run.output / 'ratios.csv', ratios)
        columns = {'mode': 'mode', 'img_size': 'px', 'batch': 'batch', 'execution': 'execution', 'model': 'model'}
        columns |= {'backend': 'backend', 'peer': 'peer', 'attention': "peer's attention", 'speed': 'images/s'}
        columns |= {'lowest': 'lowest', 'highest': 'highest round', 'memory': 'peak memory'}
        run.console.print(result_table('ratios to the peer', ratios, columns))
    run.list_files()
    return 1 if any(measured.failed for measured in results.values()) else 0


def measure_models(cases: Sequence[Case], run: Run, arguments: argparse.Namespace) -> dict[Case, Measurement]:
    """Time models; writes results.csv and samples.csv after every group, prints the table and draws results.png."""
    results: dict[Case, Measurement] = {}
    options = {'rounds': arguments.rounds, 'time_limit': arguments.time_limit, 'progress': run.progress}
    for group in time_models(cases, run.device, **options):
        results |= group
        rows = [model_row(case, measured, run) for case, measured in results.items()]
        write_csv(run.output / 'results.csv', rows)  # a run that is cut off keeps these
        write_samples(run.output / 'samples.csv', ((case.columns(), measured) for case, measured in results.items()))
    executions = ' and '.join(dict.fromkeys(EXECUTIONS[case.execution] for case in cases))
    _plot(results, run.output / 'results.png', f'{run.columns["device"]}, {run.columns["dtype"]}, {executions}')
    columns = {'mode': 'mode', 'img_size': 'px', 'batch': 'batch', 'execution': 'execution', 'model': 'model'}
    columns |= {'backend': 'backend', 'attention': 'attention', 'images_per_s': 'images/s', 'median_ms': 'median ms'}
    columns |= {'p10_ms': '10 %', 'p90_ms': '90 %', 'peak_memory_gib': 'GiB'}
    columns |= {'gemm_floor_share': 'GEMM floor / time', 'memory_floor_share': 'memory floor / time'}
    run.console.print(result_table('models', rows, columns))
    run.console.print(
        'attention: the backend of scaled_dot_product_attention that ran. GiB: peak of live tensors on the GPU, other '
        'variants left out; not measured on the CPU. Floors: the time of the products with weights alone, or of the '
        'unavoidable memory traffic alone, at the measured rates (hydra_vision/flops.py defines both).'
    )
    return results


def _cases(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype | None) -> list[Case]:
    """Every model and peer at every size, mode and execution.

    Raises:
        UserError: A model that is unknown or cannot run at a size, or a backend that cannot run here.
    """
    defaults = _DEFAULTS[device.type]
    names = list(dict.fromkeys(arguments.models or defaults['models']))
    for name in names:
        check_model_name(name)
    family = family_models()
    if arguments.peers:
        names = list(dict.fromkeys([*names, *(PEERS[name] for name in names if name in PEERS)]))
    executions = arguments.execution or defaults['execution']
    if 'graphs' in executions and device.type == 'cpu':
        raise UserError('--execution graphs needs a CUDA device')
    choosable = {name for name in names if name in family and _has_backend(name)}
    if arguments.backend and not choosable:
        raise UserError(f'--backend chooses how a mixer computes; no model with a choice is in {",".join(names)}')
    check_backends(arguments.backend or ['auto'], device)
    sizes = arguments.img_sizes or defaults['img_sizes']
    for name in names:
        for size in sizes:
            try:
                count_model(name, size)
            except (AssertionError, ValueError, RuntimeError) as error:
                raise UserError(f'{name} cannot run at {size[0]}x{size[1]} px: {first_line(error)}') from error
    return [
        Case(name, size, batch, mode, execution, dtype, backend, arguments.attention)
        for mode in arguments.mode or defaults['mode']
        for size, batch in zip(sizes, _batch_sizes(arguments.batch_sizes, sizes, device))
        for execution in executions
        for name in names
        for backend in ((arguments.backend or ['auto']) if name in choosable else [None])
    ]


def _has_backend(name: str) -> bool:
    with torch.device('meta'):
        return any(hasattr(module, 'backend') for module in create_model(name).modules())


def check_backends(names: Sequence[str], device: torch.device) -> None:
    """Let backends of the Hydra operator pass that compute on ``device``.

    Raises:
        UserError: One that is unknown or cannot run, with the reason.
    """
    default = environment()['defaults'][device.type]['backend']
    reasons = backend_reasons()
    for name in names:
        if name != 'auto' and name not in reasons:
            raise UserError(f'--backend: unknown backend {name!r}{nearest(name, reasons)}')
        reason = reasons[default if name == 'auto' else name]
        if reason is None and device.type != 'cuda' and name in ('triton', 'mamba_ssm'):
            reason = 'it computes on CUDA'
        if reason is not None:
            what = f"'auto', which is {default!r}," if name == 'auto' else repr(name)
            raise UserError(f'--backend: {what} cannot run here: {reason}')


def _batch_sizes(given: list[int] | None, sizes: Sequence[tuple[int, int]], device: torch.device) -> list[int]:
    """One per image size; where none are given, about the same number of tokens at every size."""
    if given is None:
        pixels = [height * width for height, width in sizes]
        if device.type == 'cpu':
            return [8 if n <= 224**2 else 1 for n in pixels]
        # 256 at 224 px, fewer for more tokens, to the nearest power of two: 64 at 512 px, 16 at 1024 px
        return [2 ** max(0, round(math.log2(256 * 224**2 / n))) for n in pixels]
    if len(given) not in (1, len(sizes)):
        raise UserError(f'--batch-sizes: {len(given)} values for {len(sizes)} image sizes; give one, or one per size')
    return given * len(sizes) if len(given) == 1 else given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hydra-vision bench`."""
    add = parser.add_argument
    add('--models', type=comma_list, metavar='LIST', help='timm model names; default: hydra_vit_base (CPU: _tiny)')
    add('--img-sizes', type=image_sizes, metavar='LIST', help='px, each N or HxW; default 224,512,1024 (CPU: 224,448)')
    add('--batch-sizes', type=positive_list, metavar='LIST', help='one per image size, or one for all')
    add('--mode', type=choices(MODES), metavar='LIST', help='infer,train; default both (CPU: infer)')
    add(
        '--execution',
        type=choices(EXECUTIONS),
        metavar='LIST',
        help="of eager,compiled,graphs; graphs: torch.compile(mode='reduce-overhead'). Default: compiled on CUDA, "
        'eager on the CPU',
    )
    add('--backend', type=comma_list, metavar='LIST', help=f'of our mixers: auto, {", ".join(BACKENDS)}')
    add(
        '--attention', choices=ATTENTION, default='auto', help="of scaled_dot_product_attention; auto: PyTorch's choice"
    )
    add(
        '--peers',
        action=argparse.BooleanOptionalAction,
        default=True,
        help="add timm's ViT of the same width for each Hydra model (the default)",
    )
    add_timing_arguments(parser)


def choices(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    """An argparse type: 'a,b' -> ['a', 'b'], of the allowed words, each once."""

    def convert(text: str) -> list[str]:
        for part in comma_list(text):
            if part not in allowed:
                raise argparse.ArgumentTypeError(f'{part!r} is not valid; allowed: {", ".join(allowed)}')
        return list(dict.fromkeys(comma_list(text)))

    return convert


def _rounds(text: str) -> int:
    value = positive(text)
    if value < MIN_ROUNDS:
        raise argparse.ArgumentTypeError(f'{value} rounds have no spread; at least {MIN_ROUNDS}')
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number of seconds')
    return value

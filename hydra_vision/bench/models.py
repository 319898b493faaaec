"""Times of whole models: inference, and training as forward + loss + backward."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Optional

import torch
import torch.nn.functional as F
from torch import nn

from ..flops import count_model, create_model
from .memory import allocated, peak_above, release
from .roofline import Roofline
from .timing import Timing, measure

__all__ = ['MODES', 'Case', 'Result', 'build_step', 'fresh_compiler', 'groups', 'run_group']

MODES = {
    'infer': 'inference: forward without gradients, eval mode',
    'train': 'training: forward, cross entropy and backward in train mode; no optimizer, no data loading',
}
OUT_OF_MEMORY = 'out of memory'


@dataclass(frozen=True)
class Case:
    """One model at one image size, run in one way. Weights are float32; another dtype means autocast to it."""

    model: str
    img_size: int
    batch: int
    mode: str = 'infer'
    compiled: bool = False
    dtype: torch.dtype = torch.float32
    backend: Optional[str] = None  # of the Hydra operator, 'auto' for the default; None for a model that has none
    graphs: bool = False  # compiled with mode='reduce-overhead': CUDA graphs, no work on the host

    @property
    def execution(self) -> str:
        if self.graphs:
            return 'compiled, CUDA graphs'
        return 'compiled' if self.compiled else 'eager'

    @property
    def label(self) -> str:
        """The model's line in tables and pictures."""
        return self.model if self.backend in (None, 'auto') else f'{self.model} [{self.backend}]'


@dataclass(frozen=True)
class Result:
    """A case with what was measured; without a timing where it did not fit into memory."""

    case: Case
    timing: Optional[Timing] = None
    peak_bytes: Optional[int] = None
    gemm_share: Optional[float] = None
    memory_share: Optional[float] = None
    status: str = 'ok'

    @property
    def seconds_per_image(self) -> Optional[float]:
        return None if self.timing is None else self.timing.median / self.case.batch

    @property
    def images_per_second(self) -> Optional[float]:
        return None if self.timing is None else self.case.batch / self.timing.median


def build_step(case: Case, device: torch.device) -> Callable[[], object]:
    """The call that is timed, on random images that stay on the device."""
    with torch.device(device):
        model = create_model(case.model, case.img_size, case.backend)
        channels = model.default_cfg['input_size'][0]
        images = torch.randn(case.batch, channels, case.img_size, case.img_size)
        target = torch.randint(model.num_classes, (case.batch,))
    model.train(case.mode == 'train')
    # One graph a case: a dynamic one, shared by the sizes of a run, would be slower for all but the first. Ours is one
    # graph without a break, or it is an error.
    whole = case.backend not in (None, 'mamba_ssm')
    run: nn.Module = model
    if case.compiled:
        graphs = 'reduce-overhead' if case.graphs else None
        run = torch.compile(model, dynamic=False, fullgraph=whole, mode=graphs)

    def begin() -> None:
        if case.graphs:  # what the last call returned may be overwritten
            torch.compiler.cudagraph_mark_step_begin()

    def autocast() -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, dtype=case.dtype, enabled=case.dtype != torch.float32)

    def infer() -> torch.Tensor:
        begin()
        with torch.no_grad(), autocast():
            return run(images)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        begin()
        with autocast():
            loss = F.cross_entropy(run(images), target)
        loss.backward()

    return train if case.mode == 'train' else infer


def groups(cases: Sequence[Case], device: torch.device) -> list[list[Case]]:
    """Cases that are measured in turns with one another, as many as may be resident together.

    Always those of one image size and mode. In eager mode on the CPU, where memory is plenty and the machine is often
    shared, those of all image sizes: the times of two sizes are compared as well.
    """
    together: dict[tuple, list[Case]] = {}
    for case in cases:
        all_sizes = device.type == 'cpu' and not any(c.compiled for c in cases)
        together.setdefault((case.mode, None if all_sizes else case.img_size), []).append(case)
    return list(together.values())


def run_group(
    cases: Sequence[Case],
    device: torch.device,
    roofline: Roofline,
    *,
    rounds: int,
    time_limit: float,
    progress: Callable[[str], None],
) -> list[Result]:
    """Build, warm up and time the cases in turns. One that does not fit into memory is reported as such.

    Args:
        cases: One group.
        device: Where to run.
        roofline: The device's rates in the cases' dtype.
        rounds: Rounds at most.
        time_limit: Seconds of measuring for every image size in the group.
        progress: Called with a line of text before each step that takes long.
    """
    steps: dict[Case, Callable[[], object]] = {}
    results: dict[Case, Result] = {}
    with fresh_compiler():
        for case in cases:
            verb = 'compiling' if case.compiled else 'building'
            progress(f'{verb} {case.label}, {case.img_size} px, batch {case.batch}, {case.mode}')
            before = allocated(device)
            try:
                step = build_step(case, device)
                for _ in range(2):  # the first call compiles, allocates workspaces and fills the allocator's cache
                    step()
                # A replayed graph allocates nothing that could be counted.
                peak = None if case.graphs else peak_above(step, device, before)
                results[case] = Result(case, peak_bytes=peak)
                steps[case] = step
            except torch.OutOfMemoryError:
                results[case] = Result(case, status=OUT_OF_MEMORY)
            if case not in steps:
                step = None
                release(device)
        progress(f'measuring {len(steps)} variants in turns')
        limit = time_limit * len({case.img_size for case in cases})
        for case, timing in measure(steps, device, rounds=rounds, time_limit=limit).items():
            counts, training = count_model(case.model, case.img_size), case.mode == 'train'
            flops = counts.gemm_flops(case.batch, training)
            traffic = counts.traffic(case.batch, case.dtype.itemsize, training)
            results[case] = replace(
                results[case],
                timing=timing,
                gemm_share=roofline.gemm_seconds(flops) / timing.median,
                memory_share=roofline.memory_seconds(traffic) / timing.median,
            )
    steps.clear()
    release(device)
    return [results[case] for case in cases]


@contextlib.contextmanager
def fresh_compiler() -> Iterator[None]:
    """Compiled code of one group only; many models may share a class, and none may fall back to eager unnoticed."""
    import torch._dynamo  # costs seconds; by now the models have imported it anyway

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()

"""Images a second and memory of the ablation's models, one process, nothing else on the device."""

import dataclasses
import gc
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F

from hydra_vision.bench.ablation.runs import Run
from hydra_vision.bench.memory import allocated, peak_above
from hydra_vision.bench.models import OUT_OF_MEMORY
from hydra_vision.bench.timing import measure
from hydra_vision.train import build

__all__ = ['Speed', 'measure_speed']


@dataclasses.dataclass(frozen=True)
class Speed:
    """What was measured for one row in one mode."""

    row: str
    mode: str
    batch: int
    images_per_second: Optional[float]
    peak_bytes: Optional[int]
    status: str = 'ok'

    def csv(self, run: dict[str, Any]) -> dict[str, Any]:
        """One row of speed.csv; ``run`` holds what is the same in every row."""
        return {
            'row': self.row,
            'mode': self.mode,
            'batch': self.batch,
            **run,
            'images_per_s': None if self.images_per_second is None else round(self.images_per_second, 1),
            'peak_memory_gib': None if self.peak_bytes is None else round(self.peak_bytes / 2**30, 4),
            'status': self.status,
        }


def measure_speed(
    runs: Sequence[Run], device: torch.device, *, rounds: int, time_limit: float, progress: Callable[[str], None]
) -> list[Speed]:
    """Time every row's model, in turns, for inference and for training (forward, loss, backward; no optimizer).

    Args:
        runs: One a row.
        device: Where to run; eager mode, in the precision of the recipe.
        rounds: Rounds at most.
        time_limit: Seconds of measuring for each mode.
        progress: Called with a line of text before each step that takes long.
    """
    results = []
    for mode in ('infer', 'train'):
        progress(f'measuring {len(runs)} models, {mode}')
        steps: dict[str, Callable[[], object]] = {}
        peaks: dict[str, Optional[int]] = {}
        for run in runs:
            before = allocated(device)
            name, step = run.fitted.row.name, None
            try:
                step = _step(run, mode, device)
                for _ in range(2):  # the first call compiles kernels and fills the allocator's cache
                    step()
                peaks[name] = peak_above(step, device, before)
                steps[name] = step
            except torch.OutOfMemoryError:
                step = None
                gc.collect()
                torch.cuda.empty_cache()
        timings = measure(steps, device, rounds=rounds, time_limit=time_limit)
        for run in runs:
            name, batch = run.fitted.row.name, run.config.data.batch_size
            if name in timings:
                results.append(Speed(name, mode, batch, batch / timings[name].median, peaks[name]))
            else:
                results.append(Speed(name, mode, batch, None, None, OUT_OF_MEMORY))
        steps.clear()
        gc.collect()
    return results


def _step(run: Run, mode: str, device: torch.device) -> Callable[[], object]:
    config = run.config
    model = build.create_model(config, config.model.num_classes).to(device).train(mode == 'train')
    amp = build.amp_dtype(config, device)
    size = config.data.img_size
    sides = (size, size) if isinstance(size, int) else size
    images = torch.randn(config.data.batch_size, config.model.in_chans, *sides, device=device)
    target = torch.randint(config.model.num_classes, (config.data.batch_size,), device=device)

    def infer() -> torch.Tensor:
        with torch.no_grad(), torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            return model(images)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            loss = F.cross_entropy(model(images), target)
        loss.backward()

    return train if mode == 'train' else infer

"""The scripts behind hydra_vision/ops/triton/NOTES.md: time by kernel, and the base model against timm's ViT.

    python -m hydra_vision.bench.kernels kernels --batch 256 --length 196
    python -m hydra_vision.bench.kernels models --sizes 224 512 1024 [--eager]

Both need a CUDA device. Times are CUDA events (models, medians) or the profiler's kernel times (kernels).
"""

import argparse
import gc
from collections.abc import Callable, Sequence
from statistics import median
from typing import Optional

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..ops.triton import hydra_inner

__all__ = ['kernel_times', 'main', 'model_times']

MODELS = ('vit_base_patch16_224', 'hydra_vit_base')
BATCHES = {224: 256, 512: 64, 1024: 16}


def kernel_times(batch: int, length: int, heads: int = 24, headdim: int = 64, d_state: int = 64, repeats: int = 4):
    """Milliseconds of every kernel in one forward and backward of ``hydra_inner`` (bfloat16), longest first."""
    inner, width = heads * headdim, heads * headdim + 4 * d_state

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device='cuda')

    zxbcdt = normal(batch, length, inner + width + 2 * heads).bfloat16()
    conv, dt_bias = (normal(width, 1, 7) / 7**0.5, 0.1 * normal(width)), normal(heads) - 3
    ones = [torch.ones(heads, device='cuda'), normal(heads, inner) / inner**0.5, torch.ones(inner, device='cuda')]
    leaves = [t.requires_grad_() for t in (zxbcdt, *conv, dt_bias, torch.zeros(heads, device='cuda'), *ones)]
    gradient = normal(batch, length, inner).bfloat16()

    def step() -> None:
        torch.autograd.grad(hydra_inner(*leaves, headdim=headdim, d_state=d_state), leaves, gradient)

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    events = [(e.key, e.count / repeats, e.device_time_total / repeats / 1e3) for e in trace.key_averages()]
    return sorted((e for e in events if e[2] > 0), key=lambda e: -e[2])


def _steps(model: nn.Module, images: Tensor) -> tuple[Callable[[], object], Callable[[], None]]:
    @torch.no_grad()
    def infer() -> object:
        with torch.autocast('cuda', torch.bfloat16):
            return model(images)

    def train() -> None:
        with torch.autocast('cuda', torch.bfloat16):
            loss = model(images).float().square().mean()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return infer, train


def _milliseconds(step: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def model_times(name: str, size: int, batch: int, compiled: bool) -> tuple[list[float], list[float], float]:
    """(inference times, training times, peak training GiB) of one model, bfloat16 autocast."""
    torch._dynamo.reset()
    model = timm.create_model(name, img_size=size).cuda().eval()
    images = torch.randn(batch, 3, size, size, device='cuda')
    infer, train = _steps(torch.compile(model, fullgraph=True) if compiled else model, images)
    for _ in range(3):
        infer()
    inference = _milliseconds(infer, 12)
    model.train()
    for _ in range(2):
        train()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    training = _milliseconds(train, 8)
    peak = torch.cuda.max_memory_allocated() / 2**30
    del model, infer, train
    gc.collect()
    torch.cuda.empty_cache()
    return inference, training, peak


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    kernels = commands.add_parser('kernels')
    kernels.add_argument('--batch', type=int, default=256)
    kernels.add_argument('--length', type=int, default=196)
    models = commands.add_parser('models')
    models.add_argument('--sizes', type=int, nargs='+', default=sorted(BATCHES), choices=sorted(BATCHES))
    models.add_argument('--eager', action='store_true')
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error('this measures on a CUDA device, and none is visible')
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16')
    if options.command == 'kernels':
        for name, count, time in kernel_times(options.batch, options.length):
            print(f'{time:8.3f} ms  {count:4.0f}x  {name[:90]}')
        return
    for size in options.sizes:
        found = {name: model_times(name, size, BATCHES[size], not options.eager) for name in MODELS}
        for name, (inference, training, peak) in found.items():
            print(
                f'{size} px, batch {BATCHES[size]}: {name}  infer {median(inference):.2f} ms '
                f'({min(inference):.2f}-{max(inference):.2f})  train {median(training):.2f} ms '
                f'({min(training):.2f}-{max(training):.2f})  peak {peak:.1f} GiB'
            )
        vit, hydra = (found[name] for name in MODELS)
        print(
            f'  ratio: infer {median(vit[0]) / median(hydra[0]):.3f}  train {median(vit[1]) / median(hydra[1]):.3f}  '
            f'memory {hydra[2] / vit[2]:.2f}'
        )


if __name__ == '__main__':
    main()

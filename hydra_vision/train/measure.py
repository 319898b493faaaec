"""Short measurements of a recipe that leave nothing behind: `--dry-run` and `--bench-data`."""

import itertools
import math
import time
from typing import Any

import torch

from .cost import estimate, peak_memory
from .engine import Trainer
from .report import print_table

_SECONDS = 10.0  # for which the loader, and then the device, is measured
_WARM_UP, _TIMED = 1, 2  # optimizer steps of a dry run


def dry_run(trainer: Trainer) -> None:
    """Train a few optimizer steps and print what the whole run would take, from their speed and that of validation.

    Args:
        trainer: Newly built; its weights are of no use afterwards.
    """
    config, device, devices = trainer.config, trainer.device, trainer.world.size
    rows, training = [], 0.0
    for epoch, epochs in _stages(trainer):  # images of each size take their own time
        trainer.resize(epoch)
        images, seconds = _training_speed(trainer)
        rate, size = images / seconds, 'x'.join(map(str, trainer.train_size[1:]))
        speed = f'{rate:.0f} images/s per process, measured over {_TIMED} steps of {images // _TIMED} images'
        rows.append([f'training {epochs} epochs at {size}', speed])
        mfu = trainer.cost.mfu(rate * devices)
        rows.append(['MFU', trainer.cost.describe(device) if mfu is None else f'{100 * mfu:.1f} %'])
        training += epochs * len(trainer.train_loader) * config.data.batch_size / (rate * devices)
    val_rate = _validation_rate(trainer)
    validations = math.ceil(trainer.epochs / config.run.validate_every)
    validating = validations * len(trainer.val_loader.dataset) / (val_rate * devices)
    kind = 'GPU' if device.type == 'cuda' else 'processor'
    memory = peak_memory(device)
    rows += [
        ['validation', f'{val_rate:.0f} images/s per process, measured over one batch'],
        ['peak memory', 'not measured on the CPU' if memory is None else f'{memory:.2f} GiB'],
        ['whole run', f'{trainer.epochs} epochs, {validations} validations, {devices} process(es)'],
        ['estimate', estimate(training + validating, devices, kind)],
        ['validation share', f'{100 * validating / (training + validating):.0f} %'],
    ]
    if kind == 'GPU' and devices == 1:
        rows.append(['on 8 GPUs', f'{estimate((training + validating) / 8, 8, kind)}, if they scale without loss'])
    print_table(trainer.console, f'dry run of {config.model.name}: nothing was written', ['', 'value'], rows)


def _stages(trainer: Trainer) -> list[tuple[int, int]]:
    """First epoch, and number of epochs, of every size of training images."""
    sizes = [trainer.config.at_epoch(epoch).data.img_size for epoch in range(trainer.epochs)]
    starts = [epoch for epoch in range(len(sizes)) if epoch == 0 or sizes[epoch] != sizes[epoch - 1]]
    return [(start, end - start) for start, end in zip(starts, [*starts[1:], len(sizes)])]


def _training_speed(trainer: Trainer) -> tuple[int, float]:
    """Images of this process and seconds of a few optimizer steps, after warmup steps."""
    accum = trainer.config.optim.accum_steps
    batches = itertools.chain.from_iterable(itertools.repeat(trainer.train_loader))
    _train(trainer, itertools.islice(batches, _WARM_UP * accum), accum)
    started = _now(trainer.device)
    images = _train(trainer, itertools.islice(batches, _TIMED * accum), accum)
    return images, _now(trainer.device) - started


def bench_data(trainer: Trainer) -> None:
    """Measure the loader without the model, then the model without the loader, and print which one is the limit.

    Args:
        trainer: Newly built; its weights are of no use afterwards.
    """
    device, loader = trainer.device, trainer.train_loader
    workers = getattr(getattr(loader, 'loader', loader), 'num_workers', 0)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    batch = next(batches)  # starts the processes
    loaded, started = 0, _now(device)
    while (seconds := time.monotonic() - started) < _SECONDS:
        batch = next(batches)
        loaded += len(batch[0])
    loader_rate = loaded / seconds
    del batches
    accum = trainer.config.optim.accum_steps
    _train(trainer, itertools.repeat(batch, 2 * accum), accum)
    trained, started = 0, _now(device)
    while (seconds := _now(device) - started) < _SECONDS:
        trained += _train(trainer, itertools.repeat(batch, 4 * accum), accum)
    device_rate = trained / seconds
    memory = peak_memory(device)
    rows = [
        [f'loader alone, {workers} processes', f'{loader_rate:.0f}', ''],
        [f'training step alone on {device}', f'{device_rate:.0f}', '' if memory is None else f'{memory:.2f}'],
    ]
    print_table(trainer.console, f'{trainer.config.model.name}: loader against device', ['', 'img/s', 'GiB'], rows)
    trainer.console.print(_verdict(loader_rate, device_rate, workers), highlight=False, soft_wrap=True)


def _verdict(loader_rate: float, device_rate: float, workers: int) -> str:
    """Which one is the limit, in words."""
    if loader_rate > 1.1 * device_rate:
        return f'the device is the limit: the loader is {loader_rate / device_rate:.1f} times as fast'
    needed = math.ceil(1.1 * device_rate / loader_rate * max(workers, 1))
    return (
        f'the loader is the limit: {100 * loader_rate / device_rate:.0f} % of what the device takes; about {needed} '
        f'processes (--workers) would be enough if there are cores for them. data.cache=ram, smaller image files or a '
        f'lighter augmentation each cost less'
    )


def _train(trainer: Trainer, batches: Any, accum: int) -> int:
    """Train on batches, an optimizer step per `accum` of them; returns the number of images."""
    trainer.learner.train()
    images = 0
    for index, (inputs, targets) in enumerate(batches):
        last = (index + 1) % accum == 0
        if not isinstance(inputs, dict):
            inputs = inputs.clone()  # mixing changes its input, which may come again
        trainer.forward_backward(inputs, targets, accum, last)
        images += len(targets)
        if last:
            trainer.learner.update()
    return images


def _validation_rate(trainer: Trainer) -> float:
    """Images per second of validation, raw and averaged weights together, from the second of two runs over a batch."""
    models = [trainer.learner.forward] + ([] if trainer.learner.forward_ema is None else [trainer.learner.forward_ema])
    images, targets = next(iter(trainer.val_loader))
    amp = trainer.amp
    for model in models:
        model.eval()
    for _ in range(2):
        started = _now(trainer.device)
        with torch.no_grad(), torch.autocast(trainer.device.type, dtype=amp, enabled=amp is not None):
            for model in models:
                model(images)
        seconds = _now(trainer.device) - started
    return len(targets) / seconds


def _now(device: torch.device) -> float:
    """The time when all work of the device is done."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.monotonic()

"""The training loop."""

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from timm.utils import random_seed
from torch import nn

from hydra_vision.errors import CheckpointError, ConfigError, DataError, TrainError, first_line
from hydra_vision.eval.classification import Result, evaluate
from hydra_vision.streams import keep_on_stream
from hydra_vision.train import build, data, outcome, report, sources
from hydra_vision.train.checkpoint import LAST
from hydra_vision.train.config import Config
from hydra_vision.train.cost import measure_cost
from hydra_vision.train.device import configure_torch, peak_memory, place_model
from hydra_vision.train.distributed import Flags, World
from hydra_vision.train.errors import Stopped
from hydra_vision.train.guard import Guard
from hydra_vision.train.learner import Learner
from hydra_vision.train.log import CsvLog, Sink, StepLog
from hydra_vision.train.loggers import check_packages, create_loggers
from hydra_vision.train.progress import Progress
from hydra_vision.train.randomness import seed_generators
from hydra_vision.train.saving import Saver, note_good, restore
from hydra_vision.train.signals import StopSignals

_CHECK_EVERY = {'cuda': 50}  # batches between looks at the loss, 1 elsewhere: each look waits for the device
_DRAW_EVERY = 30.0  # seconds between drawings of the curve while the run goes on


class Trainer:
    """One training run, in one process or as one of several.

    Args:
        config: the recipe.
        folder: existing folder that receives checkpoints and reports.
        console: where progress is shown; a quiet one on all processes but the first.
        state: a loaded checkpoint to continue from.
        world: the processes of the run.

    Attributes:
        epoch: epochs done.
        progress: of the epoch that is being trained.
        history: rows of the epochs done.
        best: result of the best weights so far.
        sinks: rank 0: everything that wants the numbers.

    Raises:
        ConfigError, DataError, CheckpointError: before any training, where something does not fit.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        console: Console,
        state: dict[str, Any] | None = None,
        world: World | None = None,
    ):
        self.config, self.folder, self.console = config, folder, console
        self.world = world or World()
        with self.world.together():
            self._build(state)
        updates = build.updates_in(len(self.train_loader), config.optim.accum_steps)
        self.learner = Learner(
            *(config, self.model, self.device, self.amp, updates, self.world, state),
            epochs_done=0 if state is None else state['epoch'],
        )
        self.epochs = self.learner.epochs
        self.sinks: list[Sink] = []
        self.epoch, self.progress = 0, Progress()
        self.history: list[report.Row] = []
        self.best: dict[str, Any] | None = None
        if state is not None:
            restore(self, state)
        elif self.world.rank > 0:  # the same weights everywhere, but not the same dropout
            seed_generators((config.run.seed, self.world.rank), self.device)
        self.signals = StopSignals()
        self.flags = Flags(self.world, 2)
        self.guard = Guard(config, self.learner, self.world)
        self.saver, self.steps = Saver(config.checkpoint), StepLog(config.log.every)
        if state is not None:
            note_good(self)

    def _build(self, state: dict[str, Any] | None) -> None:
        """What each process builds by itself."""
        config, world = self.config, self.world
        self.device = build.pick_device(config, world)
        self.amp = build.amp_dtype(config, self.device)
        configure_torch(config, self.device)
        data.local_batch(config, world)
        check_packages(config)
        if config.distributed.strategy == 'fsdp' and world.size == 1:
            raise ConfigError("distributed.strategy='fsdp' needs several processes (torchrun); allowed with one: ddp")
        random_seed(config.run.seed, rank=0)
        train_split, val_split = sources.open_splits(config, world=world)
        self.classes = train_split.classes
        self.num_classes = sources.count_classes(config, train_split)
        warning = None if state is None else sources.check_classes(train_split, state['classes'])
        if warning is not None:
            self.console.print(warning, highlight=False, soft_wrap=True)
        self.model = place_model(build.create_model(config, self.num_classes, state is None), config, self.device)
        build.check_backend(self.model, self.device)
        if config.run.grad_checkpointing:
            if not hasattr(self.model, 'set_grad_checkpointing'):
                raise ConfigError(f'run.grad_checkpointing: {config.model.name} does not support it')
            self.model.set_grad_checkpointing(True)
        self.train_split, self.train_size = train_split, None
        self.resize(0 if state is None else state['epoch'])
        self.val_loader = data.val_loader(config, val_split, self.num_classes, self.model, self.device, world)
        self.mixup = data.create_mixup(config, self.num_classes)
        self.input_size = tuple(data.resolve_input(config, self.model)['input_size'])

    def resize(self, epoch: int) -> None:
        """A loader of training images of the size that they have in an epoch, counted from 0."""
        config = data.at_epoch(self.config, epoch)
        size = tuple(data.resolve_input(config, self.model)['input_size'])
        if size == self.train_size:
            return
        self.train_size, self.train_loader = size, None  # None: the processes of the one before end first
        self.train_loader = data.train_loader(
            *(config, self.train_split, self.num_classes, self.model, self.device, self.world)
        )
        self.cost = measure_cost(config, self.model, size, self.device, self.world.size)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.world.size

    def facts(self) -> dict[str, Any]:
        """What run.json tells about the run."""
        return {
            'model': self.config.model.name,
            'parameters': sum(parameter.numel() for parameter in self.model.parameters()),
            'input_size': list(self.input_size),
            'training_gflops_per_image': None if self.cost.flops is None else round(self.cost.flops / 1e9, 4),
            'num_classes': self.num_classes,
            'training_images': len(self.train_loader.dataset),
            'validation_images': len(self.val_loader.dataset),
        }

    def run(self) -> dict[str, Result]:
        """Trains to the last epoch of the recipe and returns the results of the last weights and of the best ones.

        Raises:
            Stopped: a signal asked for it; everything is saved.
            NonFiniteError: the loss or a weight is NaN or infinite.
        """
        outcome.announce(self)
        drawn = time.monotonic()
        if self.world.primary and self.config.log.every:
            self.sinks.insert(0, CsvLog(self.folder, self.learner.updates))
        if self.world.primary:
            self.sinks += create_loggers(self.config, self.folder, self.learner.updates, self.facts())
        done = self.epoch + self.progress.batches / len(self.train_loader)
        meter = report.Meter(self.console, self.epochs, len(self.train_loader), done)
        try:
            with meter.bar, self.signals:
                while self.epoch < self.epochs:
                    row = self._train_epoch(meter)
                    if row['epoch'] % self.config.run.validate_every == 0 or row['epoch'] == self.epochs:
                        self._validate_epoch(meter, row)
                    self.epoch, self.progress = self.epoch + 1, Progress()
                    self.history.append(row)
                    self.saver.save(self)
                    meter.line(row)
                    for sink in self.sinks:
                        sink.epoch(row)
                    if time.monotonic() - drawn > _DRAW_EVERY:
                        self._draw()
                        drawn = time.monotonic()
            self._draw()
        except torch.OutOfMemoryError as error:
            raise TrainError(
                f'{self.device} has not enough memory ({first_line(error)}); a smaller --batch-size with a larger '
                f'--accum-steps, or --set run.grad_checkpointing=true, needs less'
            ) from error
        except BaseException:
            with contextlib.suppress(CheckpointError):  # the error that ended the run is the one to tell
                self._draw()
            raise
        finally:
            for loader in (self.train_loader, self.val_loader):
                data.end_processes(loader)
            for sink in self.sinks:
                sink.close()
        return outcome.conclude(self)

    def _train_epoch(self, meter: report.Meter) -> report.Row:
        """One pass over the training set, or what is left of it."""
        self.resize(self.epoch)
        config, loader, progress = self.config, self.train_loader, self.progress
        if self.mixup is not None and config.augment.mix_off_epoch is not None:
            self.mixup.mixup_enabled = self.epoch < config.augment.mix_off_epoch
        check_every = _CHECK_EVERY.get(self.device.type, 1)
        accum, total = config.optim.accum_steps, len(loader)
        pending = False
        self.steps.start(self.learner.updates)
        self.learner.train()
        self.learner.optimizer.zero_grad(set_to_none=True)
        with meter.phase(self.epoch, 'train', total) as phase:
            phase.go_on(progress.batches, progress.images, progress.seconds, progress.waited)
            batches = data.epoch_batches(config, loader, self.epoch, progress.batches)
            for batch, (images, targets) in enumerate(phase.read(batches), start=progress.batches):
                left = total - batch // accum * accum  # a streamed set may hold more batches than it told
                group = left if 0 < left < accum else accum  # batches of this update; fewer in the last one
                pending = (batch + 1) % accum != 0 and batch + 1 != total
                progress.losses.append(self._backward(images, targets, group, not pending))
                progress.batches = batch + 1
                phase.advance(len(images) * self.world.size, progress.mean_loss())
                if not pending:
                    self._update(phase, images)
                elif len(progress.losses) >= check_every:
                    self._look()
            if pending:  # ... or fewer
                self._update(phase, images)
            self._look()
            rate, seconds, waiting = phase.rate(), phase.seconds(), phase.waiting()
            progress.images, progress.seconds, progress.waited = phase.images, seconds, phase.waited
        if progress.checked == 0 and self.learner.skipped == 0:
            raise DataError('the training loader gave no batch')
        self.guard.check_weights(self.epoch)
        lr = self.learner.lr
        self.learner.end_epoch(self.epoch + 1)
        self.learner.share_statistics()
        return {
            **{'epoch': self.epoch + 1, 'updates': self.learner.updates, 'lr': lr, 'train_loss': progress.mean_loss()},
            **{'images_per_second': rate, 'seconds': seconds, 'data_wait': waiting, 'mfu': self.cost.mfu(rate)},
            'peak_memory_gib': peak_memory(self.device),
        }

    def _update(self, phase: report.Phase, images: torch.Tensor) -> None:
        """One optimizer step, then what is due after it: a look at the losses, a log row, a checkpoint, the end."""
        step = self.learner.updates + 1
        log_due = self.steps.due_at(step)
        self.learner.update(measure=log_due)
        stop, save_due = self.flags.exchange(self.signals.received > 0, self.saver.due_by_clock())
        save_due |= self.saver.due_at(step)
        self.guard.check_steps()
        if log_due or len(self.progress.losses) >= _CHECK_EVERY.get(self.device.type, 1):
            self._look()
        if log_due:
            self.steps.write(self, images)
        if stop or save_due:
            self._save_midway(phase)
        if stop:
            self._end_by_signal()

    def _backward(self, images: torch.Tensor, targets: torch.Tensor, group: int, last: bool = True) -> torch.Tensor:
        """Adds the gradient of one batch; returns its loss."""
        keep_on_stream(images, targets)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        if self.config.run.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.learner.backward(images, targets, group, last)

    def _look(self) -> None:
        """Looks at the latest losses; waits for the device."""
        self.guard.check_losses(self.progress, self.epoch, len(self.train_loader))

    def _validate_epoch(self, meter: report.Meter, row: report.Row) -> None:
        """Validates raw and averaged weights and notes the better one."""
        models = {'val': self.learner.forward}
        if self.learner.forward_ema is not None:
            models['ema'] = self.learner.forward_ema
        with meter.phase(self.epoch, 'validate', len(self.val_loader)) as phase:
            results = self._evaluate(models, phase)
        for name, result in results.items():
            row |= {f'{name}_{key}': result[key] for key in ('loss', 'top1', 'top5')}
            if self.best is None or result['top1'] > self.best['top1']:
                label = 'raw' if name == 'val' else 'EMA'
                self.best = {**result, 'epoch': row['epoch'], 'weights': label}

    def _evaluate(self, models: dict[str, nn.Module], phase: report.Phase) -> dict[str, Result]:
        """Evaluates models over all processes; ends where a signal asks for it, the epoch's training being saved."""
        polled = self.world.size == 1 or not data.is_streamed(self.val_loader)  # processes must ask equally often

        def on_batch(images: int) -> None:
            phase.advance(images * self.world.size)
            if polled and self.flags.exchange(self.signals.received > 0, False)[0]:
                self._save_midway(None)
                self._end_by_signal()

        batches = data.shared_batches(self.val_loader, self.world, lockstep=self.learner.sharded)
        last = self.config.run.channels_last
        return evaluate(models, batches, self.device, self.amp, last, on_batch, self.world.sum)

    def _save_midway(self, phase: report.Phase | None) -> None:
        """A checkpoint inside an epoch; None: its training is done, its validation is not."""
        if phase is not None:
            self._look()
            self.guard.check_weights(self.epoch)
            progress = self.progress
            progress.images, progress.seconds, progress.waited = phase.images, phase.seconds(), phase.waited
        self.saver.save(self)

    def _end_by_signal(self) -> None:
        self.world.barrier()  # rank 0 has written
        number = max(self.world.gather(self.signals.received))
        raise Stopped(number, self.folder / LAST, self.epoch, self.learner.updates)

    def _draw(self) -> None:
        if self.history and self.world.primary:
            report.write_curve(self.folder, self.history, self.config.model.name)

"""The training loop."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from timm.utils import random_seed
from torch import nn

from ..console import markdown_table
from ..errors import ConfigError, DataError, TrainError, WriteError, first_line
from ..io import write_text
from ..version import __version__
from . import build, data, report, sources
from .checkpoint import BEST, KEPT, LAST, CheckpointSchedule, best_steps, save_checkpoint
from .config import Config
from .cost import measure_cost, peak_memory
from .distributed import AsyncFlags, World
from .evaluate import Result, evaluate
from .guard import EpochProgress, NonFiniteGuard
from .learner import Learner
from .log import MIXERS, STEPS, Logger, check_packages, create_loggers
from .randomness import random_state, seed_generators, set_random_state
from .sampling import local_batch
from .signals import Stopped, StopSignals
from .stats import across_layers, mixer_statistics

_CHECK_EVERY = {'cuda': 50}  # batches between checks of the loss, 1 elsewhere: each synchronizes with the device
_DRAW_EVERY = 30.0  # seconds between drawings of the curve during the run


class Trainer:
    """One training run, in one process or as one of several.

    Implements `state_dict` and `load_state_dict` as PyTorch's Stateful protocol.

    Args:
        config: The recipe.
        folder: Existing folder that receives checkpoints and reports.
        console: Where progress is shown; a quiet one on all processes but the first.
        state: A loaded checkpoint to continue from.
        world: The processes of the run.

    Attributes:
        epoch: Epochs done.
        progress: Progress of the epoch that is being trained.
        history: Rows of the epochs done.
        best: Result of the best weights so far.
        loggers: On rank 0: where metrics go.

    Raises:
        ConfigError, DataError, CheckpointError: Before any training, where something does not fit.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        console: Console,
        state: Mapping[str, Any] | None = None,
        world: World | None = None,
    ):
        self.config, self.folder, self.console = config, folder, console
        self.world = world or World()
        with self.world.together():
            self._build(state)
        updates = build.updates_in(len(self.train_loader), config.optim.accum_steps)
        self.learner = Learner(config, self.model, self.device, self.amp, updates, self.world)
        self.epochs = self.learner.epochs
        self.loggers: list[Logger] = []
        self.epoch, self.progress = 0, EpochProgress()
        self.history: list[report.Row] = []
        self.best: dict[str, Any] | None = None
        self.signals, self.flags = StopSignals(), AsyncFlags(self.world, 2)
        self.guard = NonFiniteGuard(config.optim, self.learner, self.world)
        self.schedule = CheckpointSchedule(config.checkpoint.every_steps, config.checkpoint.every_minutes)
        self.logged = (0, time.monotonic())  # optimizer steps and time of the latest row of steps.csv
        if state is not None:
            self.load_state_dict(state)
        elif self.world.rank > 0:  # the same weights everywhere, but not the same dropout
            seed_generators((config.run.seed, self.world.rank), self.device)

    def _build(self, state: Mapping[str, Any] | None) -> None:
        """Build what each process has of its own: device, data, model."""
        config, world = self.config, self.world
        self.device = build.pick_device(config, world)
        self.amp = build.amp_dtype(config, self.device)
        build.configure_torch(config.run, self.device)
        local_batch(config.data.batch_size, world.size, config.augment.mixes)
        check_packages(config.log)
        if config.distributed.strategy == 'fsdp' and world.size == 1:
            raise ConfigError("distributed.strategy='fsdp' needs several processes (torchrun); allowed with one: ddp")
        random_seed(config.run.seed, rank=0)
        self.train_split, val_split = sources.open_splits(config, world=world)
        self.classes = self.train_split.classes
        self.num_classes = sources.count_classes(config, self.train_split)
        warning = None if state is None else sources.check_classes(self.train_split, state['classes'])
        if warning is not None:
            self._print(warning)
        model = build.create_model(config, self.num_classes, load_weights=state is None)
        self.model = build.place_model(model, config.run, self.device)
        build.check_backend(self.model, self.device)
        if config.run.grad_checkpointing:
            if not hasattr(self.model, 'set_grad_checkpointing'):
                raise ConfigError(f'run.grad_checkpointing: {config.model.name} does not support it')
            self.model.set_grad_checkpointing(True)
        self.train_size: tuple[int, ...] | None = None
        self.resize(0 if state is None else state['epoch'])
        self.val_loader = data.val_loader(config, val_split, self.num_classes, self.model, self.device, world)
        self.mixup = data.create_mixup(config.augment, self.num_classes)
        self.input_size = tuple(data.resolve_input(config, self.model)['input_size'])

    def resize(self, epoch: int) -> None:
        """Build the loader of training images of the size that they have in an epoch, counted from 0."""
        config = self.config.at_epoch(epoch)
        size = tuple(data.resolve_input(config, self.model)['input_size'])
        if size == self.train_size:
            return
        self.train_size, self.train_loader = size, None  # None: first end the processes of the previous one
        self.train_loader = data.train_loader(
            config, self.train_split, self.num_classes, self.model, self.device, self.world
        )
        self.cost = measure_cost(config, self.num_classes, size, self.device, self.world.size)
        if config.run.cudnn_attention is None:
            note = build.avoid_faulty_attention(self.model, size, self.device, self.amp)
            if note is not None:
                self._print(note)

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    # The loop

    def run(self) -> dict[str, Result]:
        """Train to the last epoch of the recipe; returns the results of the last weights and of the best ones.

        Raises:
            Stopped: A signal asked for it; everything is saved.
            NonFiniteError: The loss or a weight is NaN or infinite.
        """
        config = self.config
        self._print_plan()
        with self.world.together():
            if self.world.primary:
                self.loggers += create_loggers(config, self.folder, self.learner.updates, self.facts())
        done = self.epoch + self.progress.batches / len(self.train_loader)
        shown = report.RunProgress(self.console, self.epochs, len(self.train_loader), done)
        drawn = time.monotonic()
        try:
            with shown.bar, self.signals:
                while self.epoch < self.epochs:
                    row = self._train_epoch(shown)
                    if row['epoch'] % config.run.validate_every == 0 or row['epoch'] == self.epochs:
                        self._validate_epoch(shown, row)
                    self.epoch, self.progress = self.epoch + 1, EpochProgress()
                    self.history.append(row)
                    self._save()
                    shown.print_epoch(row)
                    values = {f'epoch/{key}': value for key, value in row.items() if key != 'updates'}
                    for logger in self.loggers:
                        logger.log(row['updates'], values)
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
            with contextlib.suppress(WriteError):  # the error that ended the run is the one to report
                self._draw()
            raise
        finally:
            for loader in (self.train_loader, self.val_loader):
                data.end_processes(loader)
            for logger in self.loggers:
                logger.close()
        return self._print_results()

    def _train_epoch(self, run_progress: report.RunProgress) -> report.Row:
        """One pass over the training set, or what is left of it."""
        self.resize(self.epoch)
        config, learner, loader, progress = self.config, self.learner, self.train_loader, self.progress
        accum, total = config.optim.accum_steps, len(loader)
        if self.mixup is not None and config.augment.mix_off_epoch is not None:
            self.mixup.mixup_enabled = self.epoch < config.augment.mix_off_epoch
        check_every = _CHECK_EVERY.get(self.device.type, 1)
        pending = False  # whether there are gradients that no optimizer step has used
        self.logged = (learner.updates, time.monotonic())
        learner.train()
        learner.optimizer.zero_grad(set_to_none=True)

        with run_progress.start_pass(self.epoch, 'train', total) as shown:
            shown.resume(progress.batches, progress.images, progress.seconds, progress.waited)
            batches = data.epoch_batches(loader, config.run.seed, self.epoch, progress.batches)
            for batch, (images, targets) in enumerate(shown.read(batches), start=progress.batches):
                # Forward and backward. The last optimizer step of an epoch accumulates the batches that are left; a
                # streamed set may hold more of them, or fewer, than its length says.
                left = total - batch // accum * accum
                group = left if 0 < left < accum else accum
                pending = (batch + 1) % accum != 0 and batch + 1 != total
                progress.losses.append(self.forward_backward(images, targets, group, last=not pending))
                progress.batches = batch + 1
                shown.advance(len(targets) * self.world.size, progress.mean_loss())
                # Optimizer step, logging, checkpoint, stop
                if not pending:
                    self._optimizer_step(shown, images)
                elif len(progress.losses) >= check_every:
                    self._sync_losses()
            if pending:  # it held fewer batches
                self._optimizer_step(shown, images)
            self._sync_losses()
            rate, seconds, waiting = shown.rate(), shown.seconds(), shown.waiting()
            progress.images, progress.seconds, progress.waited = shown.images, seconds, shown.waited

        if progress.checked == 0 and learner.skipped == 0:
            raise DataError('the training loader gave no batch')
        self.guard.check_weights(self.epoch)
        lr = learner.lr
        learner.end_epoch(self.epoch + 1)
        learner.share_statistics()
        return {
            'epoch': self.epoch + 1,
            'updates': learner.updates,
            'lr': lr,
            'train_loss': progress.mean_loss(),
            'images_per_second': rate,
            'seconds': seconds,
            'data_wait': waiting,
            'mfu': self.cost.mfu(rate),
            'peak_memory_gib': peak_memory(self.device),
        }

    def forward_backward(
        self, images: data.Images, targets: torch.Tensor, group: int, last: bool = True
    ) -> torch.Tensor:
        """Mix a batch and add its gradient.

        Args:
            images: (B, C, H, W) on the device, which mixing changes in place; or a NaFlex batch.
            targets: Class indices (B,).
            group: Batches of this optimizer step.
            last: Whether it is the last of them.

        Returns:
            The loss of this process, a float32 scalar on the device.
        """
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        if self.config.run.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.learner.backward(images, targets, group, last)

    def _optimizer_step(self, shown: report.PassProgress, images: data.Images) -> None:
        """One optimizer step, then what is due after it: checks, a row of metrics, a checkpoint, the end."""
        learner, every = self.learner, self.config.log.every
        log_due = every > 0 and (learner.updates + 1) % every == 0
        learner.update(measure=log_due)
        # What any process wants, all of them do at the same step
        stop, save_due = self.flags.exchange(self.signals.received > 0, self.schedule.due_by_clock())
        save_due |= self.schedule.due_at(learner.updates)
        # Checks
        self.guard.check_steps()
        if log_due or len(self.progress.losses) >= _CHECK_EVERY.get(self.device.type, 1):
            self._sync_losses()
        # Metrics
        if log_due:
            self._log_step(images)
        # Checkpoint
        if stop or save_due:
            self._sync_losses()
            self.guard.check_weights(self.epoch)
            progress = self.progress
            progress.images, progress.seconds, progress.waited = shown.images, shown.seconds(), shown.waited
            self._save()
        if stop:
            self._stop()

    def _sync_losses(self) -> None:
        """Copy pending losses to the host and check that they are finite."""
        self.guard.check_losses(self.progress, self.epoch, len(self.train_loader))

    def _log_step(self, images: data.Images) -> None:
        """Log metrics inside an epoch; Hydra layers are measured on the latest batch of images."""
        learner, config = self.learner, self.config
        updates, started = self.logged
        seconds = time.monotonic() - started
        layers = {}
        if config.log.mixers and (self.world.primary or learner.sharded):
            layers = mixer_statistics(self.model, data.first_images(images, config.log.mixer_images), self.amp)
        values = {
            'epoch': self.epoch + self.progress.batches / len(self.train_loader),
            'lr': learner.lr,
            'loss': self.progress.last_loss,
            'grad_norm': learner.grad_norm,
            'param_norm': learner.param_norm(),
            'images_per_second': (learner.updates - updates) * config.images_per_step / max(seconds, 1e-9),
            'skipped': learner.skipped,
            'loss_scale': learner.scaler.get_scale() if learner.scaler.is_enabled() else None,
            **across_layers(layers),
        }
        metrics = {f'step/{key}': value for key, value in values.items()}
        for layer, statistics in layers.items():
            metrics |= {f'mixers/{layer}/{key}': value for key, value in statistics.items()}
        for logger in self.loggers:
            logger.log(learner.updates, metrics)
        self.logged = (learner.updates, time.monotonic())

    def _validate_epoch(self, run_progress: report.RunProgress, row: report.Row) -> None:
        """Validate raw and averaged weights, add the results to the epoch's row and keep the better ones as best."""
        models: dict[str, nn.Module] = {'val': self.learner.forward}
        if self.learner.forward_ema is not None:
            models['ema'] = self.learner.forward_ema
        polled = self.world.size == 1 or not data.is_streamed(self.val_loader)  # all processes must poll equally often

        with run_progress.start_pass(self.epoch, 'validate', len(self.val_loader)) as shown:

            def on_batch(images: int) -> None:
                shown.advance(images * self.world.size)
                if polled and self.flags.exchange(self.signals.received > 0, False)[0]:
                    self._save()  # the epoch's training is done, its validation is not
                    self._stop()

            batches = data.shared_batches(self.val_loader, self.world, lockstep=self.learner.sharded)
            channels_last = self.config.run.channels_last
            results = evaluate(models, batches, self.device, self.amp, channels_last, on_batch, self.world.sum)
        for name, result in results.items():
            row |= {f'{name}_{key}': result[key] for key in ('loss', 'top1', 'top5')}
            if self.best is None or result['top1'] > self.best['top1']:
                label = 'raw' if name == 'val' else 'EMA'
                self.best = {**result, 'epoch': row['epoch'], 'weights': label}

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; a collective call, complete on rank 0."""
        return {
            'arch': self.config.model.name,
            'config': self.config.to_dict(),
            'num_classes': self.num_classes,
            'classes': self.classes,
            'epoch': self.epoch,
            'progress': self.progress.state_dict(),
            'best': self.best,
            'history': self.history,
            **self.learner.state_dict(),
            'random': self.world.gather(random_state(self.device)),
            'versions': {'hydra_vision': __version__, 'timm': timm.__version__, 'torch': str(torch.__version__)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, also on another number of processes.

        Args:
            state: Of a checkpoint, the same on every process.

        Raises:
            ConfigError: The recipe cuts a partly trained epoch into other batches.
            CheckpointError: The weights or the optimizer do not fit.
        """
        self.epoch, self.history, self.best = state['epoch'], state['history'], state['best']
        self.progress = EpochProgress(**state['progress'])
        if self.progress.batches:
            for section, key in (('data', 'batch_size'), ('optim', 'accum_steps')):
                before, now = state['config'][section][key], getattr(getattr(self.config, section), key)
                if before != now:
                    raise ConfigError(
                        f'{section}.{key}: {before} -> {now} is not possible in the middle of epoch {self.epoch + 1}, '
                        f"where the checkpoint was written; resume with {before}, or from the checkpoint of an epoch's "
                        f'end'
                    )
        self.learner.load_state_dict(state, self.epoch)
        if self.world.rank < len(state['random']):
            set_random_state(state['random'][self.world.rank], self.device)
        else:
            seed_generators((self.config.run.seed, self.world.rank, self.learner.updates), self.device)
        if len(state['random']) != self.world.size:
            self._print(
                f'resuming with {self.world.size} instead of {len(state["random"])} processes: the images of every '
                f'step stay the same, dropout and mixing draw other numbers'
            )
        self._note_good()

    def _save(self) -> None:
        """Write the checkpoint, then the summary: what the summary says can be resumed from.

        Raises:
            WriteError: On every process, where they could not be written.
        """
        state = self.state_dict()
        with self.world.together():
            if self.world.primary:
                keep = self.config.checkpoint
                is_best = self.best is not None and self.best['epoch'] == self.epoch and not self.progress.batches
                save_checkpoint(self.folder, state, is_best, keep.keep_last, best_steps(self.history, keep.keep_best))
                report.write_summary(self.folder, self.history)
        self.schedule.reset()
        self._note_good()

    def _note_good(self) -> None:
        """Let errors name the latest checkpoint."""
        where = f'step {self.learner.updates}' if self.progress.batches else f'epoch {self.epoch}'
        last = self.folder / LAST
        self.guard.last_good = f'the last good checkpoint is {last} ({where})'
        if not last.is_file():
            self.guard.last_good = 'the checkpoint that it was resumed from is good'

    def _stop(self) -> None:
        self.world.barrier()  # rank 0 has written
        number = max(self.world.gather(self.signals.received))
        raise Stopped(number, self.folder / LAST, self.epoch, self.learner.updates)

    # Reports

    def facts(self) -> dict[str, Any]:
        """What run.json says about the run."""
        return {
            'model': self.config.model.name,
            'parameters': sum(parameter.numel() for parameter in self.model.parameters()),
            'input_size': list(self.input_size),
            'training_gflops_per_image': None if self.cost.flops is None else round(self.cost.flops / 1e9, 4),
            'num_classes': self.num_classes,
            'training_images': len(self.train_loader.dataset),
            'validation_images': len(self.val_loader.dataset),
        }

    def _print_plan(self) -> None:
        """Print what is about to happen, in a few lines."""
        config, world = self.config, self.world
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        size = 'x'.join(map(str, self.input_size))
        amp = 'float32' if self.amp is None else str(self.amp).removeprefix('torch.')
        images = [f'{len(loader.dataset):,}' for loader in (self.train_loader, self.val_loader)]
        start = f', from epoch {self.epoch}' if self.epoch else ''
        start += f' and {self.progress.batches} batches' if self.progress.batches else ''
        if self.epoch >= self.epochs:
            start = f': nothing to train, the checkpoint has {self.epoch} epochs already'
        batch, accum = config.data.batch_size, config.optim.accum_steps
        share = f'{batch // world.size} x {world.size} processes' if world.size > 1 else f'{batch}'
        share += f' x {accum} batches' if accum > 1 else ''
        more = []
        if hasattr(self.model, 'initial_weights'):
            more.append(f'start   {self.model.initial_weights}')
        if config.model.freeze_backbone:
            learning = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            more.append(f'probe   only the classifier is trained: {learning:,} parameters')
        if config.distill.teacher is not None:
            more.append(f'teacher {config.distill.teacher}, {1 - config.distill.task_weight:.2g} of the loss')
        if config.data.progressive_sizes is not None:
            more.append(
                f'sizes   {", ".join(map(str, config.data.progressive_sizes))} px, in equal parts of the epochs'
            )
        for line in (
            f'model   {config.model.name}, {parameters / 1e6:.2f} M parameters, input {size}',
            *more,
            f'data    {images[0]} training and {images[1]} validation images, {self.num_classes} classes',
            f'run     {self.epochs} epochs{start} on {self.device}, {amp}',
            f'step    {batch * accum} images ({share}), learning rate up to {config.optim.lr * config.lr_scale:.3g}',
            f'cost    {self.cost.describe(self.device)}',
            f'output  {self.folder}',
        ):
            self._print(line)

    def _print_results(self) -> dict[str, Result]:
        """Print and write the final table."""
        results = {}
        for name, key in (('raw', 'val'), ('EMA', 'ema')):
            last = {metric: (self.history or [{}])[-1].get(f'{key}_{metric}') for metric in ('top1', 'top5', 'loss')}
            if last['top1'] is not None:
                results[f'{name}, last epoch'] = {**last, 'images': self.best['images']}
        if self.best is not None:
            label = f'best: {self.best["weights"]}, epoch {self.best["epoch"]}'
            results[label] = {key: self.best[key] for key in ('top1', 'top5', 'loss', 'images')}
        rows = report.result_rows(results)
        for loader in (self.train_loader, self.val_loader):
            report.report_unreadable(self.console, loader, self.world)
        report.print_table(self.console, f'{self.config.model.name}, validation', report.RESULT_HEADER, rows)
        self._print(report.speed_line(self.history))
        if self.world.primary:
            write_text(self.folder / 'results.md', markdown_table(report.RESULT_HEADER, rows))
            files = ('curve.png', BEST, LAST, KEPT, 'summary.csv', STEPS, MIXERS, 'results.md', 'config.yaml')
            written = ', '.join(file for file in (*files, report.RUN) if (self.folder / file).exists())
            self._print(f'{self.folder}: {written}')
        return results

    def _draw(self) -> None:
        if self.history and self.world.primary:
            report.write_curve(self.folder, self.history, self.config.model.name)

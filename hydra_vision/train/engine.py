"""The training loop."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from timm.utils import random_seed
from torch import nn

from hydra_vision.eval.classification import Result, evaluate
from hydra_vision.train import build, data, report
from hydra_vision.train.checkpoint import BEST, LAST, save_checkpoint, write_text
from hydra_vision.train.config import Config
from hydra_vision.train.cost import measure_cost
from hydra_vision.train.device import configure_torch, peak_memory, place_model
from hydra_vision.train.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    TrainError,
    first_line,
)
from hydra_vision.train.learner import Learner
from hydra_vision.train.log import Sink
from hydra_vision.train.provenance import RUN
from hydra_vision.train.randomness import random_state, set_random_state
from hydra_vision.version import __version__

_CHECK_EVERY = {"cuda": 50}  # batches between looks at the loss, 1 elsewhere: each look waits for the device
_DRAW_EVERY = 30.0  # seconds between drawings of the curve while the run goes on


class Trainer:
    """One training run in one process.

    Args:
        config: the recipe.
        folder: existing folder that receives checkpoints and reports.
        console: where progress is shown.
        state: a loaded checkpoint to continue from.

    Raises:
        ConfigError, DataError, CheckpointError: before any training, where something does not fit.
    """

    def __init__(self, config: Config, folder: Path, console: Console, state: dict[str, Any] | None = None):
        self.config, self.folder, self.console = config, folder, console
        run = config.run
        self.device = build.pick_device(config)
        self.amp = build.amp_dtype(config, self.device)
        configure_torch(config, self.device)
        random_seed(run.seed, rank=0)

        train_split, val_split = data.open_splits(config)
        self.classes = train_split.classes
        self.num_classes = data.count_classes(config, train_split)
        self.model = place_model(build.create_model(config, self.num_classes, state is None), config, self.device)
        build.check_backend(self.model, self.device)
        if run.grad_checkpointing:
            if not hasattr(self.model, "set_grad_checkpointing"):
                raise ConfigError(f"run.grad_checkpointing: {config.model.name} does not support it")
            self.model.set_grad_checkpointing(True)
        self.train_loader = data.train_loader(config, train_split, self.num_classes, self.model, self.device)
        self.val_loader = data.val_loader(config, val_split, self.num_classes, self.model, self.device)
        self.mixup = data.create_mixup(config, self.num_classes)
        updates = build.updates_in(len(self.train_loader), config.optim.accum_steps)
        self.learner = Learner(config, self.model, self.device, self.amp, updates)
        self.epochs = self.learner.epochs
        self.input_size = tuple(data.resolve_input(config, self.model)["input_size"])
        self.cost = measure_cost(config, self.model, self.input_size, self.device)
        self.sinks: list[Sink] = []  # rank 0: everything that wants the numbers

        self.epoch = 0  # epochs done
        self.history: list[report.Row] = []
        self.best: dict[str, Any] | None = None
        if state is not None:
            self._restore(state)
        self.learner.compile()

    def facts(self) -> dict[str, Any]:
        """What run.json tells about the run."""
        return {
            "model": self.config.model.name,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "input_size": list(self.input_size),
            "training_gflops_per_image": None if self.cost.flops is None else round(self.cost.flops / 1e9, 4),
            "num_classes": self.num_classes,
            "training_images": len(self.train_loader.dataset),
            "validation_images": len(self.val_loader.dataset),
        }

    def run(self) -> dict[str, Result]:
        """Trains to the last epoch of the recipe and returns the results of the last weights and of the best ones."""
        self._announce()
        drawn = time.monotonic()
        meter = report.Meter(self.console, self.epochs, len(self.train_loader), self.epoch)
        try:
            with meter.bar:
                while self.epoch < self.epochs:
                    row = self._train_epoch(meter)
                    if self.epoch % self.config.run.validate_every == 0 or self.epoch == self.epochs:
                        self._validate_epoch(meter, row)
                    self.history.append(row)
                    self._save()
                    meter.line(row)
                    for sink in self.sinks:
                        sink.epoch(row)
                    if time.monotonic() - drawn > _DRAW_EVERY:
                        self._draw()
                        drawn = time.monotonic()
            self._draw()
        except torch.OutOfMemoryError as error:
            raise TrainError(
                f"{self.device} has not enough memory ({first_line(error)}); a smaller --batch-size with a larger "
                f"--accum-steps, or --set run.grad_checkpointing=true, needs less"
            ) from error
        except BaseException:
            with contextlib.suppress(CheckpointError):  # the error that ended the run is the one to tell
                self._draw()
            raise
        finally:
            for sink in self.sinks:
                sink.close()
        return self._results()

    def _train_epoch(self, meter: report.Meter) -> report.Row:
        """One pass over the training set."""
        config, loader = self.config, self.train_loader
        if self.mixup is not None and config.augment.mix_off_epoch is not None:
            self.mixup.mixup_enabled = self.epoch < config.augment.mix_off_epoch
        check_every = _CHECK_EVERY.get(self.device.type, 1)
        accum, total = config.optim.accum_steps, len(loader)
        losses: list[torch.Tensor] = []
        checked, loss_sum, pending = 0, 0.0, False
        self.learner.task.train()
        self.learner.optimizer.zero_grad(set_to_none=True)
        with meter.phase(self.epoch, "train", total) as phase:
            for batch, (images, targets) in enumerate(phase.read(data.epoch_batches(config, loader, self.epoch))):
                left = total - batch // accum * accum  # a streamed set may hold more batches than it told
                group = left if 0 < left < accum else accum  # batches of this update; fewer in the last one
                losses.append(self._backward(images, targets, group))
                pending = (batch + 1) % accum != 0 and batch + 1 != total
                if not pending:
                    self.learner.update()
                if len(losses) == check_every:
                    checked, loss_sum = self._check_losses(losses, checked, loss_sum)
                phase.advance(len(images), loss_sum / checked if checked else None)
            if pending:  # ... or fewer
                self.learner.update()
            checked, loss_sum = self._check_losses(losses, checked, loss_sum)
            rate, seconds, waiting = phase.rate(), phase.seconds(), phase.waiting()
        if checked == 0:
            raise DataError("the training loader gave no batch")
        self._check_weights()
        lr = self.learner.lr
        self.epoch += 1
        self.learner.end_epoch(self.epoch)
        return {
            **{"epoch": self.epoch, "updates": self.learner.updates, "lr": lr, "train_loss": loss_sum / checked},
            **{"images_per_second": rate, "seconds": seconds, "data_wait": waiting, "mfu": self.cost.mfu(rate)},
            "peak_memory_gib": peak_memory(self.device),
        }

    def _backward(self, images: torch.Tensor, targets: torch.Tensor, group: int) -> torch.Tensor:
        """Adds the gradient of one batch; returns its loss."""
        if images.is_cuda:
            # The prefetcher allocated these on its own stream: keep it from reusing the memory while we read it.
            images.record_stream(torch.cuda.current_stream(images.device))
            targets.record_stream(torch.cuda.current_stream(images.device))
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        if self.config.run.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.learner.backward(images, targets, group)

    def _check_losses(self, losses: list[torch.Tensor], checked: int, total: float) -> tuple[int, float]:
        """Stops at the first loss that is NaN or infinite; empties the list.

        Args:
            losses: of the latest batches.
            checked: batches of this epoch before them, all fine.
            total: sum of their losses.

        Returns:
            `checked` and `total` with the latest batches.
        """
        for value in torch.stack(losses).tolist() if losses else ():
            if not math.isfinite(value):
                accum = self.config.optim.accum_steps
                step = self.epoch * build.updates_in(len(self.train_loader), accum) + checked // accum + 1
                self._stop(f"the loss became {value} at step {step} (epoch {self.epoch + 1}, batch {checked + 1})")
            checked, total = checked + 1, total + value
        losses.clear()
        return checked, total

    def _check_weights(self) -> None:
        """Stops where the last step of an epoch broke the weights, which no loss has shown yet."""
        if self.learner.broken_weights():
            self._stop(f"a weight is no longer finite after step {self.learner.updates} (epoch {self.epoch + 1})")

    def _stop(self, what: str) -> None:
        last = self.folder / LAST
        good = f"the last good checkpoint is {last} (epoch {self.epoch})"
        if not last.is_file():
            good = "the checkpoint that it was resumed from is good" if self.epoch else "no epoch was finished yet"
        raise NonFiniteError(f"stopped: {what}; {good}. A smaller optim.lr or optim.clip_grad may help.")

    def _validate_epoch(self, meter: report.Meter, row: report.Row) -> None:
        """Validates raw and averaged weights and notes the better one."""
        models = {"val": self.learner.forward}
        if self.learner.forward_ema is not None:
            models["ema"] = self.learner.forward_ema
        with meter.phase(self.epoch - 1, "validate", len(self.val_loader)) as phase:
            results = self._evaluate(models, phase)
        for name, result in results.items():
            row |= {f"{name}_{key}": result[key] for key in ("loss", "top1", "top5")}
            if self.best is None or result["top1"] > self.best["top1"]:
                label = "raw" if name == "val" else "EMA"
                self.best = {**result, "epoch": self.epoch, "weights": label}

    def _evaluate(self, models: dict[str, nn.Module], phase: report.Phase) -> dict[str, Result]:
        last = self.config.run.channels_last
        return evaluate(models, self.val_loader, self.device, self.amp, last, on_batch=phase.advance)

    def _save(self) -> None:
        """Checkpoint first, then the summary: what the summary tells can be resumed from."""
        state = {
            "arch": self.config.model.name,
            "config": self.config.to_dict(),
            "num_classes": self.num_classes,
            "classes": self.classes,
            "epoch": self.epoch,
            "best": self.best,
            "history": self.history,
            **self.learner.state(),
            "random": random_state(self.device),
            "versions": {"hydra_vision": __version__, "timm": timm.__version__, "torch": str(torch.__version__)},
        }
        save_checkpoint(self.folder, state, is_best=self.best is not None and self.best["epoch"] == self.epoch)
        report.write_summary(self.folder, self.history)

    def _restore(self, state: dict[str, Any]) -> None:
        """Takes over everything that a checkpoint holds."""
        self.learner.load_state(state, state["epoch"])
        self.epoch, self.history, self.best = state["epoch"], state["history"], state["best"]
        set_random_state(state["random"], self.device)

    def _announce(self) -> None:
        """What is about to happen, in a few lines."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        size = "x".join(map(str, self.input_size))
        amp = "float32" if self.amp is None else str(self.amp).removeprefix("torch.")
        images = [f"{len(loader.dataset):,}" for loader in (self.train_loader, self.val_loader)]
        start = f", from epoch {self.epoch}" if self.epoch else ""
        for line in (
            f"model   {self.config.model.name}, {parameters / 1e6:.2f} M parameters, input {size}",
            f"data    {images[0]} training and {images[1]} validation images, {self.num_classes} classes",
            f"run     {self.epochs} epochs{start} on {self.device}, {amp}",
            f"cost    {self.cost.describe(self.device)}",
            f"output  {self.folder}",
        ):
            self.console.print(line, highlight=False, soft_wrap=True)

    def _draw(self) -> None:
        if self.history:
            report.write_curve(self.folder, self.history, self.config.model.name)

    def _results(self) -> dict[str, Result]:
        """Prints and writes the final table."""
        results = {}
        for name, key in (("raw", "val"), ("EMA", "ema")):
            last = {metric: self.history[-1].get(f"{key}_{metric}") for metric in ("top1", "top5", "loss")}
            if last["top1"] is not None:
                results[f"{name}, last epoch"] = {**last, "images": self.best["images"]}
        if self.best is not None:
            label = f"best: {self.best['weights']}, epoch {self.best['epoch']}"
            results[label] = {key: self.best[key] for key in ("top1", "top5", "loss", "images")}
        rows = report.result_rows(results)
        for loader in (self.train_loader, self.val_loader):
            if getattr(loader.dataset, "unreadable", list)():
                self.console.print(f"warning: skipped {loader.dataset.report()}", highlight=False, soft_wrap=True)
        report.print_table(self.console, f"{self.config.model.name}, validation", report.RESULT_HEADER, rows)
        self.console.print(report.speed_line(self.history), highlight=False, soft_wrap=True)
        write_text(self.folder / "results.md", report.markdown_table(report.RESULT_HEADER, rows))
        files = ("curve.png", BEST, LAST, "summary.csv", "results.md", "config.yaml", RUN)
        files = ", ".join(file for file in files if (self.folder / file).is_file())
        self.console.print(f"{self.folder}: {files}", highlight=False, soft_wrap=True)
        return results

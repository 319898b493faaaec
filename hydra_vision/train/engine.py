"""The training loop, and the validation of a checkpoint."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from timm.utils import dispatch_clip_grad, random_seed
from torch import nn

from hydra_vision.eval.classification import Result, evaluate
from hydra_vision.train import build, data, report
from hydra_vision.train.checkpoint import BEST, LAST, random_state, save_checkpoint, set_random_state, write_text
from hydra_vision.train.config import Config
from hydra_vision.train.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    TrainError,
    first_line,
)
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
        self.ema = build.create_ema(config, self.model)
        self.train_loader = data.train_loader(config, train_split, self.num_classes, self.model, self.device)
        self.val_loader = data.val_loader(config, val_split, self.num_classes, self.model, self.device)
        self.mixup = data.create_mixup(config, self.num_classes)
        self.loss = build.create_loss(config).to(self.device)
        self.optimizer = build.create_optimizer(config, self.model)
        updates = build.updates_in(len(self.train_loader), config.optim.accum_steps)
        self.schedule, self.epochs = build.create_schedule(config, self.optimizer, updates)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)

        self.epoch = 0  # epochs done
        self.updates = 0  # optimizer steps done
        self.history: list[report.Row] = []
        self.best: dict[str, Any] | None = None
        if state is not None:
            self._restore(state)
        self.forward = compile_model(self.model, config)
        self.forward_ema = None if self.ema is None else compile_model(self.ema.module, config)

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
        return self._results()

    def _train_epoch(self, meter: report.Meter) -> report.Row:
        """One pass over the training set."""
        config, loader = self.config, self.train_loader
        data.start_epoch(config, loader, self.epoch)
        if self.mixup is not None and config.augment.mix_off_epoch is not None:
            self.mixup.mixup_enabled = self.epoch < config.augment.mix_off_epoch
        check_every = _CHECK_EVERY.get(self.device.type, 1)
        accum, total = config.optim.accum_steps, len(loader)
        losses: list[torch.Tensor] = []
        checked, loss_sum, pending = 0, 0.0, False
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with meter.phase(self.epoch, "train", total) as phase:
            for batch, (images, targets) in enumerate(loader):
                left = total - batch // accum * accum  # a streamed set may hold more batches than it told
                group = left if 0 < left < accum else accum  # batches of this update; fewer in the last one
                losses.append(self._backward(images, targets, group))
                pending = (batch + 1) % accum != 0 and batch + 1 != total
                if not pending:
                    self._update()
                if len(losses) == check_every:
                    checked, loss_sum = self._check_losses(losses, checked, loss_sum)
                phase.advance(len(images), loss_sum / checked if checked else None)
            if pending:  # ... or fewer
                self._update()
            checked, loss_sum = self._check_losses(losses, checked, loss_sum)
            rate, seconds = phase.rate(), phase.seconds()
        if checked == 0:
            raise DataError("the training loader gave no batch")
        self._check_weights()
        lr = self.optimizer.param_groups[-1]["lr"]
        self.epoch += 1
        if self.schedule is not None:
            self.schedule.step(self.epoch)
        return {
            **{"epoch": self.epoch, "updates": self.updates, "lr": lr, "train_loss": loss_sum / checked},
            **{"images_per_second": rate, "seconds": seconds},
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
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            loss = self.loss(self.forward(images), targets)
        self.scaler.scale(loss / group).backward()
        return loss.detach().float()

    def _update(self) -> None:
        """One optimizer step."""
        optim = self.config.optim
        if optim.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), optim.clip_grad, mode=optim.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.updates)
        if self.schedule is not None:
            self.schedule.step_update(self.updates)

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
        if not bool(torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all()):
            self._stop(f"a weight is no longer finite after step {self.updates} (epoch {self.epoch + 1})")

    def _stop(self, what: str) -> None:
        last = self.folder / LAST
        good = f"the last good checkpoint is {last} (epoch {self.epoch})"
        if not last.is_file():
            good = "the checkpoint that it was resumed from is good" if self.epoch else "no epoch was finished yet"
        raise NonFiniteError(f"stopped: {what}; {good}. A smaller optim.lr or optim.clip_grad may help.")

    def _validate_epoch(self, meter: report.Meter, row: report.Row) -> None:
        """Validates raw and averaged weights and notes the better one."""
        models = {"val": self.forward}
        if self.forward_ema is not None:
            models["ema"] = self.forward_ema
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
            "updates": self.updates,
            "best": self.best,
            "history": self.history,
            "state_dict": self.model.state_dict(),
            "state_dict_ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_state(self.device),
            "versions": {"hydra_vision": __version__, "timm": timm.__version__, "torch": str(torch.__version__)},
        }
        save_checkpoint(self.folder, state, is_best=self.best is not None and self.best["epoch"] == self.epoch)
        report.write_summary(self.folder, self.history)

    def _restore(self, state: dict[str, Any]) -> None:
        """Takes over everything that a checkpoint holds; the schedule follows from the counters."""
        settings = [{key: group[key] for key in group if key != "params"} for group in self.optimizer.param_groups]
        try:
            self.model.load_state_dict(state["state_dict"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["state_dict_ema"] or state["state_dict"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"the checkpoint does not fit {self.config.model.name}: {error}") from error
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)  # a setting that was changed on purpose holds, also after a resume
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.updates = state["epoch"], state["updates"]
        self.history, self.best = state["history"], state["best"]
        if self.schedule is not None:
            self.schedule.step(self.epoch)
            self.schedule.step_update(self.updates)
        set_random_state(state["random"], self.device)

    def _announce(self) -> None:
        """What is about to happen, in a few lines."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        size = "x".join(str(side) for side in data.resolve_input(self.config, self.model)["input_size"])
        amp = "float32" if self.amp is None else str(self.amp).removeprefix("torch.")
        images = [f"{len(loader.dataset):,}" for loader in (self.train_loader, self.val_loader)]
        start = f", from epoch {self.epoch}" if self.epoch else ""
        for line in (
            f"model   {self.config.model.name}, {parameters / 1e6:.2f} M parameters, input {size}",
            f"data    {images[0]} training and {images[1]} validation images, {self.num_classes} classes",
            f"run     {self.epochs} epochs{start} on {self.device}, {amp}",
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
        write_text(self.folder / "results.md", report.markdown_table(report.RESULT_HEADER, rows))
        files = ("curve.png", BEST, LAST, "summary.csv", "results.md", "config.yaml")
        files = ", ".join(file for file in files if (self.folder / file).is_file())
        self.console.print(f"{self.folder}: {files}", highlight=False, soft_wrap=True)
        return results


def validate(config: Config, state: dict[str, Any], console: Console) -> dict[str, Result]:
    """Evaluates the raw and the averaged weights of a checkpoint on the validation split of `config`.

    Raises:
        CheckpointError: weights that do not fit the model of `config`.
    """
    device = build.pick_device(config)
    amp = build.amp_dtype(config, device)
    configure_torch(config, device)
    _, split = data.open_splits(config, train=False)
    if split.classes is not None and len(split.classes) != state["num_classes"]:
        raise DataError(f"{split.name} has {len(split.classes)} classes; the checkpoint has {state['num_classes']}")
    models = {}
    for name, key in (("raw", "state_dict"), ("EMA", "state_dict_ema")):
        if state[key] is None:
            continue
        model = build.create_model(config, state["num_classes"], load_weights=False)
        try:
            model.load_state_dict(state[key])
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint does not fit {config.model.name}: {error}") from error
        build.check_backend(model, device)
        models[name] = compile_model(place_model(model, config, device), config)
    loader = data.val_loader(config, split, state["num_classes"], next(iter(models.values())), device)
    meter = report.Meter(console, state["epoch"], len(loader), 0)
    with meter.bar, meter.phase(state["epoch"] - 1, "validate", len(loader)) as phase:
        results = evaluate(models, loader, device, amp, config.run.channels_last, on_batch=phase.advance)
    if getattr(loader.dataset, "unreadable", list)():
        console.print(f"warning: skipped {loader.dataset.report()}", highlight=False, soft_wrap=True)
    return results


def configure_torch(config: Config, device: torch.device) -> None:
    """Threads, and TF32 for float32 products on CUDA, as the recipe says."""
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.run.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.run.tf32


def place_model(model: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """The model on its device, in the memory format of the recipe."""
    return model.to(device=device, memory_format=torch.channels_last if config.run.channels_last else None)


def compile_model(model: nn.Module, config: Config) -> nn.Module:
    """The compiled model (sharing its weights), or the model itself.

    Raises:
        ConfigError: an unknown mode.
    """
    if not config.run.torch_compile:
        return model
    try:
        return torch.compile(model, mode=config.run.compile_mode)
    except RuntimeError as error:
        raise ConfigError(f"run.compile_mode={config.run.compile_mode!r} is not valid: {first_line(error)}") from error

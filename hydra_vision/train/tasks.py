"""timm training tasks of a recipe: the model with its loss, and a teacher where the recipe distills."""

from typing import Any

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import get_pretrained_cfg
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import nn

from ..errors import ConfigError, first_line, nearest
from . import build
from .config import Config
from .data import resolve_input


def create_task(config: Config, model: nn.Module, device: torch.device) -> TrainingTask:
    """timm's training task: images and targets to `{"loss": ..., "output": ...}`.

    With a teacher, the loss is `task_weight * loss + (1 - task_weight) * T^2 * KL(teacher || student)`.

    Args:
        config: The recipe.
        model: The model to train, on its device.
        device: Where it computes.

    Raises:
        ConfigError, CheckpointError: The teacher cannot be built.
    """
    loss = create_loss(config).to(device)
    if config.distill.teacher is None:
        return ClassificationTask(model, loss, device=device, verbose=False)
    task = LogitDistillationTask(
        model,
        create_teacher(config, model.num_classes, device),
        criterion=loss,
        task_loss_weight=config.distill.task_weight,
        temperature=config.distill.temperature,
        device=device,
        verbose=False,
    )
    inputs = resolve_input(config, model)  # what the loader normalizes with, which need not be the model's own
    _set(task.student_mean, inputs['mean'])
    _set(task.student_std, inputs['std'])
    if config.distill.checkpoint is not None:  # trained on the same data by the same recipe, as a rule
        _set(task.teacher.mean_kd, inputs['mean'])
        _set(task.teacher.std_kd, inputs['std'])
    return task


def create_loss(config: Config) -> nn.Module:
    """Training loss: soft targets where batches are mixed (the mixing smooths them), else smoothed or plain labels."""
    if config.augment.mixes:
        loss: nn.Module = SoftTargetCrossEntropy()
    elif config.augment.smoothing:
        loss = LabelSmoothingCrossEntropy(config.augment.smoothing)
    else:
        loss = nn.CrossEntropyLoss()
    return ZLoss(loss, config.optim.z_loss) if config.optim.z_loss else loss


class ZLoss(nn.Module):
    """Adds `weight * mean(logsumexp(logits) ** 2)` to a loss: keeps logits from drifting (PaLM, arXiv 2204.02311).

    Args:
        loss: Of logits (B, classes) and targets.
        weight: Of the added term; 1e-4 in PaLM.
    """

    def __init__(self, loss: nn.Module, weight: float):
        super().__init__()
        self.loss, self.weight = loss, weight

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss(logits, targets) + self.weight * logits.float().logsumexp(dim=-1).square().mean()


def create_teacher(config: Config, num_classes: int, device: torch.device) -> nn.Module:
    """The frozen teacher, on the device.

    Raises:
        ConfigError: A teacher that cannot be built, or whose head has other classes.
        CheckpointError: Weights that cannot be read or do not fit.
    """
    distill = config.distill
    if ':' not in distill.teacher and not timm.is_model(distill.teacher):
        raise ConfigError(f'unknown distill.teacher={distill.teacher!r}{nearest(distill.teacher, timm.list_models())}')
    section = {'name': distill.teacher, 'checkpoint': distill.checkpoint, 'kwargs': distill.kwargs}
    section |= {'pretrained': distill.checkpoint is None, 'drop_rate': 0.0, 'drop_path_rate': 0.0}
    section |= {'freeze_backbone': False}
    values = config.to_dict()
    values |= {'model': {**values['model'], **section}, 'distill': {}}
    teacher_config = Config.from_dict(values, source='distill')
    if distill.checkpoint is None:
        cfg = None if ':' in distill.teacher else get_pretrained_cfg(distill.teacher)
        if cfg is not None and not cfg.has_weights:
            raise ConfigError(f'distill.teacher={distill.teacher!r} has no published weights; set distill.checkpoint')
        if cfg is not None and cfg.num_classes != num_classes:
            raise ConfigError(
                f'distill.teacher={distill.teacher!r} was trained for {cfg.num_classes} classes, the data has '
                f'{num_classes}; set distill.checkpoint to weights for these classes'
            )
    elif (classes := build.classes_in(distill.checkpoint, distill.teacher)) != num_classes:
        raise ConfigError(
            f'distill.checkpoint={distill.checkpoint!r} has {classes} classes, the data has {num_classes}'
        )
    try:
        teacher = build.create_model(teacher_config, num_classes)
    except OSError as error:  # no network
        raise ConfigError(
            f'cannot load the weights of distill.teacher={distill.teacher!r}: {first_line(error)}'
        ) from error
    build.check_backend(teacher, device)
    return teacher.to(device).eval().requires_grad_(False)


def _set(buffer: torch.Tensor, values: Any) -> None:
    buffer.copy_(torch.tensor(values, dtype=buffer.dtype).view(1, -1, 1, 1))

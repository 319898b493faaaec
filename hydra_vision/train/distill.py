"""Knowledge distillation: timm's task with a teacher of a recipe, section `distill`."""

from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from hydra_vision.errors import ConfigError, first_line, nearest
from hydra_vision.train import build, data
from hydra_vision.train.config import Config

try:
    from timm.task import LogitDistillationTask
except ImportError:  # told where it is asked for
    LogitDistillationTask = None


def create_teacher(config: Config, num_classes: int, device: torch.device) -> nn.Module:
    """The frozen teacher, on the device.

    Raises:
        ConfigError: a teacher that cannot be built, or whose head knows other classes.
        CheckpointError: weights that cannot be read or do not fit.
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
                f'{num_classes}; set distill.checkpoint to weights that know these classes'
            )
    elif build.classes_in(distill.checkpoint, distill.teacher) != num_classes:
        raise ConfigError(
            f'distill.checkpoint={distill.checkpoint!r} has {build.classes_in(distill.checkpoint, distill.teacher)} '
            f'classes, the data has {num_classes}'
        )
    try:
        teacher = build.create_model(teacher_config, num_classes)
    except OSError as error:  # no network
        raise ConfigError(f'cannot load the weights of distill.teacher={distill.teacher!r}: {first_line(error)}') from (
            error
        )
    build.check_backend(teacher, device)
    return teacher.to(device).eval().requires_grad_(False)


def create_distillation(config: Config, model: nn.Module, loss: nn.Module, device: torch.device) -> nn.Module:
    """timm's logit distillation: `task_weight * loss + (1 - task_weight) * T^2 * KL(teacher || student)`.

    Args:
        config: the recipe.
        model: the student, on its device.
        loss: of labels.
        device: where both compute.

    Raises:
        ConfigError: this timm has no such task, or the teacher cannot be built.
    """
    if LogitDistillationTask is None:
        raise ConfigError('distill.teacher needs timm.task.LogitDistillationTask, which this timm does not have')
    teacher = create_teacher(config, model.num_classes, device)
    task = _Distillation(
        model,
        teacher,
        criterion=loss,
        task_loss_weight=config.distill.task_weight,
        temperature=config.distill.temperature,
        device=device,
        verbose=False,
    )
    inputs = data.resolve_input(config, model)  # what the loader normalises with, which need not be the model's own
    _set(task.student_mean, inputs['mean'])
    _set(task.student_std, inputs['std'])
    if config.distill.checkpoint is not None:  # trained on the same data by the same recipe, as a rule
        _set(task.teacher.mean_kd, inputs['mean'])
        _set(task.teacher.std_kd, inputs['std'])
    return task


if LogitDistillationTask is not None:

    class _Distillation(LogitDistillationTask):
        def train(self, mode: bool = True) -> '_Distillation':
            """Leaves the teacher in evaluation mode, as timm 1.0.29 does not."""
            super().train(mode)
            self.teacher.eval()
            return self


def _set(buffer: torch.Tensor, values: Any) -> None:
    buffer.copy_(torch.tensor(values, dtype=buffer.dtype).view(1, -1, 1, 1))

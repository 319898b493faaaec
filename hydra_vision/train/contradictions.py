"""Values of a recipe that are each valid but contradict each other, or would be ignored beside others."""

import dataclasses
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING

from hydra_vision.errors import ConfigError
from hydra_vision.train.fields import DistillConfig

if TYPE_CHECKING:
    from hydra_vision.train.config import Config

Refuse = Callable[[str], typing.NoReturn]


def check_together(config: 'Config', source: str) -> None:
    """Refuses values that are each valid but contradict each other."""

    def refuse(text: str) -> typing.NoReturn:
        raise ConfigError(f'{source}: {text}')

    schedule, optim, augment = config.schedule, config.optim, config.augment
    if schedule.warmup_epochs >= schedule.epochs > 0 and schedule.warmup_epochs > 0:
        refuse(
            f'schedule.warmup_epochs={schedule.warmup_epochs} must be smaller than schedule.epochs='
            f'{schedule.epochs} (add --set schedule.warmup_epochs=0 for a short run)'
        )
    if schedule.name == 'none' and optim.layer_decay is not None:
        refuse("optim.layer_decay is applied by the scheduler: schedule.name='none' would ignore it")
    if schedule.name == 'none' and schedule.warmup_epochs:
        refuse(f"schedule.warmup_epochs={schedule.warmup_epochs} needs a schedule; schedule.name is 'none'")
    if config.mixes and config.data.batch_size % 2:
        refuse(f'data.batch_size={config.data.batch_size} must be even where mixup or cutmix is on')
    if augment.auto_augment and augment.color_jitter:
        refuse(
            f'augment.color_jitter={augment.color_jitter} has no effect beside augment.auto_augment='
            f'{augment.auto_augment!r}; set one of them to 0 or null'
        )
    _check_data(config, refuse)
    for key in ('scale', 'ratio'):
        first, second = getattr(augment, key)
        if first > second:
            refuse(f'augment.{key}={[first, second]} must be [smallest, largest]')
    for key in ('mean', 'std'):
        value = getattr(config.data, key)
        if value is not None and len(value) not in (1, config.model.in_chans):
            refuse(f'data.{key} has {len(value)} values; allowed: 1, or model.in_chans={config.model.in_chans}')
    if config.model.pretrained and config.model.checkpoint:
        refuse('model.pretrained and model.checkpoint both name the initial weights; set one of them')
    if config.distributed.strategy == 'fsdp' and optim.clip_grad is not None and optim.clip_mode == 'agc':
        refuse("optim.clip_mode='agc' needs whole weights; distributed.strategy='fsdp' shards them")
    _check_fine_tuning(config, refuse)
    if config.distributed.strategy == 'fsdp' and config.distributed.gradients != 'fp32':
        refuse("distributed.gradients='bf16' belongs to distributed.strategy='ddp'")
    if config.ema.warmup and config.ema.decay is None:
        refuse('ema.warmup=true needs ema.decay')
    if config.run.compile_mode is not None and not config.run.torch_compile:
        refuse('run.compile_mode needs run.torch_compile=true')


def _check_fine_tuning(config: 'Config', refuse: Refuse) -> None:
    """Refuses settings of teacher, probe and sizes that would be ignored."""
    distill, sizes = config.distill, config.data.progressive_sizes
    if distill.teacher is None:
        defaults = DistillConfig()
        for field in dataclasses.fields(DistillConfig):
            if getattr(distill, field.name) != getattr(defaults, field.name):
                refuse(f'distill.{field.name} has no effect without distill.teacher')
    if config.model.freeze_backbone and config.optim.layer_decay is not None:
        refuse('optim.layer_decay has no effect beside model.freeze_backbone: only the classifier learns')
    if sizes is not None:
        if config.data.img_size is None or sizes[-1] != config.data.img_size:
            refuse(f'data.progressive_sizes={list(sizes)} must end with data.img_size={config.data.img_size}')
        if len(sizes) > config.schedule.epochs > 0:
            refuse(f'data.progressive_sizes has {len(sizes)} sizes for schedule.epochs={config.schedule.epochs}')


def _check_data(config: 'Config', refuse: Refuse) -> None:
    """Refuses data settings that the chosen reader would ignore."""
    data = config.data
    prefix = data.name.split('/')[0].lower()
    streamed, folder, digits = prefix in ('hfids', 'tfds', 'wds'), prefix == '', data.name == 'sklearn/digits'
    synthetic = data.name == 'synthetic'
    if prefix not in ('', 'parquet', 'hfds', 'hfids', 'tfds', 'wds', 'torch', 'sklearn') and not synthetic:
        refuse(  # timm would read data.dir as a folder, whatever the name
            f"data.name={data.name!r} is not valid; allowed: '' (folder or .tar), parquet, hfds/..., hfids/..., "
            'tfds/..., wds/, torch/..., sklearn/digits, synthetic'
        )
    ignored = []
    ignored += ['dir'] if (digits or synthetic) and data.dir is not None else []
    ignored += ['class_map'] if (digits or synthetic or prefix == 'torch') and data.class_map is not None else []
    ignored += ['cache'] if data.cache != 'none' and (streamed or synthetic) else []
    local = folder or digits or synthetic or prefix in ('parquet', 'wds')
    ignored += ['download'] if data.download and local else []
    for key in ('train_samples', 'val_samples'):
        ignored += [key] if getattr(data, key) is not None and not (streamed or synthetic) else []
    for key in ('input_key', 'target_key'):
        columns = prefix not in ('', 'torch', 'sklearn', 'synthetic')
        ignored += [key] if getattr(data, key) is not None and not columns else []
    if ignored:
        refuse(f'data.{ignored[0]} has no effect for data.name={data.name!r}; leave it out')
    if prefix == 'sklearn' and not digits:
        refuse(f"data.name={data.name!r} is not valid; the only scikit-learn set is 'sklearn/digits'")
    if config.model.in_chans not in (1, 3):
        refuse(f'model.in_chans={config.model.in_chans} is not valid; the image readers give 1 or 3 channels')
    owned = {
        'img_size': 'data.img_size',
        **{key: f'model.{key}' for key in ('num_classes', 'in_chans', 'drop_rate', 'drop_path_rate', 'pretrained')},
        'checkpoint_path': 'model.checkpoint',
    }
    for key in config.model.kwargs:
        if key in owned:
            refuse(f'model.kwargs.{key} is set by {owned[key]}')

"""Recipes: every field with its type, default, limits and meaning, and how recipes are read, merged and checked.

A recipe is built from layers of plain nested dictionaries (a file, its base, overrides), merged and then checked as a
whole by `Config.from_dict`, so that a wrong key, type or value ends the run before any work is done. Rules between the
fields of a section are in the section's `__post_init__`, rules between sections in that of `Config`.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import ConfigError, nearest

DIGITS, PARQUET, SYNTHETIC = 'sklearn/digits', 'parquet', 'synthetic'
_STREAMED = ('hfids', 'tfds', 'wds')


def _metadata(text: str, ge: float | None = None, gt: float | None = None, le: float | None = None) -> dict[str, Any]:
    """Metadata of a field: its meaning and its limits (`ge <= value <= le`, `value > gt`)."""
    return {'text': text, 'ge': ge, 'gt': gt, 'le': le}


def _field(default: Any, text: str, **limits: float) -> Any:
    """A dataclass field with its meaning and limits."""
    return dataclasses.field(default=default, metadata=_metadata(text, **limits))


@dataclasses.dataclass
class ModelConfig:
    """The model and its initial weights."""

    name: str = _field('hydra_vit_nano', 'any timm model name, including the Hydra-ViT family')
    num_classes: int | None = _field(None, 'number of classes; null: as many as the training set has', ge=1)
    in_chans: int = _field(3, 'image channels; 1 reads the images as grayscale', ge=1)
    drop_rate: float = _field(0.0, 'dropout before the head', ge=0, le=1)
    drop_path_rate: float = _field(0.0, 'stochastic depth', ge=0, le=1)
    pretrained: bool = _field(False, 'start from the published weights of this model')
    checkpoint: str | None = _field(None, 'start from the weights in this file (a new head where the classes differ)')
    freeze_backbone: bool = _field(False, 'linear probe: train the classifier only, the rest stays in evaluation mode')
    kwargs: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata=_metadata('further arguments of timm.create_model, e.g. {patch_size: 4}')
    )

    def __post_init__(self) -> None:
        if self.pretrained and self.checkpoint:
            raise ConfigError('model.pretrained and model.checkpoint both name the initial weights; set one of them')
        if self.in_chans not in (1, 3):
            raise ConfigError(f'model.in_chans={self.in_chans} is not valid; the image readers give 1 or 3 channels')
        owners = {'img_size': 'data.img_size', 'checkpoint_path': 'model.checkpoint'}
        owned = ('num_classes', 'in_chans', 'drop_rate', 'drop_path_rate', 'pretrained')
        owners |= {key: f'model.{key}' for key in owned}
        for key in self.kwargs:
            if key in owners:
                raise ConfigError(f'model.kwargs.{key} is set by {owners[key]}')


@dataclasses.dataclass
class DataConfig:
    """Data sets and how their images are read."""

    name: str = _field(
        '',
        "'' (folder or .tar), parquet, hfds/..., hfids/..., tfds/..., wds/, torch/..., sklearn/digits, synthetic",
    )
    dir: str | None = _field(None, 'folder of the data set with train/ and val/ (or train.tar and val.tar)')
    train_split: str = _field('train', 'name of the training split')
    val_split: str = _field('validation', 'name of the validation split; val/ and validation/ are equivalent')
    class_map: str | None = _field(None, 'text file with one class name per line, in index order')
    download: bool = _field(False, "let the data set's own reader download it, where it can")
    train_samples: int | None = _field(None, 'images in the training split; for streamed and synthetic sets', ge=1)
    val_samples: int | None = _field(None, 'images in the validation split; for streamed and synthetic sets', ge=1)
    input_key: str | None = _field(None, 'column of the image, for readers that have columns (null: their default)')
    target_key: str | None = _field(None, 'column of the label, for readers that have columns (null: their default)')
    img_size: int | tuple[int, int] | None = _field(None, "pixels, or [height, width]; null: the model's own", ge=1)
    progressive_sizes: tuple[int, ...] | None = _field(
        None, 'sizes of the training images, one per equal part of the epochs; the last one is img_size', ge=1
    )
    naflex_seq_len: int | None = _field(
        None,
        "patches an image, padding included; images keep their aspect ratio (timm's NaFlex); null: img_size",
        ge=1,
    )
    batch_size: int = _field(
        128, 'images per batch over all processes; an optimizer step takes accum_steps batches', ge=1
    )
    val_batch_size: int | None = _field(
        None, 'validation images per batch and process; null: the share of batch_size', ge=1
    )
    workers: int | None = _field(None, 'loader processes; null: one per CPU core, 16 at most', ge=0)
    max_unreadable: int = _field(10, 'unreadable images of a split that a process skips before the run ends', ge=0)
    unusual_images: Literal['convert', 'unreadable'] = _field(
        'convert', 'CMYK, 16-bit, palette, transparent, animated (first frame): convert, or count as unreadable'
    )
    exif_rotation: bool = _field(False, 'rotate images by their EXIF tag (timm and torchvision do not)')
    cache: Literal['none', 'ram'] = _field('none', 'ram: decode every image once at the start, for small sets')
    mean: tuple[float, ...] | None = _field(None, "channel means in 0..1; null: the model's own")
    std: tuple[float, ...] | None = _field(None, "channel standard deviations; null: the model's own", gt=0)
    interpolation: str | None = _field(None, "resizing for validation; null: the model's own")
    crop_pct: float | None = _field(None, "validation crop; null: the model's own", gt=0, le=1)
    crop_mode: Literal['center', 'squash', 'border'] | None = _field(None, "validation crop; null: the model's own")

    @property
    def reader(self) -> str:
        """Which reader `name` selects: its first part."""
        return self.name.split('/')[0].lower()

    @property
    def streamed(self) -> bool:
        """Whether the reader has no random access."""
        return self.reader in _STREAMED

    def __post_init__(self) -> None:
        reader, digits, synthetic = self.reader, self.name == DIGITS, self.name == SYNTHETIC
        if not synthetic and reader not in ('', PARQUET, 'hfds', 'torch', 'sklearn', *_STREAMED):
            raise ConfigError(  # timm would read data.dir as a folder, whatever the name
                f"data.name={self.name!r} is not valid; allowed: '' (folder or .tar), parquet, hfds/..., hfids/..., "
                'tfds/..., wds/, torch/..., sklearn/digits, synthetic'
            )
        samples = self.streamed or synthetic
        columns = reader not in ('', 'torch', 'sklearn', SYNTHETIC)
        applies = {
            'dir': not (digits or synthetic),
            'class_map': not (digits or synthetic or reader == 'torch'),
            'cache': not samples,
            'download': not (digits or synthetic or reader in ('', PARQUET, 'wds')),
            **{'train_samples': samples, 'val_samples': samples, 'input_key': columns, 'target_key': columns},
        }
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for key, used in applies.items():
            if not used and getattr(self, key) != defaults[key]:
                raise ConfigError(f'data.{key} has no effect for data.name={self.name!r}; leave it out')
        if reader == 'sklearn' and not digits:
            raise ConfigError(f"data.name={self.name!r} is not valid; the only scikit-learn set is 'sklearn/digits'")
        sizes = self.progressive_sizes
        if sizes is not None and (self.img_size is None or sizes[-1] != self.img_size):
            raise ConfigError(f'data.progressive_sizes={list(sizes)} must end with data.img_size={self.img_size}')


@dataclasses.dataclass
class AugmentConfig:
    """Training transforms; the names are timm's."""

    crop_mode: Literal['rrc', 'rkrc', 'rkrr'] = _field('rrc', 'rrc: random resized crop; rkr*: keep the aspect ratio')
    scale: tuple[float, float] = _field((0.08, 1.0), 'share of the area that a random crop covers', gt=0)
    ratio: tuple[float, float] = _field((0.75, 4 / 3), 'aspect ratio of a random crop', gt=0)
    interpolation: str = _field('random', 'random, bilinear or bicubic')
    hflip: float = _field(0.5, 'probability of a horizontal flip', ge=0, le=1)
    repeats: int = _field(1, 'repeated augmentation: copies per image in an epoch of 1 / repeats of the images', ge=1)
    vflip: float = _field(0.0, 'probability of a vertical flip', ge=0, le=1)
    color_jitter: float = _field(0.0, 'strength of the jitter; must be 0 together with auto_augment', ge=0)
    auto_augment: str | None = _field(None, 'RandAugment or AutoAugment as timm writes it, e.g. rand-m9-mstd0.5-inc1')
    erase_prob: float = _field(0.0, 'random erasing: probability', ge=0, le=1)
    erase_mode: Literal['const', 'rand', 'pixel'] = _field('pixel', 'random erasing: what fills the region')
    erase_count: int = _field(1, 'random erasing: regions per image', ge=1)
    mixup: float = _field(0.0, 'mixup alpha, 0 = off', ge=0)
    cutmix: float = _field(0.0, 'CutMix alpha, 0 = off', ge=0)
    mix_prob: float = _field(1.0, 'probability that a batch is mixed', ge=0, le=1)
    mix_switch_prob: float = _field(0.5, 'share of CutMix where mixup is on as well', ge=0, le=1)
    mix_mode: Literal['batch', 'pair', 'elem'] = _field('batch', 'one draw per batch, pair or image')
    mix_off_epoch: int | None = _field(None, 'epoch from which batches are no longer mixed', ge=0)
    smoothing: float = _field(0.0, 'label smoothing', ge=0, le=1)

    @property
    def mixes(self) -> bool:
        """Whether training batches are mixed (mixup or CutMix)."""
        return self.mixup > 0 or self.cutmix > 0

    def __post_init__(self) -> None:
        if self.auto_augment and self.color_jitter:
            raise ConfigError(
                f'augment.color_jitter={self.color_jitter} has no effect with augment.auto_augment='
                f'{self.auto_augment!r}; set one of them to 0 or null'
            )
        for key in ('scale', 'ratio'):
            first, second = getattr(self, key)
            if first > second:
                raise ConfigError(f'augment.{key}={[first, second]} must be [smallest, largest]')


@dataclasses.dataclass
class OptimConfig:
    """The optimizer."""

    name: str = _field('adamw', 'any timm optimizer name')
    lr: float = _field(1e-3, 'learning rate after warmup', gt=0)
    lr_batch_size: int | None = _field(
        None, 'reference images per optimizer step for linear learning-rate scaling; null disables scaling', ge=1
    )
    weight_decay: float = _field(0.05, "for matrices; not for biases, norms and the model's own list", ge=0)
    betas: tuple[float, float] | None = _field(None, "null: the optimizer's own", ge=0, le=1)
    eps: float | None = _field(None, "null: the optimizer's own", gt=0)
    layer_decay: float | None = _field(None, 'learning-rate factor from each layer to the one below it', gt=0, le=1)
    clip_grad: float | None = _field(None, 'gradient clipping, null = off', gt=0)
    clip_mode: Literal['norm', 'value', 'agc'] = _field('norm', 'what clip_grad limits')
    accum_steps: int = _field(1, 'gradient accumulation: batches per optimizer step', ge=1)
    z_loss: float = _field(0.0, 'weight of the mean squared logsumexp of the logits in the loss', ge=0)
    skip_nonfinite: int = _field(
        0, 'steps with a NaN or infinite gradient to skip before the run ends; synchronizes with the device', ge=0
    )
    kwargs: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata=_metadata('further arguments of the optimizer, e.g. {momentum: 0.9}')
    )


@dataclasses.dataclass
class ScheduleConfig:
    """The learning rate over time."""

    name: Literal['cosine', 'tanh', 'poly', 'step', 'multistep', 'none'] = _field('cosine', 'timm scheduler')
    epochs: int = _field(100, 'length of the schedule, warmup included; 0 only with --validate', ge=0)
    warmup_epochs: int = _field(0, 'epochs of linear warmup', ge=0)
    warmup_lr: float = _field(1e-6, 'learning rate at the start of the warmup', ge=0)
    min_lr: float = _field(0.0, 'learning rate at the end', ge=0)
    cooldown_epochs: int = _field(0, 'epochs at min_lr after the schedule', ge=0)
    per_update: bool = _field(True, 'change the learning rate at every optimizer step, not only at every epoch')
    kwargs: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata=_metadata("further arguments of timm's scheduler, e.g. {decay_epochs: 30}")
    )

    def __post_init__(self) -> None:
        if self.warmup_epochs >= self.epochs > 0 and self.warmup_epochs > 0:
            raise ConfigError(
                f'schedule.warmup_epochs={self.warmup_epochs} must be smaller than schedule.epochs={self.epochs} '
                f'(add --set schedule.warmup_epochs=0 for a short run)'
            )
        if self.name == 'none' and self.warmup_epochs:
            raise ConfigError(f"schedule.warmup_epochs={self.warmup_epochs} needs a schedule; schedule.name is 'none'")


@dataclasses.dataclass
class EmaConfig:
    """Exponential moving average of the weights."""

    decay: float | None = _field(None, 'null = off', gt=0, le=1)
    warmup: bool = _field(False, 'smaller decay at first, for short runs')

    def __post_init__(self) -> None:
        if self.warmup and self.decay is None:
            raise ConfigError('ema.warmup=true needs ema.decay')


@dataclasses.dataclass
class DistillConfig:
    """Knowledge distillation; off without a teacher."""

    teacher: str | None = _field(None, "any timm model name; the teacher's input is the student's")
    checkpoint: str | None = _field(
        None, "the teacher's weights, trained with the data.mean and std of this recipe; null: its published ones"
    )
    kwargs: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata=_metadata('further arguments of timm.create_model for the teacher')
    )
    task_weight: float = _field(0.5, 'weight of the loss of the labels; the rest is the distillation loss', ge=0, le=1)
    temperature: float = _field(1.0, 'softens both distributions', gt=0)

    def __post_init__(self) -> None:
        if self.teacher is None:
            for field in dataclasses.fields(self):
                default = {} if field.default is dataclasses.MISSING else field.default
                if getattr(self, field.name) != default:
                    raise ConfigError(f'distill.{field.name} has no effect without distill.teacher')


@dataclasses.dataclass
class RunConfig:
    """How it is computed; none of these should change what is learned."""

    seed: int = _field(0, 'seed of weights, order and augmentation', ge=0)
    device: str = _field('auto', 'auto, cpu, cuda, cuda:1, ...')
    threads: int | None = _field(None, "CPU threads per operation; null: PyTorch's own choice", ge=1)
    amp: Literal['auto', 'none', 'bf16', 'fp16'] = _field('auto', 'auto: bf16 on CUDA, none elsewhere')
    tf32: bool = _field(True, 'TF32 for what stays float32 on CUDA')
    cudnn_attention: bool | None = _field(
        None, "cuDNN's attention on CUDA; null: PyTorch's choice, except where its gradients are known to be NaN"
    )
    channels_last: bool = _field(False, 'NHWC memory format of images and convolutions')
    torch_compile: bool = _field(False, 'compile the model')
    compile_mode: str | None = _field(None, 'mode of torch.compile, e.g. max-autotune')
    grad_checkpointing: bool = _field(False, 'recompute activations in the backward pass to save memory')
    validate_every: int = _field(1, 'epochs between validations; the last epoch is always validated', ge=1)

    def __post_init__(self) -> None:
        if self.compile_mode is not None and not self.torch_compile:
            raise ConfigError('run.compile_mode needs run.torch_compile=true')


@dataclasses.dataclass
class CheckpointConfig:
    """Checkpoints inside an epoch (one is always written at its end), and checkpoint retention."""

    every_steps: int | None = _field(None, 'optimizer steps between checkpoints inside an epoch; null: none', ge=1)
    every_minutes: float | None = _field(None, 'minutes between checkpoints inside an epoch; null: none', gt=0)
    keep_last: int = _field(2, 'newest checkpoints to keep', ge=1)
    keep_best: int = _field(1, 'checkpoints of the best epochs to keep as well', ge=1)


@dataclasses.dataclass
class LogConfig:
    """Metrics inside an epoch: steps.csv, mixers.csv, TensorBoard, Weights & Biases."""

    every: int = _field(50, 'optimizer steps between rows; 0: none', ge=0)
    mixers: bool = _field(True, 'step sizes and decays of every Hydra layer')
    tensorboard: bool = _field(False, 'also write event files for TensorBoard into RUN/tensorboard')
    wandb: Literal['off', 'offline', 'online'] = _field('off', 'also log to Weights & Biases; offline: into RUN/wandb')
    wandb_project: str = _field('hydra_vision', 'project at Weights & Biases')
    mixer_images: int = _field(16, 'images that log.mixers measures, in an extra forward pass', ge=1)


@dataclasses.dataclass
class DistributedConfig:
    """Several processes, started by torchrun."""

    strategy: Literal['ddp', 'fsdp'] = _field('ddp', 'ddp: replicate the model; fsdp: shard it (FSDP2)')
    gradients: Literal['fp32', 'bf16'] = _field('fp32', 'ddp: precision of the gradient all-reduce')

    def __post_init__(self) -> None:
        if self.strategy == 'fsdp' and self.gradients != 'fp32':
            raise ConfigError("distributed.gradients='bf16' belongs to distributed.strategy='ddp'")


@dataclasses.dataclass
class Config:
    """A whole recipe."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    ema: EmaConfig = dataclasses.field(default_factory=EmaConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        data, optim, schedule = self.data, self.optim, self.schedule
        if schedule.name == 'none' and optim.layer_decay is not None:
            raise ConfigError("optim.layer_decay is applied by the scheduler: schedule.name='none' would ignore it")
        if self.augment.mixes and data.batch_size % 2:
            raise ConfigError(f'data.batch_size={data.batch_size} must be even where mixup or cutmix is on')
        for key in ('mean', 'std'):
            value = getattr(data, key)
            if value is not None and len(value) not in (1, self.model.in_chans):
                raise ConfigError(
                    f'data.{key} has {len(value)} values; allowed: 1, or model.in_chans={self.model.in_chans}'
                )
        if self.distributed.strategy == 'fsdp' and optim.clip_grad is not None and optim.clip_mode == 'agc':
            raise ConfigError("optim.clip_mode='agc' needs whole weights; distributed.strategy='fsdp' shards them")
        if self.model.freeze_backbone and optim.layer_decay is not None:
            raise ConfigError('optim.layer_decay has no effect with model.freeze_backbone: only the classifier learns')
        if data.naflex_seq_len is not None:
            for key, used in (
                ('data.progressive_sizes', data.progressive_sizes is not None),
                (f'data.name={SYNTHETIC!r}', data.name == SYNTHETIC),
                ('augment.mixup and augment.cutmix', self.augment.mixes),
                (f'augment.crop_mode={self.augment.crop_mode!r}', self.augment.crop_mode != 'rrc'),
                ('run.channels_last', self.run.channels_last),
                ('distill.teacher', self.distill.teacher is not None),
            ):
                if used:
                    raise ConfigError(f'{key}: not with data.naflex_seq_len, whose batches are patches; leave it out')
        sizes = data.progressive_sizes
        if sizes is not None and len(sizes) > schedule.epochs > 0:
            raise ConfigError(f'data.progressive_sizes has {len(sizes)} sizes for schedule.epochs={schedule.epochs}')

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = 'recipe') -> 'Config':
        """Build and check a recipe.

        Args:
            values: Nested dictionary, one entry per section; missing fields keep their defaults.
            source: Name of the recipe in error messages.

        Raises:
            ConfigError: An unknown key, a wrong type, a value outside its limits, or fields that contradict each other.
        """
        checked = check_values(values, source)
        try:
            return cls(**{field.name: field.type(**checked.get(field.name, {})) for field in dataclasses.fields(cls)})
        except ConfigError as error:
            raise ConfigError(f'{source}: {error}') from None

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary: tuples become lists, so that YAML and safe unpickling take it."""
        plain = dataclasses.asdict(self)
        for section in plain.values():
            for key, value in section.items():
                if isinstance(value, tuple):
                    section[key] = list(value)
        return plain

    def to_yaml(self, comments: bool = False) -> str:
        """YAML text of every field, followed by its meaning if `comments`."""
        lines = []
        for name, values in self.to_dict().items():
            lines.append(f'{name}:')
            for field in dataclasses.fields(getattr(self, name)):
                value = yaml.safe_dump([values[field.name]], default_flow_style=True, width=10**6).strip()[1:-1]
                line = f'  {field.name}: {value}'
                lines.append(f'{line:<44}  # {field.metadata["text"]}' if comments else line)
        return '\n'.join(lines) + '\n'

    @property
    def images_per_step(self) -> int:
        """Images per optimizer step, over all processes and accumulated batches."""
        return self.data.batch_size * self.optim.accum_steps

    @property
    def lr_scale(self) -> float:
        """Factor of linear learning-rate scaling, for `optim.lr` and the learning rates of the schedule."""
        return 1.0 if self.optim.lr_batch_size is None else self.images_per_step / self.optim.lr_batch_size

    def at_epoch(self, epoch: int) -> 'Config':
        """The recipe with the training image size that data.progressive_sizes gives to an epoch, counted from 0."""
        sizes = self.data.progressive_sizes
        if sizes is None:
            return self
        part = min(epoch * len(sizes) // self.schedule.epochs, len(sizes) - 1)
        data = dataclasses.replace(self.data, img_size=sizes[part], progressive_sizes=None)
        return dataclasses.replace(self, data=data)


# Keys, types and limits


def keys() -> Iterator[str]:
    """Every settable key, dotted."""
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.type):
            yield f'{section.name}.{field.name}'


def check_keys(values: Any, source: str) -> None:
    """Raise ConfigError for the first key of `values` that no field has, naming the nearest valid one."""
    if not isinstance(values, Mapping):
        raise ConfigError(f'{source}: expected sections with keys, got {values!r}')
    sections = {section.name: section.type for section in dataclasses.fields(Config)}
    for name, section in values.items():
        if name not in sections:
            raise ConfigError(f'{source}: unknown section {name!r}{nearest(str(name), [*sections, *keys()])}')
        if not isinstance(section, Mapping):
            raise ConfigError(f'{source}: {name} is a section with keys, got {section!r}')
        known = {field.name for field in dataclasses.fields(sections[name])}
        for key in section:
            if key not in known:
                raise ConfigError(f"{source}: unknown key '{name}.{key}'{nearest(f'{name}.{key}', keys())}")


def check_values(values: Mapping[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """Convert the given values to the types of their fields; a recipe may be partial here.

    Raises:
        ConfigError: An unknown key, a wrong type or a value outside its limits.
    """
    check_keys(values, source)
    sections = typing.get_type_hints(Config)
    checked: dict[str, dict[str, Any]] = {}
    for name, given in values.items():
        hints = typing.get_type_hints(sections[name])
        limits = {field.name: field.metadata for field in dataclasses.fields(sections[name])}
        checked[name] = {
            key: _check_value(value, hints[key], limits[key], f'{source}: {name}.{key}') for key, value in given.items()
        }
    return checked


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)  # `Literal[...] | None` is the latter
    return typing.get_args(hint) if union else (hint,)


def _check_value(value: Any, hint: Any, limits: Mapping[str, Any], key: str) -> Any:
    """`value` as the type that `hint` asks for, within its limits."""
    for option in _options(hint):
        fits, converted = _convert(value, option)
        if fits:
            for number in converted if isinstance(converted, tuple) else (converted,):
                if isinstance(number, (int, float)) and not isinstance(number, bool):
                    _check_limits(number, limits, key)
            return converted
    raise ConfigError(f'{key}={value!r} is not valid; allowed: {_describe(hint)}')


def _convert(value: Any, option: Any) -> tuple[bool, Any]:
    """Whether `value` is of type `option`, and the value as that type."""
    origin = typing.get_origin(option)
    if origin is Literal:
        return value in typing.get_args(option), value
    if origin is dict:
        return isinstance(value, Mapping) and all(isinstance(name, str) for name in value), value
    if origin is tuple:
        element, *rest = typing.get_args(option)
        if not isinstance(value, (list, tuple)) or (rest != [Ellipsis] and len(value) != 1 + len(rest)):
            return False, value
        items = [_convert(item, element) for item in value]
        return bool(items) and all(fits for fits, _ in items), tuple(item for _, item in items)
    if option is float and isinstance(value, str):  # YAML reads 1e-3 as text: it wants 1.0e-3
        try:
            return True, float(value)
        except ValueError:
            return False, value
    if option in (int, float):
        return isinstance(value, (int, option)) and not isinstance(value, bool), value
    return isinstance(value, option), value


def _check_limits(number: float, limits: Mapping[str, Any], key: str) -> None:
    """Raise ConfigError where a number is outside the limits of its field, or not finite."""
    ge, gt, le = limits['ge'], limits['gt'], limits['le']
    inside = (ge is None or number >= ge) and (gt is None or number > gt) and (le is None or number <= le)
    if not inside or not math.isfinite(number):
        signs = {'>=': ge, '>': gt, '<=': le}
        allowed = ' and '.join(f'{sign} {limit}' for sign, limit in signs.items() if limit is not None)
        raise ConfigError(f'{key}={number} is not valid; allowed: {allowed or "finite numbers"}')


def _describe(hint: Any) -> str:
    """A type hint in words."""
    words = []
    for option in _options(hint):
        origin = typing.get_origin(option)
        if origin is Literal:
            words += [str(choice) for choice in typing.get_args(option)]
        elif origin is dict:
            words.append('a mapping')
        elif origin is tuple:
            element, *rest = typing.get_args(option)
            a_list = f'a list of {element.__name__}'
            words.append(a_list if rest == [Ellipsis] else f'[{1 + len(rest)} x {element.__name__}]')
        else:
            names = {int: 'an integer', float: 'a number', bool: 'true or false', str: 'text', type(None): 'null'}
            words.append(names[option])
    return ', '.join(words[:-1]) + ' or ' + words[-1] if len(words) > 1 else words[0]


# Layers: files, bases, overrides


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`, dictionary by dictionary; neither is changed."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_override(text: str, source: str = '--set') -> dict[str, Any]:
    """Read 'section.key=value' (or 'section.dict_key.name=value') into a nested dictionary.

    The value is read as YAML, except that a text field takes it verbatim.
    """
    key, equals, value = text.partition('=')
    key = key.strip()
    if not equals:
        raise ConfigError(f'{source}: expected KEY=VALUE such as optim.lr=5e-4, got {text!r}')
    path = key.split('.')
    dotted = '.'.join(path[:2])
    if dotted not in set(keys()):
        raise ConfigError(f'{source}: unknown key {key!r}{nearest(key, keys())}')
    hint = typing.get_type_hints(typing.get_type_hints(Config)[path[0]])[path[1]]
    if len(path) > 2 and typing.get_origin(hint) is not dict:
        raise ConfigError(f'{source}: {dotted} has no keys of its own, got {key!r}')
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f'{source}: cannot read the value of {key}: {value!r} ({error})') from error
    options = _options(hint)
    if str in options and not (parsed is None and value.strip() and type(None) in options):
        parsed = value
    for name in reversed(path[1:]):
        parsed = {name: parsed}
    return {path[0]: parsed}


class _StrictLoader(yaml.SafeLoader):
    """YAML that rejects a duplicate key, where PyYAML silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f'duplicate key {name!r}', node.start_mark)
        return super().construct_mapping(node, deep=deep)


def recipe_folder() -> Path:
    """Folder of the packaged recipes: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / 'configs', package.parent / 'configs'):
        if folder.is_dir():
            return folder
    raise ConfigError(f'no recipes found in {package / "configs"} or {package.parent / "configs"}')


def recipe_names() -> list[str]:
    """Names that `--config` takes."""
    return sorted(path.stem for path in recipe_folder().glob('*.yaml'))


def find_recipe(name: str, folder: Path | None = None) -> Path:
    """Path of a recipe.

    Args:
        name: Path of a YAML file, or name of a packaged recipe with or without '.yaml'.
        folder: Folder that is searched first (that of the recipe which names this one as its base).
    """
    packaged = recipe_folder() / f'{name.removesuffix(".yaml")}.yaml'
    for path in ([folder / name] if folder else []) + [Path(name).expanduser(), packaged]:
        if path.is_file():
            return path
    raise ConfigError(f'no recipe {name!r}: neither a file nor a packaged recipe{nearest(name, recipe_names())}')


def read_recipe(name: str) -> dict[str, Any]:
    """The values of a recipe as a nested dictionary, merged over its bases, its keys checked."""
    return _read(find_recipe(name), ())


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in above:
        raise ConfigError(f'{path.name}: circular base: {" -> ".join(p.name for p in (*above, path))}')
    try:
        values = yaml.load(path.read_text(encoding='utf-8'), Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f'cannot read recipe {path}: {error}') from error
    values = {} if values is None else values
    base = values.pop('base', None) if isinstance(values, dict) else None
    check_keys(values, path.name)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f'{path.name}: base={base!r} is not valid; allowed: the name of another recipe')
    return merge(_read(find_recipe(base, folder=path.parent), (*above, path)), values)

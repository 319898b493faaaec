"""The recipe as typed data: every field that a YAML file or a command line can set, with its type, limits and meaning.

A recipe is built from layers of plain nested dictionaries (a file, its base, overrides), merged and then checked as a
whole by `Config.from_dict`, so that a wrong key, type or value ends the run before any work is done.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import yaml

from hydra_vision.command_line import nearest
from hydra_vision.train.errors import ConfigError


def _about(
    text: str, low: float | None = None, high: float | None = None, above: float | None = None
) -> dict[str, Any]:
    """Metadata of a field: its meaning and its limits (`low <= value <= high`, `value > above`)."""
    return {'text': text, 'low': low, 'high': high, 'above': above}


def _field(default: Any, text: str, **limits: float) -> Any:
    """A dataclass field with its meaning and limits."""
    return dataclasses.field(default=default, metadata=_about(text, **limits))


@dataclasses.dataclass
class ModelConfig:
    """What is trained."""

    name: str = _field('hydra_vit_nano', 'any timm model name, the Hydra-ViT family included')
    num_classes: int | None = _field(None, 'null: as many as the training set has', low=1)
    in_chans: int = _field(3, 'image channels; 1 reads the images as grey', low=1)
    drop_rate: float = _field(0.0, 'dropout before the head', low=0, high=1)
    drop_path_rate: float = _field(0.0, 'stochastic depth', low=0, high=1)
    pretrained: bool = _field(False, 'start from the published weights of this model')
    checkpoint: str | None = _field(None, 'start from the weights in this file (a new head where the classes differ)')
    freeze_backbone: bool = _field(False, 'linear probe: only the classifier learns, the rest stays in evaluation mode')
    kwargs: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata=_about('further arguments of timm.create_model, e.g. {patch_size: 4}')
    )


@dataclasses.dataclass
class DataConfig:
    """Where images come from and how they are read."""

    name: str = _field(
        '',
        "'' (folder or .tar), parquet, hfds/..., hfids/..., tfds/..., wds/, torch/..., sklearn/digits, synthetic",
    )
    dir: str | None = _field(None, 'folder of the data set; holds train/ and val/ (or train.tar and val.tar)')
    train_split: str = _field('train', 'name of the training split')
    val_split: str = _field('validation', 'name of the validation split; val/ and validation/ are the same')
    class_map: str | None = _field(None, 'text file with one class name a line, in index order')
    download: bool = _field(False, "let the data set's own reader download it, where it can")
    train_samples: int | None = _field(None, 'images in the training split; for streamed and synthetic sets', low=1)
    val_samples: int | None = _field(None, 'images in the validation split; for streamed and synthetic sets', low=1)
    input_key: str | None = _field(None, 'column of the image, for readers that have columns (null: their default)')
    target_key: str | None = _field(None, 'column of the label, for readers that have columns (null: their default)')
    img_size: int | tuple[int, int] | None = _field(None, "pixels, or [height, width]; null: the model's own", low=1)
    progressive_sizes: tuple[int, ...] | None = _field(
        None, 'sizes of the training images over the run, in equal parts of its epochs; the last is img_size', low=1
    )
    batch_size: int = _field(128, 'images a step, over all processes (an update is accum_steps of them)', low=1)
    val_batch_size: int | None = _field(None, 'images of one process; null: its share of batch_size', low=1)
    workers: int | None = _field(None, 'loader processes; null: one a CPU core, 16 at most', low=0)
    max_unreadable: int = _field(10, 'unreadable images of a split that a process skips before the run ends', low=0)
    unusual_images: Literal['convert', 'unreadable'] = _field(
        'convert', 'CMYK, 16-bit, palette, transparent, animated (first frame): convert, or count as unreadable'
    )
    exif_rotation: bool = _field(False, 'turn images as their EXIF tag says (timm and torchvision do not)')
    cache: Literal['none', 'ram'] = _field('none', 'ram: decode every image once at the start, for small sets')
    mean: tuple[float, ...] | None = _field(None, "channel means in 0..1; null: the model's own")
    std: tuple[float, ...] | None = _field(None, "channel standard deviations; null: the model's own", above=0)
    interpolation: str | None = _field(None, "resizing for validation; null: the model's own")
    crop_pct: float | None = _field(None, "validation crop; null: the model's own", above=0, high=1)
    crop_mode: Literal['center', 'squash', 'border'] | None = _field(None, "validation crop; null: the model's own")


@dataclasses.dataclass
class AugmentConfig:
    """Training transforms; the names are timm's."""

    crop_mode: Literal['rrc', 'rkrc', 'rkrr'] = _field('rrc', 'rrc: random resized crop; rkr*: keep the aspect ratio')
    scale: tuple[float, float] = _field((0.08, 1.0), 'share of the area that a random crop covers', above=0)
    ratio: tuple[float, float] = _field((0.75, 4 / 3), 'aspect ratio of a random crop', above=0)
    interpolation: str = _field('random', 'random, bilinear or bicubic')
    hflip: float = _field(0.5, 'probability of a horizontal flip', low=0, high=1)
    repeats: int = _field(1, 'repeated augmentation: times an image comes in an epoch, of fewer images', low=1)
    vflip: float = _field(0.0, 'probability of a vertical flip', low=0, high=1)
    color_jitter: float = _field(0.0, 'strength of the jitter; must be 0 beside auto_augment', low=0)
    auto_augment: str | None = _field(None, 'RandAugment or AutoAugment as timm writes it, e.g. rand-m9-mstd0.5-inc1')
    erase_prob: float = _field(0.0, 'random erasing: probability', low=0, high=1)
    erase_mode: Literal['const', 'rand', 'pixel'] = _field('pixel', 'random erasing: what fills the region')
    erase_count: int = _field(1, 'random erasing: regions an image', low=1)
    mixup: float = _field(0.0, 'mixup alpha, 0 = off', low=0)
    cutmix: float = _field(0.0, 'CutMix alpha, 0 = off', low=0)
    mix_prob: float = _field(1.0, 'probability that a batch is mixed', low=0, high=1)
    mix_switch_prob: float = _field(0.5, 'share of CutMix where mixup is on as well', low=0, high=1)
    mix_mode: Literal['batch', 'pair', 'elem'] = _field('batch', 'one draw a batch, a pair or an image')
    mix_off_epoch: int | None = _field(None, 'epoch from which batches are no longer mixed', low=0)
    smoothing: float = _field(0.0, 'label smoothing', low=0, high=1)


@dataclasses.dataclass
class OptimConfig:
    """The optimizer."""

    name: str = _field('adamw', 'any timm optimizer name')
    lr: float = _field(1e-3, 'learning rate after warm-up', above=0)
    lr_batch_size: int | None = _field(
        None, 'images an update that lr is meant for: another size scales lr in proportion; null: lr as it is', low=1
    )
    weight_decay: float = _field(0.05, "applied to matrices, not to biases, norms and the model's own list", low=0)
    betas: tuple[float, float] | None = _field(None, "null: the optimizer's own", low=0, high=1)
    eps: float | None = _field(None, "null: the optimizer's own", above=0)
    layer_decay: float | None = _field(None, 'learning-rate factor from one layer to the one below it', above=0, high=1)
    clip_grad: float | None = _field(None, 'gradient clipping, null = off', above=0)
    clip_mode: Literal['norm', 'value', 'agc'] = _field('norm', 'what clip_grad limits')
    accum_steps: int = _field(1, 'batches an update', low=1)
    z_loss: float = _field(0.0, 'weight of the mean squared logsumexp of the logits in the loss', low=0)
    skip_nonfinite: int = _field(
        0, 'steps with a NaN or infinite gradient that are left out before the run stops; waits for the device', low=0
    )
    kwargs: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata=_about('further arguments of the optimizer, e.g. {momentum: 0.9}')
    )


@dataclasses.dataclass
class ScheduleConfig:
    """The learning rate over time."""

    name: Literal['cosine', 'tanh', 'poly', 'step', 'multistep', 'none'] = _field('cosine', 'timm scheduler')
    epochs: int = _field(100, 'length of the schedule, warm-up included; 0 only with --validate', low=0)
    warmup_epochs: int = _field(0, 'linear warm-up', low=0)
    warmup_lr: float = _field(1e-6, 'learning rate at the start of the warm-up', low=0)
    min_lr: float = _field(0.0, 'learning rate at the end', low=0)
    cooldown_epochs: int = _field(0, 'epochs at min_lr after the schedule', low=0)
    per_update: bool = _field(True, 'change the learning rate at every update, not only at every epoch')
    kwargs: dict[str, Any] = dataclasses.field(
        default_factory=dict,
        metadata=_about("further arguments of timm's scheduler, e.g. {decay_epochs: 30}"),
    )


@dataclasses.dataclass
class EmaConfig:
    """Exponential moving average of the weights."""

    decay: float | None = _field(None, 'null = off', above=0, high=1)
    warmup: bool = _field(False, 'smaller decay at first, for short runs')


@dataclasses.dataclass
class DistillConfig:
    """Knowledge distillation from a teacher; off without one."""

    teacher: str | None = _field(None, 'any timm model name; it sees the images of the student')
    checkpoint: str | None = _field(
        None, "the teacher's weights, trained with the data.mean and std of this recipe; null: its published ones"
    )
    kwargs: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata=_about('further arguments of timm.create_model for the teacher')
    )
    task_weight: float = _field(0.5, "share of the labels' loss; the rest is the teacher's", low=0, high=1)
    temperature: float = _field(1.0, 'softens both distributions', above=0)


@dataclasses.dataclass
class RunConfig:
    """How it is computed; none of these should change what is learned."""

    seed: int = _field(0, 'seed of weights, order and augmentation', low=0)
    device: str = _field('auto', 'auto, cpu, cuda, cuda:1, ...')
    threads: int | None = _field(None, "CPU threads of an operation; null: PyTorch's own choice", low=1)
    amp: Literal['auto', 'none', 'bf16', 'fp16'] = _field('auto', 'auto: bf16 on CUDA, none elsewhere')
    tf32: bool = _field(True, 'TF32 for what stays float32 on CUDA')
    cudnn_attention: bool = _field(
        False, "let PyTorch choose cuDNN's attention on CUDA; its gradients are NaN in cases (PyTorch issue 196678)"
    )
    channels_last: bool = _field(False, 'NHWC memory format of images and convolutions')
    torch_compile: bool = _field(False, 'compile the model')
    compile_mode: str | None = _field(None, 'mode of torch.compile, e.g. max-autotune')
    grad_checkpointing: bool = _field(False, 'recompute activations in the backward pass to save memory')
    validate_every: int = _field(1, 'epochs between validations; the last epoch is always validated', low=1)


@dataclasses.dataclass
class CheckpointConfig:
    """When checkpoints are written beside those at the end of every epoch, and how many are kept."""

    every_steps: int | None = _field(None, 'updates between checkpoints inside an epoch; null: none', low=1)
    every_minutes: float | None = _field(None, 'minutes between checkpoints inside an epoch; null: none', above=0)
    keep_last: int = _field(2, 'newest checkpoints that are kept', low=1)
    keep_best: int = _field(1, 'checkpoints of the best epochs that are kept as well', low=1)


@dataclasses.dataclass
class LogConfig:
    """Numbers inside an epoch: steps.csv and mixers.csv."""

    every: int = _field(50, 'updates between rows; 0: none', low=0)
    mixers: bool = _field(True, 'step sizes and decays of every Hydra layer')
    tensorboard: bool = _field(False, 'also write event files for TensorBoard into RUN/tensorboard')
    wandb: Literal['off', 'offline', 'online'] = _field('off', 'also log to Weights & Biases; offline: into RUN/wandb')
    wandb_project: str = _field('hydra_vision', 'project at Weights & Biases')
    mixer_images: int = _field(16, 'images that these are measured on, in one more forward pass', low=1)


@dataclasses.dataclass
class DistributedConfig:
    """Several processes, started by torchrun."""

    strategy: Literal['ddp', 'fsdp'] = _field('ddp', 'ddp: each has the whole model; fsdp: a share of it (FSDP2)')
    gradients: Literal['fp32', 'bf16'] = _field('fp32', 'ddp: precision in which gradients are exchanged and averaged')


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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = 'recipe') -> 'Config':
        """Builds and checks a recipe.

        Args:
            values: nested dictionary, a section a key; what is missing keeps its default.
            source: what error messages call it.

        Raises:
            ConfigError: an unknown key, a wrong type, a value outside its limits, or values that contradict each other.
        """
        checked = check_values(values, source)
        sections = {section.name: section.type(**checked.get(section.name, {})) for section in dataclasses.fields(cls)}
        config = cls(**sections)
        config._check_together(source)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary: tuples become lists, so that YAML and safe unpickling take it."""
        plain = dataclasses.asdict(self)
        for section in plain.values():
            for key, value in section.items():
                if isinstance(value, tuple):
                    section[key] = list(value)
        return plain

    def to_yaml(self, comments: bool = False) -> str:
        """YAML text of every field, with its meaning behind it if `comments`."""
        lines = []
        for name, values in self.to_dict().items():
            lines.append(f'{name}:')
            for field in dataclasses.fields(getattr(self, name)):
                value = yaml.safe_dump([values[field.name]], default_flow_style=True, width=10**6).strip()[1:-1]
                line = f'  {field.name}: {value}'
                lines.append(f'{line:<44}  # {field.metadata["text"]}' if comments else line)
        return '\n'.join(lines) + '\n'

    @property
    def mixes(self) -> bool:
        """Whether training batches are mixed (mixup or CutMix)."""
        return self.augment.mixup > 0 or self.augment.cutmix > 0

    def _check_together(self, source: str) -> None:
        """Refuses values that are each valid but contradict each other."""

        def refuse(text: str) -> typing.NoReturn:
            raise ConfigError(f'{source}: {text}')

        schedule, optim, augment = self.schedule, self.optim, self.augment
        if schedule.warmup_epochs >= schedule.epochs > 0 and schedule.warmup_epochs > 0:
            refuse(
                f'schedule.warmup_epochs={schedule.warmup_epochs} must be smaller than schedule.epochs='
                f'{schedule.epochs} (add --set schedule.warmup_epochs=0 for a short run)'
            )
        if schedule.name == 'none' and optim.layer_decay is not None:
            refuse("optim.layer_decay is applied by the scheduler: schedule.name='none' would ignore it")
        if schedule.name == 'none' and schedule.warmup_epochs:
            refuse(f"schedule.warmup_epochs={schedule.warmup_epochs} needs a schedule; schedule.name is 'none'")
        if self.mixes and self.data.batch_size % 2:
            refuse(f'data.batch_size={self.data.batch_size} must be even where mixup or cutmix is on')
        if augment.auto_augment and augment.color_jitter:
            refuse(
                f'augment.color_jitter={augment.color_jitter} has no effect beside augment.auto_augment='
                f'{augment.auto_augment!r}; set one of them to 0 or null'
            )
        self._check_data(refuse)
        for key in ('scale', 'ratio'):
            first, second = getattr(augment, key)
            if first > second:
                refuse(f'augment.{key}={[first, second]} must be [smallest, largest]')
        for key in ('mean', 'std'):
            value = getattr(self.data, key)
            if value is not None and len(value) not in (1, self.model.in_chans):
                refuse(f'data.{key} has {len(value)} values; allowed: 1, or model.in_chans={self.model.in_chans}')
        if self.model.pretrained and self.model.checkpoint:
            refuse('model.pretrained and model.checkpoint both name the initial weights; set one of them')
        if self.distributed.strategy == 'fsdp' and optim.clip_grad is not None and optim.clip_mode == 'agc':
            refuse("optim.clip_mode='agc' needs whole weights; distributed.strategy='fsdp' shards them")
        self._check_fine_tuning(refuse)
        if self.distributed.strategy == 'fsdp' and self.distributed.gradients != 'fp32':
            refuse("distributed.gradients='bf16' belongs to distributed.strategy='ddp'")
        if self.ema.warmup and self.ema.decay is None:
            refuse('ema.warmup=true needs ema.decay')
        if self.run.compile_mode is not None and not self.run.torch_compile:
            refuse('run.compile_mode needs run.torch_compile=true')

    def _check_fine_tuning(self, refuse: Callable[[str], typing.NoReturn]) -> None:
        """Refuses settings of teacher, probe and sizes that would be ignored."""
        distill, sizes = self.distill, self.data.progressive_sizes
        if distill.teacher is None:
            defaults = DistillConfig()
            for field in dataclasses.fields(DistillConfig):
                if getattr(distill, field.name) != getattr(defaults, field.name):
                    refuse(f'distill.{field.name} has no effect without distill.teacher')
        if self.model.freeze_backbone and self.optim.layer_decay is not None:
            refuse('optim.layer_decay has no effect beside model.freeze_backbone: only the classifier learns')
        if sizes is not None:
            if self.data.img_size is None or sizes[-1] != self.data.img_size:
                refuse(f'data.progressive_sizes={list(sizes)} must end with data.img_size={self.data.img_size}')
            if len(sizes) > self.schedule.epochs > 0:
                refuse(f'data.progressive_sizes has {len(sizes)} sizes for schedule.epochs={self.schedule.epochs}')

    def _check_data(self, refuse: Callable[[str], typing.NoReturn]) -> None:
        """Refuses data settings that the chosen reader would ignore."""
        data = self.data
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
        if self.model.in_chans not in (1, 3):
            refuse(f'model.in_chans={self.model.in_chans} is not valid; the image readers give 1 or 3 channels')
        owned = {
            'img_size': 'data.img_size',
            **{key: f'model.{key}' for key in ('num_classes', 'in_chans', 'drop_rate', 'drop_path_rate', 'pretrained')},
            'checkpoint_path': 'model.checkpoint',
        }
        for key in self.model.kwargs:
            if key in owned:
                refuse(f'model.kwargs.{key} is set by {owned[key]}')


def keys() -> Iterator[str]:
    """Every settable key, dotted."""
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.type):
            yield f'{section.name}.{field.name}'


def check_keys(values: Any, source: str) -> None:
    """Raises ConfigError for the first key of `values` that no field has, naming the nearest one that exists."""
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
    """The given values as the types of their fields.

    Raises:
        ConfigError: an unknown key, a wrong type or a value outside its limits.
    """
    check_keys(values, source)
    sections = typing.get_type_hints(Config)
    checked: dict[str, dict[str, Any]] = {}
    for name, given in values.items():
        hints = typing.get_type_hints(sections[name])
        limits = {field.name: field.metadata for field in dataclasses.fields(sections[name])}
        checked[name] = {
            key: _check(value, hints[key], limits[key], f'{name}.{key}', source) for key, value in given.items()
        }
    return checked


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`, dictionary by dictionary; neither is changed."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_override(text: str, source: str = '--set') -> dict[str, Any]:
    """Reads 'section.key=value' (or 'section.dict_key.name=value') into a nested dictionary.

    The value is read as YAML, except that a text field takes it as it stands.
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
    free = typing.get_origin(hint) is dict
    if len(path) > 2 and not free:
        raise ConfigError(f'{source}: {dotted} has no keys of its own, got {key!r}')
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f'{source}: cannot read the value of {key}: {value!r} ({error})') from error
    if str in _options(hint) and not (parsed is None and value.strip() and type(None) in _options(hint)):
        parsed = value
    for name in reversed(path[1:]):
        parsed = {name: parsed}
    return {path[0]: parsed}


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)  # `Literal[...] | None` is the latter
    return typing.get_args(hint) if union else (hint,)


def _check(value: Any, hint: Any, limits: Mapping[str, Any], key: str, source: str) -> Any:
    """`value` as the type that `hint` asks for, inside its limits."""
    for option in _options(hint):
        fits, converted = _convert(value, option)
        if fits:
            numbers = converted if isinstance(converted, tuple) else (converted,)
            for number in numbers:
                _check_limits(number, limits, key, source)
            return converted
    raise ConfigError(f'{source}: {key}={value!r} is not valid; allowed: {_describe(hint)}')


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
    if option is float:
        if isinstance(value, str):  # YAML reads 1e-3 as text: it wants 1.0e-3
            try:
                return True, float(value)
            except ValueError:
                return False, value
        return isinstance(value, (int, float)) and not isinstance(value, bool), value
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, option), value


def _check_limits(number: Any, limits: Mapping[str, Any], key: str, source: str) -> None:
    """Raises ConfigError where a number is outside the limits of its field, or not finite."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return
    low, high, above = limits['low'], limits['high'], limits['above']
    allowed = []
    allowed += [f'>= {low}'] if low is not None else []
    allowed += [f'> {above}'] if above is not None else []
    allowed += [f'<= {high}'] if high is not None else []
    inside = (low is None or number >= low) and (above is None or number > above) and (high is None or number <= high)
    if not inside or number in (float('inf'), float('-inf')) or number != number:
        raise ConfigError(
            f'{source}: {key}={number} is not valid; allowed: {" and ".join(allowed) or "finite numbers"}'
        )


def _describe(hint: Any) -> str:
    """A type hint in words."""
    words = []
    for option in _options(hint):
        origin = typing.get_origin(option)
        if option is type(None):
            words.append('null')
        elif origin is Literal:
            words += [str(choice) for choice in typing.get_args(option)]
        elif origin is dict:
            words.append('a mapping')
        elif origin is tuple:
            element, *rest = typing.get_args(option)
            count = 'a list' if rest == [Ellipsis] else f'{1 + len(rest)}'
            words.append(f'{count} of {element.__name__}' if rest == [Ellipsis] else f'[{count} x {element.__name__}]')
        else:
            words.append({int: 'a whole number', float: 'a number', bool: 'true or false', str: 'text'}[option])
    return ', '.join(words[:-1]) + ' or ' + words[-1] if len(words) > 1 else words[0]

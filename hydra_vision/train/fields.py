"""Every field that a recipe can set: type, default, limits and meaning."""

import dataclasses
from typing import Any, Literal


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

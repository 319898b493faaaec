"""A semantic segmenter on a timm backbone: a folder of images and masks, smp's decoder and metrics, a short loop.

The loop keeps its state in the trainer's checkpoints, and its images follow the trainer's rules.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from ..errors import DataError, NonFiniteError, UserError, first_line, require
from ..images import READ_ERRORS, ImageRules, find_images, open_image
from ..train.randomness import random_state, set_random_state
from .smp import register_smp_encoder

__all__ = [
    'DIVISOR',
    'Recipe',
    'Scores',
    'SegmentationFolder',
    'build_segmenter',
    'eval_transform',
    'evaluate',
    'measure_speed',
    'predict',
    'read_classes',
    'train_segmenter',
    'train_transform',
]

# What the sides of an input must divide by: the coarsest map of the pyramid; DPT halves the backbone's map, too.
DIVISOR = 32


@dataclass(frozen=True)
class Recipe:
    """How a segmenter is trained."""

    epochs: int = 100
    batch_size: int = 16
    lr: float = 5e-4
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    warmup: float = 0.05  # share of the updates
    clip_grad: float = 1.0
    eval_every: int = 5  # epochs


@dataclass(frozen=True)
class Scores:
    """Over all pixels of a split that have a class; IoU is nan for a class that is neither there nor predicted."""

    miou: float
    accuracy: float
    iou: list[float]


class SegmentationFolder(Dataset):
    """Pairs of a uint8 image (3, H, W) and a mask (H, W) of class numbers, through a joint transform.

    The rules for images are the trainer's: which files are images and what they become (`hydra_vision.images`), and a
    pair that cannot be read is recorded and replaced by the next one, up to a limit.

    Args:
        root: The data set.
        split: Folder below it, with images/NAME.jpg and masks/NAME.png.
        num_classes: Class numbers are below it.
        ignore_index: Number of pixels without a class.
        transform: Takes and returns (tv_tensors.Image, tv_tensors.Mask).
        max_unreadable: Pairs that may be unreadable.
        mask_replaced: Give what replaces an unreadable pair no classes, so that evaluation does not count it twice.

    Raises:
        UserError: No such folder, no images, an image without mask or of another size than its mask.
        DataError: More unreadable pairs than `max_unreadable`.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        num_classes: int,
        ignore_index: int,
        transform: v2.Transform | None = None,
        max_unreadable: int = 10,
        mask_replaced: bool = True,
    ) -> None:
        images, masks = (Path(root) / split / name for name in ('images', 'masks'))
        for folder in (images, masks):
            if not folder.is_dir():
                raise UserError(f'no folder {folder}; expected SPLIT/images/NAME.jpg and SPLIT/masks/NAME.png')
        self.names = find_images(images)
        self.images = [images / name for name in self.names]
        self.masks = [(masks / name).with_suffix('.png') for name in self.names]
        if not self.images:
            raise UserError(f'{images} holds no image')
        self.split, self.num_classes, self.ignore_index, self.transform = split, num_classes, ignore_index, transform
        self.max_unreadable, self.mask_replaced = max_unreadable, mask_replaced
        self._unreadable = torch.zeros(len(self.images), dtype=torch.bool).share_memory_()  # loader processes write it
        self.sizes = set()
        for i, (image, mask) in enumerate(zip(self.images, self.masks)):
            if not mask.exists():
                raise UserError(f'{image} has no mask {mask}')
            try:
                with open_image(image) as a, open_image(mask) as b:  # headers only
                    sizes, mode = (a.size, b.size), b.mode
            except READ_ERRORS as error:
                self._record(i, error)
                continue
            if sizes[0] != sizes[1]:
                (w, h), (W, H) = sizes
                raise UserError(f'{image} is {w} x {h}, its mask {W} x {H} pixels')
            if mode not in ('L', 'P', 'I', 'I;16', '1'):
                raise UserError(f'{mask} has mode {mode}; a mask holds one class number per pixel')
            self.sizes.add(sizes[0])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        for at in (*range(i, len(self)), *range(i)):
            if self._unreadable[at]:
                continue
            try:
                with open_image(self.images[at]) as opened:
                    image = tv_tensors.Image(F.pil_to_tensor(ImageRules().apply(opened)))
                mask = self._mask(at)
            except READ_ERRORS as error:
                self._record(at, error)
                continue
            if at != i and self.mask_replaced:
                mask = torch.full_like(mask, self.ignore_index)
            return (image, mask) if self.transform is None else self.transform(image, mask)
        raise DataError(self.report())

    def check_classes(self, count: int = 16) -> None:
        """Read some masks, spread evenly: a wrong number of classes shows before the work, not at the last split.

        Args:
            count: Of masks at least, or all there are.

        Raises:
            UserError: A class number that is not allowed.
        """
        for i in range(0, len(self), max(1, len(self) // count)):
            try:
                self._mask(i)
            except READ_ERRORS as error:
                self._record(i, error)

    def report(self) -> str:
        """One line on the pairs that could not be read so far, '' where there are none."""
        names = [name for name, bad in zip(self.names, self._unreadable.tolist()) if bad]
        shown = ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')
        count = f'{len(names)} unreadable images or masks in {self.split}'
        return f'{count}: {shown} (allowed: --max-unreadable {self.max_unreadable})' if names else ''

    def _record(self, i: int, error: Exception) -> None:
        self._unreadable[i] = True
        if int(self._unreadable.sum()) > self.max_unreadable:
            raise DataError(self.report()) from error

    def _mask(self, i: int) -> tv_tensors.Mask:
        with open_image(self.masks[i]) as opened:
            mask = tv_tensors.Mask(F.pil_to_tensor(opened)[0].long())
        wrong = mask[(mask >= self.num_classes) & (mask != self.ignore_index)]
        if wrong.numel():
            raise UserError(
                f'{self.masks[i]} holds the class {int(wrong[0])}; allowed: 0 to {self.num_classes - 1} and '
                f'{self.ignore_index} (ignored)'
            )
        return mask


def read_classes(root: Path, num_classes: int | None) -> list[str]:
    """Names of the classes: classes.txt, one a line, or 'class 0', ... where only their number was given.

    Raises:
        UserError: Neither, or both and they disagree.
    """
    path = Path(root) / 'classes.txt'
    if not path.is_file():
        if num_classes is None:
            raise UserError(f'{path} does not exist; write it, one name per line, or pass --num-classes')
        return [f'class {i}' for i in range(num_classes)]
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if num_classes is not None and num_classes != len(names):
        raise UserError(f'--num-classes {num_classes}, but {path} names {len(names)}')
    return names


class _RandomScale(v2.Transform):
    """Both sides times one factor between two. torchvision's ScaleJitter fits the image into the crop first."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        scale = float(torch.empty(()).uniform_(self.low, self.high))
        return {'size': [max(1, round(scale * side)) for side in v2.query_size(flat_inputs)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.resize, inpt, **params, interpolation=InterpolationMode.BILINEAR, antialias=True)


def train_transform(crop: Sequence[int], ignore_index: int) -> v2.Compose:
    """Random scale (0.5 to 2), crop, flip and colours; what a crop reaches beyond the image is ignored.

    Args:
        crop: Height and width of the result.
        ignore_index: Class number of what is padded.
    """
    height, width = crop
    return v2.Compose(
        [
            _RandomScale(0.5, 2.0),
            v2.RandomCrop(
                (height, width),
                pad_if_needed=True,
                fill={tv_tensors.Image: 0, tv_tensors.Mask: ignore_index},
            ),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
            *_normalise(),
        ]
    )


def eval_transform() -> v2.Compose:
    """The whole image, normalised."""
    return v2.Compose(_normalise())


def _normalise() -> list[v2.Transform]:
    return [
        v2.ToDtype({tv_tensors.Image: torch.float32, 'others': None}, scale=True),
        v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        v2.ToPureTensor(),
    ]


def build_segmenter(
    model_name: str, decoder: str, num_classes: int, *, img_size: tuple[int, int], pretrained: bool = False, **kwargs
) -> nn.Module:
    """An smp model on a timm backbone.

    Args:
        model_name: An isotropic timm model.
        decoder: 'DPT', which takes its maps as they are, or any other smp architecture, through a feature pyramid.
        num_classes: Channels of the output.
        img_size: Height and width that training uses; others work too, unless dynamic_img_size=False.
        pretrained: Load the backbone's weights.
        **kwargs: Of the backbone.

    Raises:
        ImportError: Smp is not installed.
        UserError: An unknown decoder or backbone.
    """
    smp = require('segmentation_models_pytorch', 'seg')
    known = sorted(cls.__name__ for cls in smp.MODEL_ARCHITECTURES_MAPPING.values())
    if decoder not in known:
        raise UserError(f'decoder {decoder!r}; allowed: {", ".join(known)}')
    kwargs = {'dynamic_img_size': True, 'img_size': img_size, **kwargs}
    try:
        if decoder == 'DPT':
            register_smp_encoder(model_name, **kwargs)  # checks name and arguments
            weights = 'imagenet' if pretrained else None
            return smp.DPT(
                f'tu-{model_name}',
                encoder_weights=weights,
                decoder_readout='ignore',
                classes=num_classes,
                num_classes=0,
                global_pool='',
                **kwargs,
            )
        encoder = register_smp_encoder(model_name, pretrained=pretrained, **kwargs)
    except ValueError as error:
        raise UserError(first_line(error)) from error
    return getattr(smp, decoder)(encoder, encoder_weights=None, classes=num_classes)


def predict(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits of images of any size: padded at the bottom and on the right to what the model divides, then cut back.

    (B, 3, H, W) -> (B, num_classes, H, W).
    """
    H, W = x.shape[-2:]
    padded = pad(x, (0, -W % DIVISOR, 0, -H % DIVISOR), mode='replicate')
    return model(padded)[..., :H, :W]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: DataLoader,
    *,
    num_classes: int,
    ignore_index: int,
    device: torch.device,
    amp: torch.dtype | None = None,
) -> Scores:
    """Intersection over union from the pixels of the whole split (not the mean of images), by smp's metrics."""
    metrics = require('segmentation_models_pytorch', 'seg').metrics
    model.eval()
    sums = None
    for images, masks in batches:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            predicted = predict(model, images.to(device)).argmax(1)
        # outside 0 .. num_classes - 1, as smp wants it
        masks = masks.to(device).masked_fill(masks.to(device) == ignore_index, -1)
        stats = metrics.get_stats(predicted, masks, mode='multiclass', ignore_index=-1, num_classes=num_classes)
        stats = torch.stack([s.sum(0) for s in stats])  # (tp fp fn tn, classes)
        sums = stats if sums is None else sums + stats
    tp, fp, fn, tn = sums.unsqueeze(1).double().cpu()
    iou = metrics.iou_score(tp, fp, fn, tn, reduction='none', zero_division=float('nan'))[0]
    return Scores(
        miou=float(iou.nanmean()),
        accuracy=float(tp.sum() / (tp + fn).sum()),
        iou=[float(value) for value in iou],
    )


def train_segmenter(
    model: nn.Module,
    train: DataLoader,
    val: DataLoader,
    recipe: Recipe,
    *,
    num_classes: int,
    ignore_index: int,
    device: torch.device,
    amp: torch.dtype | None = None,
    state: Mapping[str, Any] | None = None,
    on_epoch: Callable[[dict[str, Any], Callable[[], dict[str, Any]]], None] = lambda row, state: None,
) -> list[dict[str, Any]]:
    """Train, and leave the model with the weights that were best on `val`.

    Args:
        model: From `build_segmenter`, on `device`.
        train: Batches of float images (B, 3, H, W) and class numbers (B, H, W).
        val: Likewise.
        recipe: The recipe.
        num_classes: Number of classes.
        ignore_index: Class number without loss.
        device: Of the model.
        amp: Autocast type; None for float32.
        state: Of an interrupted training, to continue from; `recipe`, `model` and data must be the same. With
            num_workers=0 the result is that of a training without interruption.
        on_epoch: Called with each row of the curve and a function that gives the state after it: numbers and tensors,
            for `torch.save`.

    Returns:
        The curve: epoch, loss, seconds of all epochs so far (without `on_epoch`), and where measured, val_miou and
        val_accuracy.

    Raises:
        NonFiniteError: The loss is not finite.
    """
    backbone = model.encoder.model  # knows what must not decay; smp's wrapper does not pass it on
    spared = [f'encoder.model.{name}' for name in backbone.no_weight_decay()]
    groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=spared)
    optimizer = create_optimizer_v2(groups, opt='adamw', lr=recipe.lr)
    updates = recipe.epochs * len(train)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=updates,
        lr_min=recipe.min_lr,
        warmup_t=round(recipe.warmup * updates),
        warmup_lr_init=recipe.min_lr,
        t_in_epochs=False,
    )
    curve: list[dict[str, Any]] = []
    best, best_weights = -1.0, None
    seconds = 0.0
    if state is not None:
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        set_random_state(state['random'], device)
        curve, best, best_weights = list(state['curve']), state['best'], state['best_weights']
        seconds = curve[-1]['seconds']
    update = len(curve) * len(train)

    def now() -> dict[str, Any]:
        return {
            'updates': update,
            'curve': curve,
            'best': best,
            'best_weights': best_weights,
            'model': model.state_dict(),
            'optimizer': optimizer.state_dict(),
            'random': random_state(device),
        }

    for epoch in range(len(curve) + 1, recipe.epochs + 1):
        start = time.perf_counter()
        model.train()
        total = torch.zeros((), device=device)
        for images, masks in train:
            schedule.step_update(update)
            images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                logits = model(images)
            # not reduction='mean': that is nan for a batch in which no pixel has a class
            losses = cross_entropy(logits.float(), masks, ignore_index=ignore_index, reduction='sum')
            loss = losses / (masks != ignore_index).sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
            optimizer.step()
            total += loss.detach()
            update += 1
        row = {'epoch': epoch, 'loss': float(total) / len(train), 'val_miou': None, 'val_accuracy': None}
        if not torch.isfinite(total):
            raise NonFiniteError(f'the loss is {row["loss"]} in epoch {epoch}; try a lower lr')
        if epoch % recipe.eval_every == 0 or epoch == recipe.epochs:
            scores = evaluate(model, val, num_classes=num_classes, ignore_index=ignore_index, device=device, amp=amp)
            row |= {'val_miou': scores.miou, 'val_accuracy': scores.accuracy}
            if scores.miou > best:
                best = scores.miou
                best_weights = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
        seconds += time.perf_counter() - start
        row['seconds'] = seconds
        curve.append(row)
        on_epoch(row, now)
    if best_weights is not None:
        model.load_state_dict(best_weights)
    return curve


def measure_speed(
    model: nn.Module,
    *,
    size: tuple[int, int],
    batch_size: int,
    num_classes: int,
    device: torch.device,
    amp: torch.dtype | None = None,
    calls: int = 20,
) -> dict[str, float]:
    """Images/s of a training step (forward, loss, backward) and of inference, and peak memory of training in MiB.

    On random images that are on the device already: what the model takes, without the loader. Peak memory is
    allocated memory and known on CUDA only.
    """
    from ..timing import clock_for

    x = torch.randn(batch_size, 3, *size, device=device)
    y = torch.randint(num_classes, (batch_size, *size), device=device)

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            return model(x)

    def step() -> None:
        model.zero_grad()
        cross_entropy(forward().float(), y).backward()

    @torch.inference_mode()
    def infer() -> None:
        forward()

    clock, result = clock_for(device), {}
    for name, function, mode in (('train', step, True), ('inference', infer, False)):
        model.train(mode)
        for _ in range(3):  # compilation of kernels, allocation
            function()
        if name == 'train' and device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(device)
        result[f'{name}_images_per_second'] = batch_size * calls / clock(function, calls)
        if name == 'train' and device.type == 'cuda':
            result['train_peak_mib'] = torch.cuda.max_memory_allocated(device) / 2**20
    return result

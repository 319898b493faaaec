"""Cost of training: operations per image, utilization of the device's peak, memory, hours of a whole run."""

import dataclasses
import re

import torch

from ..environment import device_name
from ..flops import count_flops
from . import build
from .config import Config
from .report import duration

# Dense peak in TFLOP/s by the vendors' data sheets: (words of the device's name, bf16 or fp16, TF32). Specific names
# before general ones; a name that is not here has no known peak.
_PEAKS = (
    ('B200', 2250, 1100),
    ('GH200', 989, 495),
    ('H200 NVL', 835, 417),
    ('H200', 989, 495),
    ('H100 PCIe', 756, 378),
    ('H100 NVL', 835, 417),
    ('H100', 989, 495),
    ('A100', 312, 156),
    ('A10G', 70, 35),
    ('A40', 150, 75),
    ('A30', 165, 82),
    ('L40S', 362, 183),
    ('L4', 121, 60),
    ('RTX 4090', 165, 83),
    ('RTX A6000', 155, 77),
    ('MI300X', 1307, 654),
)


def training_flops(config: Config, num_classes: int, input_size: tuple[int, int, int]) -> float | None:
    """Operations per training image, forward and backward.

    Matrix products and convolutions, a multiply-add as two; the backward pass as twice the forward pass, that of the
    patch embedding as once. In a linear probe (model.freeze_backbone) only the classifier has a backward pass, for its
    weights. Recomputed activations (run.grad_checkpointing) do not count.

    Args:
        config: The recipe.
        num_classes: Size of the head.
        input_size: Channels, height, width.

    Returns:
        The number, or None for a model that cannot be counted without running it.
    """
    try:
        with torch.device('meta'):
            model = build.create_model(config, num_classes, load_weights=False).eval()
        counts = count_flops(model, input_size)
    except (RuntimeError, NotImplementedError, TypeError):  # something in it needs values
        return None
    if config.model.freeze_backbone:
        return float(counts.flops + 2 * sum(p.numel() for p in model.get_classifier().parameters() if p.ndim > 1))
    return float(3 * counts.flops - counts.stem_flops)


def peak_flops(device: torch.device, amp: torch.dtype | None, tf32: bool) -> float | None:
    """Peak operations per second of a device for the precision of its products, None where it is not known."""
    if device.type != 'cuda' or (amp is None and not tf32):
        return None
    name = device_name(device)
    for part, half, single in _PEAKS:
        if re.search(rf'\b{part}\b', name):  # whole words: an RTX A4000 is no A40, an L40 is no L4
            return 1e12 * (single if amp is None else half)
    return None


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of an image, and peak of the devices of the run.

    Args:
        flops: Operations per training image, None where they could not be counted.
        peak: Peak operations per second of all devices of the run, None where it is not known.
    """

    flops: float | None
    peak: float | None

    def mfu(self, images_per_second: float) -> float | None:
        """Model FLOPs utilization: the share of the peak that the model's own operations use, 0..1."""
        if self.flops is None or self.peak is None:
            return None
        return images_per_second * self.flops / self.peak

    def describe(self, device: torch.device) -> str:
        """One line; says what is missing for the utilization."""
        flops = 'not countable' if self.flops is None else f'{self.flops / 1e9:.2f} GFLOP per training image'
        if self.peak is None:
            return f'{flops}; no peak is known for {device_name(device)} at this precision: no MFU'
        return f'{flops}; peak {self.peak / 1e12:.0f} TFLOP/s'


def measure_cost(
    config: Config, num_classes: int, input_size: tuple[int, int, int], device: torch.device, devices: int = 1
) -> Cost:
    """The cost of training a model of the recipe.

    Args:
        config: The recipe.
        num_classes: Size of the head.
        input_size: Channels, height, width.
        device: Where it is trained.
        devices: Number of devices of that kind in the whole run.
    """
    peak = peak_flops(device, build.amp_dtype(config, device), config.run.tf32)
    return Cost(training_flops(config, num_classes, input_size), None if peak is None else peak * devices)


def peak_memory(device: torch.device) -> float | None:
    """GiB that tensors took at most since the process began, None on the CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == 'cuda' else None


def estimate(seconds: float, devices: int, kind: str) -> str:
    """Time and device hours of a run in words."""
    return f'{duration(seconds)} (h:mm:ss), {seconds * devices / 3600:.2f} {kind} hours'

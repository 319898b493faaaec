"""What a result depends on: versions, devices, backends and the default that 'auto' stands for."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .ops.dispatch import backend_reasons, default_backend
from .version import __version__

__all__ = ['device_name', 'environment', 'precision', 'versions']

_PACKAGES = ('triton', 'timm', 'torchvision', 'mamba_ssm')


def versions() -> dict[str, str | None]:
    """Name -> version, None for a package that is not installed. Nothing is imported for it."""
    found = {'hydra_vision': __version__, 'python': platform.python_version(), 'torch': torch.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def device_name(device: 'torch.device | str') -> str:
    """The product name of a GPU or of the processor."""
    device = torch.device(device)
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def precision() -> dict[str, Any]:
    """How float32 products are computed: TF32 is on where the precision is not 'highest'."""
    return {
        'float32_matmul_precision': torch.get_float32_matmul_precision(),
        'cudnn_allow_tf32': torch.backends.cudnn.allow_tf32,
    }


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [
        {
            'device': 'cpu',
            'name': device_name('cpu'),
            'threads': torch.get_num_threads(),
            'logical_cores': os.cpu_count(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                'device': f'cuda:{index}',
                'name': properties.name,
                'memory_gib': round(properties.total_memory / 2**30, 1),
                'capability': f'{properties.major}.{properties.minor}',
            }
        )
    return devices


def environment() -> dict[str, Any]:
    """Versions, devices, backends and defaults as plain JSON values.

    Raises:
        UserError: `HYDRA_VISION_BACKEND` holds an unknown name.
    """
    devices = _devices()
    reasons = backend_reasons()
    defaults = {}
    for kind in dict.fromkeys(device['device'].partition(':')[0] for device in devices):
        try:
            backend, why = default_backend(kind)
        except ValueError as error:
            raise UserError(str(error)) from error
        defaults[kind] = {'backend': backend, 'why': why, 'available': reasons[backend] is None}
    return {
        'versions': versions(),
        'devices': devices,
        'precision': precision(),
        'backends': {name: {'available': reason is None, 'missing': reason} for name, reason in reasons.items()},
        'defaults': defaults,
    }

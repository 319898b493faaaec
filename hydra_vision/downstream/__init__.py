"""Taking the backbones to other libraries. Each name is imported when it is first used: most need an extra."""

import importlib
from typing import Any

_HOME = {
    'SimpleFeaturePyramid': 'pyramid',
    'detector': 'detection',
    'export_aoti': 'export',
    'export_onnx': 'export',
    'quantized': 'quantization',
    'random_token_mask': 'ssl',
    'register_pyramid': 'timm_pyramid',
    'register_smp_encoder': 'smp',
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'.{_HOME[name]}', __name__), name)

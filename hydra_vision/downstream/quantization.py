"""int8 weights by torchao."""

import copy

from torch import nn

from ..errors import require

__all__ = ['quantized']

_KINDS = {'weight_only': 'Int8WeightOnlyConfig', 'dynamic': 'Int8DynamicActivationInt8WeightConfig'}


def quantized(model: nn.Module, kind: str = 'weight_only') -> nn.Module:
    """A copy of a model with int8 linear layers; decays, step sizes, convolutions and norms keep their precision.

    Args:
        model: Any timm model, in eval mode.
        kind: 'weight_only' (int8 weights, float products) or 'dynamic' (int8 activations as well, scaled per token).

    Raises:
        ImportError: torchao is not installed.
        ValueError: An unknown kind, or a model in training mode.
    """
    if kind not in _KINDS:
        raise ValueError(f'kind={kind!r}; allowed: {", ".join(map(repr, _KINDS))}')
    if model.training:
        raise ValueError('the model is in training mode; call model.eval()')
    torchao = require('torchao.quantization', 'quant')
    model = copy.deepcopy(model)
    # fc_D has few weights, and quantised it would be called: the mixer would not run fused
    torchao.quantize_(
        model,
        getattr(torchao, _KINDS[kind])(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and not name.endswith('fc_D'),
    )
    return model

"""Early signs of instability: norms of gradients and weights, step sizes and decays of Hydra layers.

A selective state space layer decays by `exp(A dt)` per token. Where dt diverges, decays go to 0 and the layer sees
nothing but the token itself; where dt vanishes, decays go to 1 and it averages over everything.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .. import Hydra

_MOST = 1_000_000  # decays per layer that quantiles are taken from; more are subsampled evenly
QUANTILES = {'decay_q05': 0.05, 'decay_q50': 0.5, 'decay_q95': 0.95}


def total_norm(tensors: Iterable[torch.Tensor]) -> float:
    """Euclidean norm over all given tensors, of sharded ones over all their shards; synchronizes with the device."""
    norm = torch.nn.utils.get_total_norm([tensor.detach() for tensor in tensors])
    return float(norm.full_tensor() if hasattr(norm, 'full_tensor') else norm)


@torch.no_grad()
def mixer_statistics(
    model: nn.Module, images: torch.Tensor | dict[str, torch.Tensor], amp: torch.dtype | None = None
) -> dict[str, dict[str, float]]:
    """Step sizes and decays of every Hydra layer of a model, over the tokens, heads and both directions of a batch.

    An extra forward pass of the plain model in evaluation mode, without gradients, with hooks that are removed
    afterwards: a compiled model is not touched, other training steps cost nothing, no random number is drawn.

    Args:
        model: Any model; one without Hydra layers gives nothing. Not the wrapper that `torch.compile` returns.
        images: (B, C, H, W) on the model's device, or a NaFlex batch, whose padding counts as tokens.
        amp: Autocast type, None for none.

    Returns:
        Layer name -> `dt_mean`, `dt_max`, and the 5 %, 50 % and 95 % quantiles of `exp(A dt)`, the share of the state
        that is left after one token (`decay_q05`, `decay_q50`, `decay_q95`).
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Hydra)}
    found: dict[str, dict[str, torch.Tensor]] = {}
    if not layers:
        return {}

    def hook(name: str):
        def note(layer: Hydra, inputs: tuple[torch.Tensor, ...]) -> None:
            found[name] = _layer_statistics(layer, inputs[0])

        return note

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    training = model.training
    model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, dtype=amp, enabled=amp is not None):
            model(images)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: {key: float(value) for key, value in values.items()} for name, values in found.items()}


def across_layers(layers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The worst layer's extremes (`dt_max`, `decay_q05`, `decay_q95`) and the mean of the rest; empty without layers.

    Args:
        layers: Of `mixer_statistics`.
    """
    if not layers:
        return {}
    worst = {'dt_max': max, 'decay_q05': min, 'decay_q95': max}
    columns = {key: [layer[key] for layer in layers.values()] for key in next(iter(layers.values()))}
    return {key: worst[key](cells) if key in worst else sum(cells) / len(cells) for key, cells in columns.items()}


def _layer_statistics(layer: Hydra, u: torch.Tensor) -> dict[str, torch.Tensor]:
    """Statistics of one layer for tokens u (B, L, d_model), as scalars on the device."""
    heads = layer.nheads
    raw = layer.in_proj(u)[..., -2 * heads :].float()  # (B, L, 2H)
    dt = F.softplus(raw.unflatten(-1, (2, heads)) + layer.dt_bias.float())  # (B, L, 2, H)
    dt = dt.clamp(layer.dt_limit_min, layer.dt_limit_max)
    decay = torch.exp(-torch.exp(layer.A_log.float()) * dt).flatten(0, 1)  # (B * L, 2, H)
    decay = decay[:: -(-decay.numel() // _MOST)].flatten()  # fewer tokens, but of all heads
    points = torch.tensor(list(QUANTILES.values()), device=decay.device)
    return {
        'dt_mean': dt.mean(),
        'dt_max': dt.max(),
        **dict(zip(QUANTILES, torch.quantile(decay, points), strict=True)),
    }

"""Other people's models with our mixers: the paper's drop-in replacement for attention layers, in one call."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Optional, Sequence, Set, Tuple, Union

import timm.layers
import torch
import torch.nn as nn
from timm.layers import DiffAttention, PatchDropout, trunc_normal_
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor

from . import mixers

__all__ = ['MixerAttention', 'SwapReport', 'swap_mixers']

_ATTENTIONS = (
    timm.layers.Attention,
    timm.layers.AttentionRope,
    BeitAttention,
    DiffAttention,
    EvaAttention,
    RelPosAttention,
)


class MixerAttention(nn.Module):
    """A mixer where a timm block has its attention: `attn(x)`, (B, L, C) -> (B, L, C).

    Args:
        mixer: The mixer.
        proj_drop: Dropout that followed the attention's last projection.
        drop_position: Ignore rotary and relative position encodings that the model hands over; False rejects them.
    """

    def __init__(self, mixer: nn.Module, proj_drop: nn.Module, drop_position: bool = False) -> None:
        super().__init__()
        self.mixer = mixer
        self.proj_drop = proj_drop
        self.drop_position = drop_position

    def forward(
        self,
        x: Tensor,
        attn_mask: Optional[Tensor] = None,
        is_causal: bool = False,
        rope: Optional[Tensor] = None,
        shared_rel_pos: Optional[Tensor] = None,
        shared_rel_pos_bias: Optional[Tensor] = None,
    ) -> Tensor:
        """Mix the tokens x (B, L, C).

        Raises:
            ValueError: A mask, or a position encoding that was not dropped on purpose: no mixer can apply them.
        """
        if attn_mask is not None or is_causal:
            raise ValueError('attn_mask and is_causal belong to attention; a mixer that replaced it has neither')
        position = rope is not None or shared_rel_pos is not None or shared_rel_pos_bias is not None
        if position and not self.drop_position:
            raise ValueError('rotary or relative position encoding: swap_mixers(..., drop_position=True) leaves it out')
        return self.proj_drop(self.mixer(x))

    @torch.jit.ignore
    def matrix(self, u: Tensor) -> Tensor:
        """The mixer's matrix (B, H, L, L)."""
        return self.mixer.matrix(u)


@dataclass(frozen=True)
class SwapReport:
    """What `swap_mixers` did.

    Attributes:
        mixer: Name of the mixer; of several, in their order, separated by commas.
        replaced: Names of the modules that it replaced.
        kept: Names of the attention modules that were left.
        parameters_before: Of the whole model.
        parameters_after: Of the whole model.
        attention_parameters: Of the attention modules that went.
        mixer_parameters: Of the mixers that came.
        dropped_position: Whether rotary or relative position encoding went with the attention.
    """

    mixer: str
    replaced: Tuple[str, ...]
    kept: Tuple[str, ...]
    parameters_before: int
    parameters_after: int
    attention_parameters: int
    mixer_parameters: int
    dropped_position: bool

    def __str__(self) -> str:
        change = self.parameters_after / self.parameters_before - 1
        lines = [
            f'{len(self.replaced)} attention modules -> {self.mixer} ({self.replaced[0]} ... {self.replaced[-1]})',
            f'parameters of the model   {self.parameters_before:>13,} -> {self.parameters_after:>13,} ({change:+.1%})',
            f'of the replaced modules   {self.attention_parameters:>13,} -> {self.mixer_parameters:>13,}',
        ]
        if self.kept:
            lines.append(f'attention that was kept: {", ".join(self.kept)}')
        if self.dropped_position:
            lines.append('rotary or relative position encoding is left out')
        return '\n'.join(lines)


def swap_mixers(
    model: nn.Module,
    mixer: Union[str, Sequence[str]] = 'hydra',
    *,
    blocks: Optional[Sequence[int]] = None,
    drop_position: bool = False,
    **mixer_kwargs: Any,
) -> nn.Module:
    """Replace the attention of a timm ViT by a mixer; MLPs, norms, layer scales, tokens, embeddings and head stay.

    Works on models of timm's blocks with an attention module: vit, deit, deit3, dinov2-style, eva, beit, naflexvit and
    others. The mixers start from new weights as in Hydra-ViT (every Linear trunc_normal(0.02)), on the device and in
    the dtype of the attention, so the model must be trained; what was trained elsewhere in it is kept. Class and
    register tokens stand first in the sequence, where the model has them. Patches that a model drops in training stay
    in order, since a scan over shuffled patches is another model.

    Args:
        model: The model; changed in place, and only when all mixers could be built.
        mixer: A name of `hydra_vision.mixers.list_mixers()`, or a sequence of names that repeats over the replaced
            modules.
        blocks: Which of the attention modules, in the model's order, negative from the end; None for all.
        drop_position: Needed where the attention itself encodes positions (RoPE, relative position bias), which a mixer
            cannot take over: True leaves the encoding out.
        **mixer_kwargs: The mixers' own arguments (`hydra_vision.mixers.arguments(mixer)`), all of them to each.
            `grid_size` and `num_prefix_tokens` come from the model. A data-independent mixer fits the model's
            present input size.

    Returns:
        The model, with `model.swap_report`, a `SwapReport` whose text is a table of the parameters.

    Raises:
        ValueError: No attention that can be swapped, a mixer or an index that does not exist, a position encoding that
            would be lost, a size that the mixer rejects.
        TypeError: An argument that the mixer does not take.
    """
    found = [(name, module) for name, module in model.named_modules() if type(module) in _ATTENTIONS]
    if not found:
        raise ValueError(
            f'model={type(model).__name__}: no attention that can be swapped; supported are the token attentions of '
            "timm's vit, deit, eva, beit and relpos blocks (not fused attention-MLP blocks, windows or feature maps)"
        )
    wanted = _wanted(blocks, len(found))
    for name in ('grid_size', 'num_prefix_tokens', 'prefix_position'):
        if name in mixer_kwargs:
            raise ValueError(f'{name}={mixer_kwargs[name]}; the model knows its tokens, leave it out')
    has_position = _hands_over_positions(model) or any(_has_relative_position(found[i][1]) for i in wanted)
    if has_position and not drop_position:
        raise ValueError(
            f'model={type(model).__name__}: its attention encodes positions (rotary or relative), which no mixer can '
            'take over; drop_position=True leaves the encoding out'
        )
    if drop_position and not has_position:
        raise ValueError('drop_position = True: the attention of this model encodes no positions')
    new = {}
    for i, (name, kwargs) in zip(wanted, mixers.repeat_pattern(mixer, mixer_kwargs, len(wanted))):
        kwargs.update(_layout(model, mixers.layout_arguments(name, **kwargs)))
        new[found[i][0]] = _replacement(name, found[i], kwargs, drop_position)

    before = _count(model)
    attention = sum(_count(found[i][1]) for i in wanted)
    for name, module in new.items():
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, module)
    for module in model.modules():
        if isinstance(module, PatchDropout) or type(module).__name__ == 'PatchDropoutWithIndices':
            module.ordered = True
    names = {f'{name}.mixer.{leaf}' for name, module in new.items() for leaf in _no_decay(module.mixer)}
    model.no_weight_decay = partial(_no_weight_decay, getattr(model, 'no_weight_decay', set), frozenset(names))
    model.swap_report = SwapReport(
        mixer=mixer if isinstance(mixer, str) else ', '.join(mixer),
        replaced=tuple(new),
        kept=tuple(name for name, _ in found if name not in new),
        parameters_before=before,
        parameters_after=_count(model),
        attention_parameters=attention,
        mixer_parameters=sum(_count(module) for module in new.values()),
        dropped_position=has_position,
    )
    return model


def _wanted(blocks: Optional[Sequence[int]], count: int) -> Sequence[int]:
    if blocks is None:
        return range(count)
    for block in blocks:
        if not -count <= block < count:
            raise ValueError(f'blocks={list(blocks)}: there are {count} attention modules')
    if not blocks:
        raise ValueError('blocks is empty: nothing would be replaced')
    return sorted({block % count for block in blocks})


def _hands_over_positions(model: nn.Module) -> bool:
    """Whether the model computes a rotary or relative encoding once and gives it to every attention."""
    names = ('rope', 'shared_rel_pos', 'rel_pos_bias')
    return any(getattr(model, name, None) is not None for name in names)


def _has_relative_position(attention: nn.Module) -> bool:
    tables = ('rel_pos', 'relative_position_bias_table')
    return any(getattr(attention, table, None) is not None for table in tables)


def _layout(model: nn.Module, arguments: Tuple[str, ...]) -> dict:
    """What the mixer has to know of the model's tokens: its prefix tokens stand first."""
    layout = {}
    if 'grid_size' in arguments:
        grid = getattr(getattr(model, 'patch_embed', None), 'grid_size', None)
        if grid is None:
            raise ValueError(
                f'model={type(model).__name__} has no patch grid of fixed size; choose a mixer that needs none'
            )
        layout['grid_size'] = tuple(grid)
    if 'num_prefix_tokens' in arguments:
        layout['num_prefix_tokens'] = getattr(model, 'num_prefix_tokens', 0)
    return layout


def _replacement(mixer: str, found: Tuple[str, nn.Module], kwargs: dict, drop_position: bool) -> MixerAttention:
    name, attention = found
    weight = attention.proj.weight
    projection = next(
        module for module in (getattr(attention, key, None) for key in ('qkv', 'q_proj', 'q')) if module is not None
    )
    d_model = projection.weight.shape[1]
    if weight.shape[0] != d_model:
        raise ValueError(f'{name} goes from {d_model} to {weight.shape[0]} channels; a mixer keeps their number')
    built = mixers.create(mixer, d_model, device=weight.device, dtype=weight.dtype, **kwargs)
    for module in built.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return MixerAttention(built, attention.proj_drop, drop_position).train(attention.training)


def _no_decay(mixer: nn.Module) -> Set[str]:
    return mixer.no_weight_decay() if hasattr(mixer, 'no_weight_decay') else set()


def _no_weight_decay(own: Any, names: frozenset) -> Set[str]:
    """Parameters of a swapped model that should not use weight decay: its own, and those of the mixers."""
    return set(own()) | names


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())

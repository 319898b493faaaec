"""torch.library operators: what torch.compile and torch.export see instead of the autograd.Functions of eager mode."""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from .chunks import in_chunks
from .function import mix_backward_all, mix_forward_all
from .inner import KernelArguments, inner_backward, inner_forward, padded_row

__all__ = ['hydra_inner_op', 'quasiseparable_mix_op']

# Strides are arguments of the kernels: the compiler may leave inputs as they are instead of copying them.
_ANY_LAYOUT = {'tags': (torch.Tag.flexible_layout,)}
_TENSORS = 9  # of hydra_inner: the rest of its arguments are numbers
# What InnerArguments holds, dt_limit as two numbers, whether the norm may be applied late before the segments.
_INNER = (
    'Tensor zxbcdt, Tensor conv_weight, Tensor? conv_bias, Tensor dt_bias, Tensor A_log, Tensor D, Tensor fc_D_weight, '
    'Tensor norm_weight, Tensor? init_states, int headdim, int d_state, int ngroups, bool share_bc, float dt_min, '
    'float dt_max, float eps, bool late, Tensor? segments'
)
_MIX = (
    'Tensor x, Tensor dt_f, Tensor dt_b, Tensor A, Tensor B_f, Tensor C_f, Tensor B_b, Tensor C_b, Tensor? D, '
    'Tensor? init_states'
)


def _operator(name: str, schema: str) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    return torch.library.custom_op(f'hydra_vision::{name}', mutates_args=(), schema=schema, **_ANY_LAYOUT)


def _arguments(arguments: Sequence[Any]) -> tuple[KernelArguments, bool]:
    *front, dt_min, dt_max, eps, late, segments = arguments
    return KernelArguments(*front, (dt_min, dt_max), eps, segments), late


def _present(grads: tuple[Optional[Tensor], ...], like: Tensor) -> list[Tensor]:
    """An operator cannot return None: an absent gradient is an empty tensor."""
    return [like.new_empty(0) if g is None else g for g in grads]


def _absent(grads: list[Tensor], inputs: tuple[Optional[Tensor], ...]) -> list[Optional[Tensor]]:
    return [None if t is None else g for g, t in zip(grads, inputs)]


@_operator('hydra_inner', f'({_INNER}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)')
def hydra_inner_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``inner_forward`` returns."""
    return inner_forward(*_arguments(arguments))


@hydra_inner_op.register_fake
def _(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, fc_D_weight, norm_weight, init_states, *numbers):
    headdim, d_state, ngroups, *_, late, segments = numbers
    B, L, _ = zxbcdt.shape
    H = dt_bias.shape[0]
    out = zxbcdt.new_empty(B, L, H * headdim)
    rstd = zxbcdt.new_empty(B, L, dtype=torch.float32)
    y = torch.empty_like(out) if zxbcdt.dtype == torch.float16 else zxbcdt.new_empty(0)
    d_conv, starts = conv_weight.shape[-1], init_states is not None
    fits = in_chunks(zxbcdt.device, zxbcdt.dtype, H, headdim, ngroups, d_state, d_conv, starts)
    nothing = rstd.new_empty(0)
    factors, rstd = (rstd, nothing) if late and fits and segments is None else (nothing, rstd)
    return out, factors, y, rstd, zxbcdt.new_empty(B, H, L, dtype=torch.float32)


@_operator(
    'hydra_inner_backward', f'(Tensor dout, Tensor out, Tensor y, Tensor rstd, Tensor diag, {_INNER}) -> Tensor[]'
)
def _hydra_inner_backward(
    dout: Tensor, out: Tensor, y: Tensor, rstd: Tensor, diag: Tensor, *arguments: Any
) -> list[Tensor]:
    return _present(inner_backward(*_arguments(arguments), out, y, rstd, diag, dout), dout)


@_hydra_inner_backward.register_fake
def _(dout, out, y, rstd, diag, *arguments):
    zxbcdt, *parameters = arguments[:_TENSORS]
    dz = zxbcdt.new_empty(*zxbcdt.shape[:-1], padded_row(zxbcdt))[..., : zxbcdt.shape[-1]]
    return [dz] + [dout.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
                   for t in parameters]  # fmt: skip


def _inner_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, factors, y, rstd, diag = output
    ctx.save_for_backward(*inputs[:_TENSORS], inputs[-1], out, y, rstd if rstd.ndim == 2 else factors, diag)
    ctx.numbers = inputs[_TENSORS:-1]
    ctx.mark_non_differentiable(*output[1:])


def _inner_grads(ctx: Any, dout: Tensor, *unused: Any) -> tuple[Any, ...]:
    *tensors, segments, out, y, rstd, diag = ctx.saved_tensors
    grads = _hydra_inner_backward(dout, out, y, rstd, diag, *tensors, *ctx.numbers, segments)
    return *_absent(grads, tuple(tensors)), *(None for _ in ctx.numbers), None


hydra_inner_op.register_autograd(_inner_grads, setup_context=_inner_setup)


@_operator('quasiseparable_mix', f'({_MIX}) -> Tensor')
def quasiseparable_mix_op(*arguments: Optional[Tensor]) -> Tensor:
    """y (B, L, H, P)."""
    return mix_forward_all(*arguments)


@quasiseparable_mix_op.register_fake
def _(x, *others):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_operator('quasiseparable_mix_backward', f'(Tensor dy, {_MIX}) -> Tensor[]')
def _quasiseparable_mix_backward(dy: Tensor, *arguments: Optional[Tensor]) -> list[Tensor]:
    return _present(mix_backward_all(dy, *arguments), dy)


@_quasiseparable_mix_backward.register_fake
def _(dy, *arguments):
    return [dy.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
            for t in arguments]  # fmt: skip


def _mix_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _mix_grads(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return tuple(_absent(_quasiseparable_mix_backward(dy, *ctx.saved_tensors), ctx.saved_tensors))


quasiseparable_mix_op.register_autograd(_mix_grads, setup_context=_mix_setup)

"""Autograd for eager mode: a custom op costs more than a hundred microseconds a call, a Function a few."""

from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .inner import InnerArguments, inner_backward, inner_forward
from .mixing import DtSource, decays, decays_backward, mix_backward, mix_forward, start_gradient
from .plan import Plan, make_plan

__all__ = [
    'HydraInner',
    'QuasiseparableMix',
    'mix_backward_all',
    'mix_forward_all',
    'refuse_second_derivatives',
    'refuse_transforms',
]


def refuse_second_derivatives() -> None:
    """Grad mode is on in a backward pass only where its own graph is wanted."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "backend 'triton' has no second derivatives (create_graph=True was given); use backend 'chunked' for them"
        )


def refuse_transforms() -> None:
    """Inside ``torch.func.grad`` a kernel would be given wrappers of tensors; forward mode would get zero tangents."""
    if forward_ad._current_level >= 0 or (
        not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    ):
        raise RuntimeError(
            "backend 'triton' cannot run in forward-mode differentiation or inside the transforms of torch.func "
            "(grad, vmap, ...); use backend 'chunked' for them"
        )


class HydraInner(torch.autograd.Function):
    """``hydra_inner``. Saves its arguments, its output and rstd; convolution, decays and scores are computed again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Tensors and numbers in the order of ``InnerArguments``."""
        a = InnerArguments(*arguments)
        out, *saved = inner_forward(a)
        ctx.save_for_backward(*arguments[:9], out, *saved)
        ctx.numbers = arguments[9:]
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        """Gradients of the nine tensors; None for the numbers."""
        refuse_second_derivatives()
        *tensors, out, y, rstd, diag = ctx.saved_tensors
        grads = inner_backward(InnerArguments(*tensors, *ctx.numbers), out, y, rstd, diag, dout)
        return *grads, *(None for _ in ctx.numbers)


def _reachable(t: Tensor) -> bool:
    """Whether the kernels can step through the last two dimensions: heads or groups in 32 bits, columns by one."""
    return t.stride(-1) == 1 and t.shape[-2] * t.stride(-2) < 2**31


def _common(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors with equal strides and a last stride of 1."""
    strides = tensors[0].stride()
    if _reachable(tensors[0]) and all(t.stride() == strides for t in tensors):
        return tensors
    return tuple(t.contiguous() for t in tensors)


def _mix_arguments(
    x: Tensor, dt_f: Tensor, dt_b: Tensor, A: Tensor, bc: tuple[Tensor, ...], D: Optional[Tensor]
) -> tuple[Plan, Tensor, DtSource, tuple[Tensor, ...], Optional[Tensor]]:
    B, L, H, P = x.shape
    G, N = bc[0].shape[2:]
    plan = make_plan(B, L, H, P, G, N, x)
    x = x if _reachable(x) else x.contiguous()
    if dt_f.dtype != dt_b.dtype:
        dt_f, dt_b = dt_f.float(), dt_b.float()
    dt_f, dt_b = _common(dt_f, dt_b)
    diag = None
    if D is not None and D.ndim == 1:
        diag = D.float().contiguous()
    elif D is not None:
        diag = D.float().transpose(1, 2).contiguous()
    return plan, x, DtSource(dt_f, dt_b, A.float().contiguous()), _common(*bc), diag


def mix_forward_all(
    x: Tensor,
    dt_f: Tensor,
    dt_b: Tensor,
    A: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D: Optional[Tensor],
    init_states: Optional[Tensor],
) -> Tensor:
    """y of ``quasiseparable_mix``."""
    plan, x, source, bc, diag = _mix_arguments(x, dt_f, dt_b, A, (B_f, C_f, B_b, C_b), D)
    if plan.B == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    start = None if init_states is None else init_states.float().contiguous()
    return mix_forward(plan, x, bc, decays(plan, source), diag, start)


def mix_backward_all(
    dy: Tensor,
    x: Tensor,
    dt_f: Tensor,
    dt_b: Tensor,
    A: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D: Optional[Tensor],
    init_states: Optional[Tensor],
) -> tuple[Optional[Tensor], ...]:
    """Gradients in the order of the arguments after dy."""
    inputs = (x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, D, init_states)
    plan, x, source, bc, diag = _mix_arguments(x, dt_f, dt_b, A, (B_f, C_f, B_b, C_b), D)
    if plan.B == 0:
        return tuple(None if t is None else torch.zeros_like(t) for t in inputs)
    start = None if init_states is None else init_states.float().contiguous()
    d = decays(plan, source)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dbc = tuple(torch.empty(bc[0].shape, dtype=x.dtype, device=x.device) for _ in range(4))
    g = mix_backward(plan, x, bc, d, diag, start, dy.contiguous(), dx, dbc)
    ddtf, ddtb = (torch.empty(dt_f.shape, dtype=torch.float32, device=x.device) for _ in range(2))
    dA = decays_backward(plan, source, g, ddtf, ddtb)[0].sum((0, 1))
    dD = None
    if D is not None:
        dD = (g.ddiag.sum((0, 1)) if D.ndim == 1 else g.ddiag).to(D.dtype)
    dB_f, dC_f, dB_b, dC_b = dbc
    dstart = None if init_states is None else start_gradient(g.dstart, init_states.dtype)
    return dx, ddtf.to(dt_f.dtype), ddtb.to(dt_b.dtype), dA.to(A.dtype), dB_f, dC_f, dB_b, dC_b, dD, dstart


class QuasiseparableMix(torch.autograd.Function):
    """``quasiseparable_mix``. Saves its arguments only."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, D, init_states."""
        ctx.save_for_backward(*arguments)
        return mix_forward_all(*arguments)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Optional[Tensor], ...]:
        """Gradients of the ten arguments."""
        refuse_second_derivatives()
        return mix_backward_all(dy, *ctx.saved_tensors)

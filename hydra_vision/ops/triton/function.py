"""Autograd for eager mode: a custom op costs more than a hundred microseconds a call, a Function a few."""

from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import chunks
from .inner import KernelArguments, inner_backward, inner_forward
from .mixing import DtSource, decays, decays_backward, mix_backward, mix_forward, start_gradient
from .plan import Plan, make_plan

__all__ = [
    'HydraInner',
    'QuasiseparableMix',
    'ScaleRows',
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
    def forward(ctx: Any, late: bool, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Tensors and numbers in the order of ``InnerArguments``. Returns out and factors as ``inner_forward``."""
        a = KernelArguments(*arguments)
        out, factors, y, rstd, diag = inner_forward(a, late)
        ctx.save_for_backward(*arguments[:9], a.segments, out, y, rstd if rstd.ndim == 2 else factors, diag)
        ctx.late, ctx.numbers = late, arguments[9:15]
        ctx.mark_non_differentiable(factors)
        return out, factors

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Any, ...]:
        """Gradients of the nine tensors; None for the numbers and the segments."""
        refuse_second_derivatives()
        *tensors, segments, out, y, rstd, diag = ctx.saved_tensors
        grads = inner_backward(KernelArguments(*tensors, *ctx.numbers, segments), ctx.late, out, y, rstd, diag, dout)
        return None, *grads, *(None for _ in ctx.numbers), None


class ScaleRows(torch.autograd.Function):
    """x (..., D) times factors (...) float32 that are constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor) -> Tensor:
        """In x's dtype."""
        ctx.save_for_backward(factors)
        return _scaled(x, factors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        """Gradient of x."""
        refuse_second_derivatives()
        return _scaled(g, *ctx.saved_tensors), None


def _scaled(x: Tensor, factors: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        chunks.scale_rows(x, factors.contiguous(), out)
    return out


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
    c = chunks.chunks_of(plan, init_states)
    if c is not None:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        chunks.forward(c, _in_rows(x), tuple(t[:, :, 0] for t in bc), source, diag, y.flatten(2))
        return y
    start = None if init_states is None else init_states.float().contiguous()
    return mix_forward(plan, x, bc, decays(plan, source), diag, start)


def _in_rows(x: Tensor) -> Tensor:
    """(B, L, H, P) -> (B, L, H * P); a copy where heads lie apart, or rows are expanded or not whole 16 bytes."""
    B, L, H, P = x.shape
    steps = (x.stride(0), x.stride(1))
    ready = x.stride(2) == P and not x.data_ptr() % 16 and all(step > 0 and step % 8 == 0 for step in steps)
    if not ready:
        return x.contiguous().view(B, L, H * P)
    return x.as_strided((B, L, H * P), (*steps, 1), x.storage_offset())


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
    c = chunks.chunks_of(plan, init_states)
    if c is not None:
        return _chunk_mix_backward(c, inputs, _in_rows(x), bc, source, diag, dy.contiguous().flatten(2))
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


def _chunk_mix_backward(
    c: chunks.Chunks, inputs: tuple[Optional[Tensor], ...], x: Tensor, bc: tuple[Tensor, ...], source: DtSource,
    diag: Optional[Tensor], dy: Tensor,
) -> tuple[Optional[Tensor], ...]:  # fmt: skip
    xin, dt_f, dt_b, A, _, _, _, _, D, _ = inputs
    dx = torch.empty_like(dy)
    dbc = tuple(torch.empty(c.B, c.L, 64, dtype=x.dtype, device=x.device) for _ in range(4))
    g = chunks.backward(c, x, tuple(t[:, :, 0] for t in bc), source, diag, dy, dx, dbc)
    ddtf, ddtb = (torch.empty(dt_f.shape, dtype=torch.float32, device=x.device) for _ in range(2))
    dA = chunks.decays_backward(c, source, g, ddtf, ddtb)[0].sum((0, 1))
    dD = None
    if D is not None:
        dots = chunks.head_dots(c, x, dy)
        dD = (dots.sum((0, 1)) if D.ndim == 1 else dots).to(D.dtype)
    grads = (ddtf.to(dt_f.dtype), ddtb.to(dt_b.dtype), dA.to(A.dtype))
    return dx.view(xin.shape), *grads, *(t.unsqueeze(2) for t in dbc), dD, None


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

"""Host side of everything between in_proj and out_proj: the kernels in order, both ways. No autograd here."""

from functools import partial
from typing import Any, Optional

import torch
import triton
from torch import Tensor

from ..arguments import InnerArguments
from . import chunks
from .conv import (
    conv7_backward_kernel,
    conv7_kernel,
    conv_activation_backward_kernel,
    conv_backward_kernel,
    conv_kernel,
    diagonal_kernel,
)
from .launch import launch
from .mixing import DtSource, decays, decays_backward, mix_backward, mix_forward, start_gradient
from .norm import norm_gate_backward_kernel, norm_gate_kernel, sum_parts_kernel
from .plan import Plan, alignment, fast_math, make_plan
from .replay import Results, replayed

__all__ = ['KernelArguments', 'inner_backward', 'inner_forward', 'padded_row']

TOKENS = 64  # a program of the diagonal and of convolutions that are not seven wide
CHANNELS = 64
SEGMENT = 256  # tokens a program of the seven-wide convolution
LANES = 256  # channels of it
BACKWARD_LANES = 128  # channels of its backward, one a thread
NORM_PROGRAMS = 1056  # eight a multiprocessor of the largest GPU that the table knows


class KernelArguments(InnerArguments):
    """``InnerArguments`` as kernels take them: rows of zxbcdt without gaps, parameters contiguous."""

    __slots__ = ()

    def __new__(cls, zxbcdt: Tensor, *others: Any) -> 'KernelArguments':
        """Copies what is a slice or an expanded tensor."""
        if zxbcdt.stride(-1) != 1:
            zxbcdt = zxbcdt.contiguous()
        parameters = (t if t is None or t.is_contiguous() else t.contiguous() for t in others[:8])
        return super().__new__(cls, zxbcdt, *parameters, *others[8:])

    def tensors(self) -> tuple[Optional[Tensor], ...]:
        """The nine tensors, in order."""
        return self[:9]

    def inputs(self, *others: Tensor) -> list[Tensor]:
        """All tensors that a pass reads, which may read others too."""
        return [t for t in (*self.tensors(), self.segments, *others) if t is not None]

    def form(self, name: str, *others: Tensor) -> tuple[Any, ...]:
        """All that decides which kernels run in the pass of this name, and how; the addresses do not."""
        z, *parameters = self.tensors()
        sizes = (self.headdim, self.d_state, self.ngroups, self.share_bc, *self.dt_limit, self.eps)
        numbers = (*sizes, self.segments is not None)
        dtypes = (None if t is None else t.dtype for t in (*parameters, *others))
        return (name, z.get_device(), z.dtype, z.shape, z.stride(), self.conv_weight.shape, self.H, *numbers, *dtypes)

    @property
    def width(self) -> int:
        """Channels of the convolution."""
        return self.conv_weight.shape[0]

    def chunks(self, plan: Plan) -> Optional[chunks.Chunks]:
        """Sizes, where the call runs in whole chunks; packed rows run in tiles."""
        if self.segments is not None:
            return None
        return chunks.chunks_of(plan, self.init_states, self.conv_weight.shape[-1])

    def plan(self) -> Plan:
        """Sizes of this call."""
        B, L, _ = self.zxbcdt.shape
        return make_plan(B, L, self.H, self.headdim, self.ngroups, self.d_state, self.zxbcdt)

    def dt_source(self) -> DtSource:
        """The dt columns of zxbcdt."""
        dt = self.zxbcdt[..., self.d_inner + self.width :]
        limit = None if tuple(self.dt_limit) == (0.0, float('inf')) else tuple(self.dt_limit)
        dt_f, dt_b = dt[..., : self.H], dt[..., self.H :]
        return DtSource(dt_f, dt_b, self.A_log, self.dt_bias, limit, True, True, self.segments)

    def borders(self) -> tuple[Tensor, dict[str, bool]]:
        """The segments (any tensor where there are none) and the flag of the convolutions that know them."""
        return (self.D if self.segments is None else self.segments), {'PACKED': self.segments is not None}

    def parts(self, xbc: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (B, L, H, P) and B_f, C_f, B_b, C_b (B, L, G, N), views of (B, L, width)."""
        B, L, _ = xbc.shape
        by, step, first = xbc.stride(0), xbc.stride(1), xbc.storage_offset()
        x = xbc.as_strided((B, L, self.H, self.headdim), (by, step, self.headdim, 1), first)
        G, N = self.ngroups, self.d_state
        first += self.d_inner
        count = 2 if self.share_bc else 4
        bc = tuple(xbc.as_strided((B, L, G, N), (by, step, N, 1), first + k * G * N) for k in range(count))
        return x, bc * 2 if self.share_bc else bc


def padded_row(zxbcdt: Tensor) -> int:
    """Elements of a row of zxbcdt's gradient in memory: whole 16 bytes, without which its products are slow."""
    unit = 16 // zxbcdt.element_size()
    return -(-zxbcdt.shape[-1] // unit) * unit


def _convolved(a: KernelArguments, plan: Plan) -> Tensor:
    """SiLU(conv(x, B, C)) (B, L, width)."""
    u = a.zxbcdt[..., a.d_inner :]
    K = a.conv_weight.shape[-1]
    out = torch.empty(plan.B, plan.L, a.width, dtype=plan.dtype, device=plan.device)
    bias = a.D if a.conv_bias is None else a.conv_bias
    tensors, sizes = (u, a.conv_weight, bias, out), (u.stride(0), u.stride(1), plan.L, a.width)
    flags = {'HAS_BIAS': a.conv_bias is not None, 'ALIGN': alignment(u, u.stride(0), u.stride(1))}
    if K == 7 and a.segments is None:
        grid = (triton.cdiv(a.width, LANES) * triton.cdiv(plan.L, SEGMENT) * plan.B,)
        launch(conv7_kernel, grid, *tensors, *sizes, SEGMENT, BC=LANES, **flags, **plan.options('conv7'))
    else:
        grid = (triton.cdiv(a.width, CHANNELS) * triton.cdiv(plan.L, TOKENS) * plan.B,)
        borders, packed = a.borders()
        flags |= {'K': K, 'TL': TOKENS, 'BC': CHANNELS, **packed}
        launch(conv_kernel, grid, *tensors, borders, *sizes, **flags, **plan.options('conv'))
    return out


def _diagonal(a: KernelArguments, plan: Plan, xbc: Tensor) -> Tensor:
    """fc_D(x) + D, (B, H, L) float32."""
    diag = torch.empty(plan.B, plan.H, plan.L, dtype=torch.float32, device=plan.device)
    HB = min(64, max(16, triton.next_power_of_2(a.H)))
    launch(diagonal_kernel, (triton.cdiv(plan.L, TOKENS) * plan.B, triton.cdiv(a.H, HB)),
        xbc, a.fc_D_weight, a.D, diag, xbc.stride(0), xbc.stride(1), plan.L, a.d_inner, a.H,
        HB=HB, TL=TOKENS, BC=CHANNELS, PREC=plan.precision, **plan.options('diagonal'),
    )  # fmt: skip
    return diag


def inner_forward(a: KernelArguments, late: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out (B, L, d_inner); the factors of its rows (B, L) float32; for the backward y, rstd (B, L), diagonal (B, H, L).

    late: where the kernels allow it, out is y * weight * SiLU(z) and its rows are still to be multiplied by the
    factors, after out_proj; these are rstd, which is empty then. Elsewhere factors are empty, (0,), and out is whole.

    y is (B, L, d_inner) in float16; in other dtypes it is empty, as the backward reads ``out`` instead (norm.py).
    """
    plan = a.plan()
    c = a.chunks(plan)
    late = late and c is not None
    if plan.B == 0:
        out = torch.empty(plan.B, plan.L, a.d_inner, dtype=plan.dtype, device=plan.device)
        rstd = torch.empty(plan.B, plan.L, dtype=torch.float32, device=plan.device)
        y, diag = out.new_empty(0 if plan.keeps_norm else out.shape), rstd.new_empty(0, plan.H, plan.L)
    elif c is None:
        out, y, rstd, diag = replayed(a.form('forward'), partial(_forward_kernels, a, plan), a.inputs())
    else:
        kernels = partial(_chunk_forward_kernels, a, plan, c, late)
        out, rstd, diag = replayed(a.form('late' if late else 'normalised'), kernels, a.inputs())
        y = out.new_empty(0)
    nothing = rstd.new_empty(0)
    return out, *((rstd, y, nothing) if late else (nothing, y, rstd)), diag


def _forward_kernels(a: KernelArguments, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rstd = torch.empty(plan.B, plan.L, dtype=torch.float32, device=plan.device)
    d = decays(plan, a.dt_source())
    xbc = _convolved(a, plan)
    diag = _diagonal(a, plan, xbc)
    x, bc = a.parts(xbc)
    y = mix_forward(plan, x, bc, d, diag, a.init_states).view(plan.B, plan.L, a.d_inner)
    out = y if plan.keeps_norm else torch.empty_like(y)
    z = a.zxbcdt
    launch(norm_gate_kernel, (plan.B * plan.L,),
        y, z, a.norm_weight, out, rstd, z.stride(0), z.stride(1), plan.L, a.d_inner, a.eps,
        DB=triton.next_power_of_2(a.d_inner), KEEPS=plan.keeps_norm, ALIGN=alignment(z, z.stride(0), z.stride(1)),
        **plan.options('norm'),
    )  # fmt: skip
    return out, y.new_empty(0) if plan.keeps_norm else y, rstd, diag


def _chunk_convolved(
    a: KernelArguments, plan: Plan, diag: Optional[Tensor]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """SiLU(conv(x, B, C)) (B, L, width), its x part and B_f, C_f, B_b, C_b (B, L, N); fills the diagonal (B, H, L)."""
    from .hopper_conv import convolve  # lazily: Gluon is looked for only where it runs

    xbc = torch.empty(plan.B, plan.L, a.width, dtype=plan.dtype, device=plan.device)
    fc = None if diag is None else chunks.narrow(a.fc_D_weight)
    u = a.zxbcdt[..., a.d_inner : a.d_inner + a.width]
    convolve(u, chunks.taps(a.conv_weight, a.conv_bias), fc, a.D, xbc, diag, a.d_inner)
    x, bc = a.parts(xbc)
    return xbc, xbc[..., : a.d_inner], tuple(t[:, :, 0] for t in bc)


def _chunk_forward_kernels(
    a: KernelArguments, plan: Plan, c: chunks.Chunks, late: bool
) -> tuple[Tensor, Tensor, Tensor]:
    diag = torch.empty(plan.B, plan.H, plan.L, dtype=torch.float32, device=plan.device)
    _, x, bc = _chunk_convolved(a, plan, diag)
    u = torch.empty(plan.B, plan.L, a.d_inner, dtype=plan.dtype, device=plan.device)
    squares = chunks.forward(c, x, bc, a.dt_source(), diag, u, a.zxbcdt[..., : a.d_inner], a.norm_weight)
    rstd = chunks.row_scale(c, squares, a.d_inner, a.eps)
    if not late:
        chunks.scale_rows(u, rstd, u)
    return u, rstd, diag


def _norm_backward(
    a: KernelArguments, plan: Plan, y: Tensor, rstd: Tensor, dout: Tensor, xbc: Tensor, dz: Tensor, late: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Writes the z columns of dz; returns dy (B, L, H, P), the diagonal's gradient (B, L, H), shares of w's and D's."""
    z, rows = a.zxbcdt, plan.B * plan.L
    dy = torch.empty(plan.B, plan.L, plan.H, plan.P, dtype=plan.dtype, device=plan.device)
    ddiag = torch.empty(plan.B, plan.L, plan.H, dtype=torch.float32, device=plan.device)
    per = triton.cdiv(rows, NORM_PROGRAMS)
    programs = triton.cdiv(rows, per)
    parts = [torch.empty(programs, n, dtype=torch.float32, device=plan.device) for n in (a.d_inner, a.H)]
    W = a.d_inner & -a.d_inner  # the largest power of two in it
    pieces = a.d_inner // W
    if pieces > 4 or W < plan.P:
        W, pieces = triton.next_power_of_2(a.d_inner), 1
    launch(norm_gate_backward_kernel, (programs,),
        dout, y, z, a.norm_weight, rstd, xbc, dy, ddiag, dz, *parts, z.stride(0), z.stride(1), dz.stride(0),
        dz.stride(1), a.width, plan.L, a.d_inner, rows, per,
        P=plan.P, W=W, PIECES=pieces, KEEPS=plan.keeps_norm, LATE=late, FAST=fast_math(plan.dtype, plan.device),
        ALIGN=alignment(z, z.stride(0), z.stride(1)), ALIGN_G=alignment(dz, dz.stride(0), dz.stride(1)),
        **plan.options('norm_backward'),
    )  # fmt: skip
    return dy, ddiag, *parts


def inner_backward(
    a: KernelArguments, late: bool, out: Tensor, y: Tensor, rstd: Tensor, diag: Tensor, dout: Tensor
) -> tuple[Optional[Tensor], ...]:
    """Gradients in the order of ``InnerArguments``: zxbcdt, conv_weight, ..., norm_weight, init_states.

    late, out, y, rstd, diag: of ``inner_forward``, rstd or the factors. dout: the gradient of out; where its rows were
    still to be multiplied by their factors, that with the factors taken for constants: what they depend on is here.
    """
    plan = a.plan()
    if plan.B == 0:
        _, *parameters = a.tensors()
        rows = torch.empty(plan.B, plan.L, padded_row(a.zxbcdt), dtype=plan.dtype, device=plan.device)
        return rows[..., : a.zxbcdt.shape[-1]], *(None if t is None else torch.zeros_like(t) for t in parameters)
    # contiguous as they were returned, unless a hook on saved tensors gave others back
    saved = tuple(t.contiguous() for t in (out if plan.keeps_norm else y, rstd, diag, dout))
    c = a.chunks(plan)
    late = late and c is not None
    kernels = partial(_backward_kernels if c is None else partial(_chunk_backward_kernels, c, late), a, plan, *saved)
    # B's and C's gradients of both directions are added by PyTorch, between kernels
    key = a.form('late backward' if late else 'backward', *saved)
    results = kernels() if a.share_bc else replayed(key, kernels, a.inputs(*saved))
    rows, xbc, ddiag, *sums, dstart = results
    with torch.autocast('cuda' if plan.device.type == 'cuda' else 'cpu', enabled=False):
        flat_x = xbc.view(-1, a.width)[:, : a.d_inner].to(plan.wide)
        dfc = ddiag.view(-1, a.H).to(plan.wide).T @ flat_x
    dconv, dbias, dnorm, dD, dA_log, ddt_bias = sums
    return (
        rows[..., : a.zxbcdt.shape[-1]],
        dconv.to(a.conv_weight.dtype),
        None if a.conv_bias is None else dbias.to(a.conv_bias.dtype),
        ddt_bias.to(a.dt_bias.dtype),
        dA_log.to(a.A_log.dtype),
        dD.to(a.D.dtype),
        dfc.to(a.fc_D_weight.dtype),
        dnorm.to(a.norm_weight.dtype),
        None if a.init_states is None else start_gradient(dstart, a.init_states.dtype),
    )


def _summed(a: KernelArguments, conv: Tensor, weight: Tensor, diag: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
    """The shares of parameters' gradients added up, float32.

    Returns:
        Gradients of the convolution's weight (width, 1, K) and bias, the norm's weight, D, A_log and dt_bias.
    """
    K, BC = a.conv_weight.shape[-1], 32
    shapes = ((a.width, 1, K), (a.width,), (a.d_inner,), (a.H,), (a.H,), (a.H,))
    sums = tuple(torch.empty(shape, dtype=torch.float32, device=conv.device) for shape in shapes)
    blocks = triton.cdiv((K + 1) * a.width, BC) + triton.cdiv(a.d_inner, BC) + 3 * triton.cdiv(a.H, BC)
    launch(sum_parts_kernel, (blocks,),
        conv, weight, diag, decay, *sums, conv[..., 0, 0].numel(), weight.shape[0], decay[0, ..., 0].numel(),
        a.width, a.d_inner, a.H, K=K, BR=64, BC=BC, num_warps=4,
    )  # fmt: skip
    return sums


def _backward_kernels(
    a: KernelArguments, plan: Plan, kept: Tensor, rstd: Tensor, diag: Tensor, dout: Tensor
) -> Results:
    """All kernels of the backward.

    Returns:
        dz (B, L, padded row); SiLU(conv(x, B, C)); the diagonal's gradient (B, L, H); the parameters' gradients of
        ``_summed``; the gradient of the initial states (B, H, 2, N, P) or None.
    """
    rows = torch.empty(plan.B, plan.L, padded_row(a.zxbcdt), dtype=plan.dtype, device=plan.device)
    dz = rows[..., : a.zxbcdt.shape[-1]]
    d = decays(plan, a.dt_source())
    xbc = _convolved(a, plan)
    dy, ddiag, *parts = _norm_backward(a, plan, kept, rstd, dout, xbc, dz)
    x, bc = a.parts(xbc)
    dxbc = torch.empty_like(xbc)
    dx, dbc = a.parts(dxbc)
    shared = _shared_grads(a, plan)
    dbc = dbc if shared is None else tuple(shared)
    g = mix_backward(plan, x, bc, d, diag, a.init_states, dy, dx, dbc, a.fc_D_weight, ddiag)
    _add_shared(a, dxbc, shared)
    ddt = dz[..., a.d_inner + a.width :]
    decay_part = decays_backward(plan, a.dt_source(), g, ddt[..., : a.H], ddt[..., a.H :])
    return rows, xbc, ddiag, *_summed(a, _conv_backward(a, plan, dxbc, dz), *parts, decay_part), g.dstart


def _shared_grads(a: KernelArguments, plan: Plan) -> Optional[Tensor]:
    """Where both directions share B and C: their gradients (4, B, L, G, N) float32, still apart."""
    if not a.share_bc:
        return None
    return torch.empty(4, plan.B, plan.L, plan.G, plan.N, dtype=torch.float32, device=plan.device)


def _add_shared(a: KernelArguments, dxbc: Tensor, shared: Optional[Tensor]) -> None:
    if shared is not None:
        _, (dB, dC, _, _) = a.parts(dxbc)
        dB.copy_(shared[0] + shared[2])
        dC.copy_(shared[1] + shared[3])


def _chunk_backward_kernels(
    c: chunks.Chunks, late: bool, a: KernelArguments, plan: Plan, kept: Tensor, rstd: Tensor, diag: Tensor, dout: Tensor
) -> Results:
    """As ``_backward_kernels``."""
    rows = torch.empty(plan.B, plan.L, padded_row(a.zxbcdt), dtype=plan.dtype, device=plan.device)
    dz = rows[..., : a.zxbcdt.shape[-1]]
    xbc, x, bc = _chunk_convolved(a, plan, None)
    dy, ddiag, *parts = _norm_backward(a, plan, kept, rstd, dout, xbc, dz, late)
    dxbc = torch.empty_like(xbc)
    shared = _shared_grads(a, plan)
    dbc = a.parts(dxbc)[1] if shared is None else tuple(shared)
    g = chunks.backward(
        c, x, bc, a.dt_source(), diag, dy.view(plan.B, plan.L, a.d_inner), dxbc, tuple(t[:, :, 0] for t in dbc),
        a.fc_D_weight, ddiag,
    )  # fmt: skip
    _add_shared(a, dxbc, shared)
    ddt = dz[..., a.d_inner + a.width :]
    decay_part = chunks.decays_backward(c, a.dt_source(), g, ddt[..., : a.H], ddt[..., a.H :])
    return rows, xbc, ddiag, *_summed(a, _conv_backward(a, plan, dxbc, dz), *parts, decay_part), None


def _conv_backward(a: KernelArguments, plan: Plan, dxbc: Tensor, dz: Tensor) -> Tensor:
    """dxbc in; writes the x, B, C columns of dz. Returns shares of the gradients of weight and bias, K + 1 rows."""
    u, du = a.zxbcdt[..., a.d_inner :], dz[..., a.d_inner :]
    K = a.conv_weight.shape[-1]
    bias = a.D if a.conv_bias is None else a.conv_bias
    align = {'ALIGN': alignment(u, u.stride(0), u.stride(1))}
    align_d = {'ALIGN_D': alignment(du, du.stride(0), du.stride(1))}
    flags = {'HAS_BIAS': a.conv_bias is not None}
    strides = (u.stride(0), u.stride(1), du.stride(0), du.stride(1))
    if K == 7 and a.segments is None:
        segments = triton.cdiv(plan.L, SEGMENT)
        part = torch.empty(plan.B, segments, 8, a.width, dtype=torch.float32, device=plan.device)
        launch(conv7_backward_kernel, (triton.cdiv(a.width, BACKWARD_LANES) * segments * plan.B,),
            u, a.conv_weight, bias, dxbc, du, part, u.stride(0), du.stride(0), plan.L, SEGMENT,
            SU=u.stride(1), SD=du.stride(1), C=a.width, BC=BACKWARD_LANES, FAST=fast_math(plan.dtype, plan.device),
            **flags, **plan.options('conv7_backward'),
        )  # fmt: skip
    else:
        tiles = triton.cdiv(plan.L, TOKENS)
        grid = (triton.cdiv(a.width, CHANNELS) * tiles * plan.B,)
        borders, packed = a.borders()
        launch(conv_activation_backward_kernel, grid,
            u, a.conv_weight, bias, dxbc, borders, u.stride(0), u.stride(1), plan.L, a.width,
            K=K, TL=TOKENS, BC=CHANNELS, **flags, **packed, **align, **plan.options('conv_activation_backward'),
        )  # fmt: skip
        part = torch.empty(plan.B, tiles, K + 1, a.width, dtype=torch.float32, device=plan.device)
        launch(conv_backward_kernel, grid,
            u, a.conv_weight, dxbc, du, part, borders, *strides, plan.L, a.width,
            K=K, TL=TOKENS, BC=CHANNELS, **packed, **align, **align_d, **plan.options('conv_backward'),
        )  # fmt: skip
    return part

"""Host side of everything between in_proj and out_proj: the kernels in order, forward and backward. No autograd here."""

from dataclasses import dataclass
from typing import Optional

import torch
import triton
from torch import Tensor

from .conv import conv_activation_backward_kernel, conv_backward_kernel, conv_kernel
from .mixing import Decays, DtSource, decays, decays_backward, mix_backward, mix_forward
from .norm import norm_gate_backward_kernel, norm_gate_kernel
from .plan import Plan, alignment, make_plan

__all__ = ['InnerArguments', 'inner_backward', 'inner_forward']

TOKENS = 64  # a program of the convolutions
CHANNELS = 64
NORM_PROGRAMS = 1056


@dataclass
class InnerArguments:
    """Tensors and numbers of ``hydra_inner``."""

    zxbcdt: Tensor
    conv_weight: Tensor
    conv_bias: Optional[Tensor]
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    fc_D_weight: Tensor
    norm_weight: Tensor
    init_states: Optional[Tensor]
    headdim: int
    d_state: int
    ngroups: int
    share_bc: bool
    dt_limit: tuple[float, float]
    eps: float

    def __post_init__(self) -> None:
        if self.zxbcdt.stride(-1) != 1:
            self.zxbcdt = self.zxbcdt.contiguous()
        self.conv_weight = self.conv_weight.contiguous()
        self.fc_D_weight = self.fc_D_weight.contiguous()
        if self.init_states is not None:
            self.init_states = self.init_states.contiguous()

    @property
    def H(self) -> int:
        """Heads."""
        return self.dt_bias.shape[0]

    @property
    def d_inner(self) -> int:
        """H * P."""
        return self.H * self.headdim

    @property
    def width(self) -> int:
        """Channels of the convolution."""
        return self.conv_weight.shape[0]

    def plan(self) -> Plan:
        """Sizes of this call."""
        B, L, _ = self.zxbcdt.shape
        return make_plan(B, L, self.H, self.headdim, self.ngroups, self.d_state, self.zxbcdt)

    def dt_source(self) -> DtSource:
        """The dt columns of zxbcdt."""
        dt = self.zxbcdt[..., self.d_inner + self.width :]
        limit = None if tuple(self.dt_limit) == (0.0, float('inf')) else tuple(self.dt_limit)
        return DtSource(dt[..., : self.H], dt[..., self.H :], self.A_log, self.dt_bias, limit, True, True)

    def parts(self, xbc: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (B, L, H, P) and B_f, C_f, B_b, C_b (B, L, G, N), views of (B, L, width)."""
        x = xbc[..., : self.d_inner].unflatten(-1, (self.H, self.headdim))
        gn = self.ngroups * self.d_state
        bc = xbc[..., self.d_inner :].split(gn, dim=-1)
        bc = tuple(t.unflatten(-1, (self.ngroups, self.d_state)) for t in bc)
        return x, bc * 2 if self.share_bc else bc


def _convolved(a: InnerArguments, plan: Plan) -> tuple[Tensor, Tensor]:
    """SiLU(conv(x, B, C)) (B, L, width) and the diagonal (B, H, Lp)."""
    u = a.zxbcdt[..., a.d_inner :]
    out = torch.empty(plan.B, plan.L, a.width, dtype=plan.dtype, device=plan.device)
    diag = plan.rows()
    conv_kernel[(triton.cdiv(plan.L, TOKENS) * plan.B,)](
        u, a.conv_weight, a.D if a.conv_bias is None else a.conv_bias, a.fc_D_weight, a.D, out, diag,
        u.stride(0), u.stride(1), plan.L, a.width, a.d_inner, a.H, plan.Lp, K=a.conv_weight.shape[-1],
        HB=max(16, triton.next_power_of_2(a.H)), TL=TOKENS, BC=CHANNELS, HAS_BIAS=a.conv_bias is not None,
        ALIGN=alignment(u, u.stride(0), u.stride(1)), PREC=plan.precision, **plan.options('conv'),
    )  # fmt: skip
    return out, diag


def _mixed(a: InnerArguments, plan: Plan) -> tuple[Tensor, Tensor, Decays]:
    d = decays(plan, a.dt_source())
    xbc, diag = _convolved(a, plan)
    return xbc, diag, d


def inner_forward(a: InnerArguments) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, L, d_inner), and for the backward y (B, L, d_inner) and rstd (B, L) float32."""
    plan = a.plan()
    rstd = torch.empty(plan.B, plan.L, dtype=torch.float32, device=plan.device)
    out = torch.empty(plan.B, plan.L, a.d_inner, dtype=plan.dtype, device=plan.device)
    if plan.B == 0:
        return out, torch.empty_like(out), rstd
    xbc, diag, d = _mixed(a, plan)
    x, bc = a.parts(xbc)
    y = mix_forward(plan, x, bc, d, diag, a.init_states)
    z = a.zxbcdt
    norm_gate_kernel[(plan.B * plan.L,)](
        y, z, a.norm_weight, out, rstd, z.stride(0), z.stride(1), plan.L, a.d_inner, a.eps,
        DB=triton.next_power_of_2(a.d_inner), ALIGN=alignment(z, z.stride(0), z.stride(1)), **plan.options('norm'),
    )  # fmt: skip
    return out, y.flatten(2), rstd


def inner_backward(a: InnerArguments, y: Tensor, rstd: Tensor, dout: Tensor) -> tuple[Optional[Tensor], ...]:
    """Gradients in the order of ``InnerArguments``: zxbcdt, conv_weight, ..., norm_weight, init_states."""
    plan = a.plan()
    z = a.zxbcdt
    dz = torch.empty(z.shape, dtype=plan.dtype, device=plan.device)
    if plan.B == 0:
        rest = (a.conv_weight, a.conv_bias, a.dt_bias, a.A_log, a.D, a.fc_D_weight, a.norm_weight, a.init_states)
        return dz, *(None if t is None else torch.zeros_like(t) for t in rest)
    rows = plan.B * plan.L
    dout = dout.contiguous()
    dy = torch.empty(plan.B, plan.L, plan.H, plan.P, dtype=plan.dtype, device=plan.device)
    per = triton.cdiv(rows, NORM_PROGRAMS)
    programs = triton.cdiv(rows, per)
    part_w = torch.empty(programs, a.d_inner, dtype=torch.float32, device=plan.device)
    norm_gate_backward_kernel[(programs,)](
        dout, y, z, a.norm_weight, rstd, dy, dz, part_w, z.stride(0), z.stride(1), dz.stride(0), dz.stride(1),
        plan.L, a.d_inner, rows, per, DB=triton.next_power_of_2(a.d_inner),
        ALIGN=alignment(z, z.stride(0), z.stride(1)), ALIGN_G=alignment(dz, dz.stride(0), dz.stride(1)),
        **plan.options('norm_backward'),
    )  # fmt: skip

    xbc, diag, d = _mixed(a, plan)
    x, bc = a.parts(xbc)
    dxbc = torch.empty_like(xbc)
    dx, dbc = a.parts(dxbc)
    shared = None
    if a.share_bc:
        shared = torch.empty(4, plan.B, plan.L, plan.G, plan.N, dtype=torch.float32, device=plan.device)
        dbc = tuple(shared)
    g = mix_backward(plan, x, bc, d, diag, a.init_states, dy, dx, dbc)
    if shared is not None:
        _, (dB, dC, _, _) = a.parts(dxbc)
        dB.copy_(shared[0] + shared[2])
        dC.copy_(shared[1] + shared[3])

    ddt = dz[..., a.d_inner + a.width :]
    dA_log, ddt_bias = decays_backward(plan, a.dt_source(), g, ddt[..., : a.H], ddt[..., a.H :])
    wide_x = xbc.view(rows, a.width)[:, : a.d_inner].to(plan.wide)
    dfc = g.ddiag.to(plan.wide).view(rows, a.H).T @ wide_x
    dconv_weight, dconv_bias = _conv_backward(a, plan, g.ddiag, dxbc, dz)
    return (
        dz,
        dconv_weight.to(a.conv_weight.dtype),
        None if a.conv_bias is None else dconv_bias.to(a.conv_bias.dtype),
        ddt_bias.to(a.dt_bias.dtype),
        dA_log.to(a.A_log.dtype),
        g.ddiag.sum((0, 1)).to(a.D.dtype),
        dfc.to(a.fc_D_weight.dtype),
        part_w.sum(0).to(a.norm_weight.dtype),
        None if a.init_states is None else g.dstart.to(a.init_states.dtype),
    )


def _conv_backward(a: InnerArguments, plan: Plan, ddiag: Tensor, dxbc: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    """dxbc in; writes the x, B, C columns of dz. Returns the gradients of the weight (width, 1, K) and bias (width,)."""
    u, du = a.zxbcdt[..., a.d_inner :], dz[..., a.d_inner :]
    K = a.conv_weight.shape[-1]
    align = alignment(u, u.stride(0), u.stride(1))
    tiles = triton.cdiv(plan.L, TOKENS)
    grid = (triton.cdiv(a.width, CHANNELS) * tiles * plan.B,)
    conv_activation_backward_kernel[grid](
        u, a.conv_weight, a.D if a.conv_bias is None else a.conv_bias, a.fc_D_weight, ddiag, dxbc,
        u.stride(0), u.stride(1), plan.L, a.width, a.d_inner, a.H, K=K, HB=max(16, triton.next_power_of_2(a.H)),
        TL=TOKENS, BC=CHANNELS, HAS_BIAS=a.conv_bias is not None, ALIGN=align, PREC=plan.precision,
        **plan.options('conv_activation_backward'),
    )  # fmt: skip
    part = torch.empty(plan.B, tiles, K + 1, a.width, dtype=torch.float32, device=plan.device)
    conv_backward_kernel[grid](
        u, a.conv_weight, dxbc, du, part, u.stride(0), u.stride(1), du.stride(0), du.stride(1), plan.L, a.width,
        K=K, TL=TOKENS, BC=CHANNELS, ALIGN=align, ALIGN_D=alignment(du, du.stride(0), du.stride(1)),
        **plan.options('conv_backward'),
    )  # fmt: skip
    part = part.sum((0, 1))
    return part[:K].T.unsqueeze(1), part[K]

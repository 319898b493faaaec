"""Everything between in_proj and out_proj of the Hydra mixer."""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import InnerArguments
from .dispatch import choose_backend
from .packed import check_cu_seqlens, segments_of, separated, set_apart
from .quasiseparable import mix_unchecked
from .reference import accumulation_dtype, scale

__all__ = [
    'hydra_inner',
    'hydra_inner_late',
    'mix_convolved',
    'scale_rows',
    'split_zxbcdt',
    'unpack_convolved',
]

NO_DT_LIMIT = (0.0, float('inf'))


def hydra_inner(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Optional[Tensor],
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    fc_D_weight: Tensor,
    norm_weight: Tensor,
    *,
    headdim: int,
    d_state: int,
    ngroups: int = 1,
    share_bc: bool = False,
    dt_limit: Tuple[float, float] = NO_DT_LIMIT,
    init_states: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
    eps: float = 1e-5,
    backend: str = 'auto',
) -> Tensor:
    """The Hydra mixer without its two projections (goombalab/hydra, ``hydra/modules/hydra.py``).

    Depthwise non-causal convolution + SiLU over [x, B, C]; dt = clamp(softplus(dt + dt_bias), dt_limit); mixing by
    ``quasiseparable_mix`` with A = -exp(A_log) and the diagonal fc_D(x) + D; y = RMSNorm(y) * norm_weight * SiLU(z).

    Args:
        zxbcdt: (B, L, 2 * d_inner + k * G * N + 2 * H), the output of in_proj in the order
            [z | x, B_f, C_f, B_b, C_b | dt_f, dt_b], k = 4; with ``share_bc`` [z | x, B, C | dt_f, dt_b], k = 2.
        conv_weight: (d_inner + k * G * N, 1, d_conv), d_conv odd.
        conv_bias: (d_inner + k * G * N,) or None.
        dt_bias: (H,), shared by both directions.
        A_log: (H,).
        D: (H,).
        fc_D_weight: (H, d_inner).
        norm_weight: (d_inner,).
        headdim: P.
        d_state: N.
        ngroups: G, divides H.
        share_bc: one B and one C for both directions.
        dt_limit: (min, max) of dt after softplus.
        init_states: (H, P, N) or None; the state from which both directions start.
        cu_seqlens: as in ``quasiseparable_mix``; the convolution does not cross borders either.
        eps: of the RMS norm.
        backend: as in ``quasiseparable_mix``. 'triton' runs all of it fused, the others only mix by the named backend.

    A, dt, the decays and the norm's statistics are computed in float32 (float64 for float64 input) whatever the dtype
    of ``zxbcdt``; the parameters may be wider than it, as they are under autocast.

    Returns:
        (B, L, d_inner), dtype of ``zxbcdt``: ready for out_proj.

    Raises:
        ValueError: a shape or device that does not fit, an even d_conv, an empty dt_limit, an unknown backend.
        TypeError: ``zxbcdt`` is not a floating-point tensor.
        RuntimeError: the named backend cannot run here.
    """
    arguments = InnerArguments(
        zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, fc_D_weight, norm_weight, init_states,
        headdim, d_state, ngroups, share_bc, dt_limit, eps,
    )  # fmt: skip
    return hydra_inner_late(arguments, cu_seqlens, backend, late=False)[0]


def hydra_inner_late(
    a: InnerArguments, cu_seqlens: Optional[Tensor] = None, backend: str = 'auto', late: bool = True
) -> Tuple[Tensor, Optional[Tensor]]:
    """``hydra_inner`` that may leave the norm's division for after out_proj: a factor a token commutes with it.

    Args:
        a: Checked here; ``segments`` follow from ``cu_seqlens``.
        cu_seqlens: As in ``hydra_inner``, like ``backend``.
        backend: Likewise.
        late: False for what ``hydra_inner`` returns, and None.

    Returns:
        out (B, L, d_inner) and None; or, where the backend fuses the gate with the mixing, y * norm_weight * SiLU(z)
        without the norm and its factors (B, L), float32: ``scale_rows`` multiplies the rows of out_proj's result
        (without bias) by them. They are constants to autograd: the gradient of what they depend on is part of that of
        out, so out must go nowhere else.
    """
    _check_inner(a)
    zxbcdt = a.zxbcdt
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, zxbcdt, a.init_states)
        a = a._replace(segments=segments_of(cu_seqlens, zxbcdt.shape[1]))
    name = choose_backend(backend, zxbcdt.device)
    if name == 'triton':
        from .triton.api import hydra_inner as fused  # lazily: importing hydra_vision must not import Triton

        return fused(a, late)

    dtype, acc = zxbcdt.dtype, accumulation_dtype(zxbcdt.dtype)
    z, xbc, dt = split_zxbcdt(zxbcdt, a.d_inner, a.H)
    if cu_seqlens is None:
        xbc = F.silu(depthwise_conv(xbc, a.conv_weight, a.conv_bias))
    else:
        apart, place = set_apart(xbc, cu_seqlens, a.conv_weight.shape[-1] // 2)
        xbc = F.silu(depthwise_conv(apart, a.conv_weight, a.conv_bias).index_select(1, place))
    y = mix_convolved(
        xbc,
        dt,
        F.linear(xbc[..., : a.d_inner], a.fc_D_weight.to(dtype)),
        a.dt_bias,
        a.A_log,
        a.D,
        a.init_states,
        headdim=a.headdim,
        d_state=a.d_state,
        ngroups=a.ngroups,
        share_bc=a.share_bc,
        dt_limit=a.dt_limit,
        backend=name,
        segments=a.segments,
    ).to(acc)
    mean_square = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square() / a.d_inner
    y = scale(scale(y, torch.rsqrt(mean_square + a.eps)), a.norm_weight.to(acc))
    return scale(y, F.silu(z.to(acc))).to(dtype), None


def scale_rows(x: Tensor, factors: Tensor) -> Tensor:
    """x (B, L, D) with its rows multiplied by the factors (B, L) of ``hydra_inner_late``; in x's dtype."""
    from .triton.api import scale_rows as fused  # only Triton's backend returns factors

    return fused(x, factors)


def mix_convolved(
    xbc: Tensor,
    dt: Tensor,
    fc_D: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    init_states: Optional[Tensor],
    *,
    headdim: int,
    d_state: int,
    ngroups: int,
    share_bc: bool,
    dt_limit: Tuple[float, float],
    backend: str,
    segments: Optional[Tensor] = None,
) -> Tensor:
    """What ``hydra_inner`` does between its convolution and its norm; arguments as there, all of them known to fit.

    Args:
        xbc: (B, L, d_inner + k * G * N), convolution and SiLU done.
        dt: (B, L, 2 * H), as it leaves in_proj.
        fc_D: fc_D(x), (B, L, H).
        segments: (L,), the sequence of each token of a packed row; None for one sequence a row.

    Returns:
        y (B, L, d_inner), dtype of ``xbc``.
    """
    acc = accumulation_dtype(xbc.dtype)
    x, dt_f, dt_b, *BC = unpack_convolved(xbc, dt, dt_bias, headdim, d_state, ngroups, share_bc, dt_limit)
    A, diagonal = -torch.exp(A_log.to(acc)), fc_D + D.to(acc)
    name = choose_backend(backend, xbc.device)
    x = x.unflatten(-1, (dt_bias.shape[0], headdim))
    if segments is not None:
        dt_f, dt_b, BC[0], BC[2] = separated(segments, dt_f, dt_b, A, BC[0], BC[2])
    return mix_unchecked(name, x, dt_f, dt_b, A, *BC, diagonal.to(acc), init_states).flatten(-2)


def unpack_convolved(
    xbc: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    headdim: int,
    d_state: int,
    ngroups: int,
    share_bc: bool,
    dt_limit: Tuple[float, float],
) -> Tuple[Tensor, ...]:
    """x (B, L, d_inner), dt_f, dt_b (B, L, H), B_f, C_f, B_b, C_b (B, L, G, N); softplus and clamp of dt are done.

    Arguments as in ``mix_convolved``.
    """
    H = dt_bias.shape[0]
    acc = accumulation_dtype(xbc.dtype)
    dt = F.softplus(dt.to(acc).unflatten(-1, (2, H)) + dt_bias.to(acc))
    if tuple(dt_limit) != NO_DT_LIMIT:
        dt = dt.clamp(*dt_limit)
    dt_f, dt_b = dt.unbind(-2)
    width = ngroups * d_state
    x, *BC = xbc.split([H * headdim] + [width] * (2 if share_bc else 4), dim=-1)
    B_f, C_f, B_b, C_b = (t.unflatten(-1, (ngroups, d_state)) for t in (BC * 2 if share_bc else BC))
    return x, dt_f, dt_b, B_f, C_f, B_b, C_b


def split_zxbcdt(zxbcdt: Tensor, d_inner: int, H: int) -> Tuple[Tensor, Tensor, Tensor]:
    """Views z (B, L, d_inner), xBC (B, L, d_inner + k * G * N) and dt (B, L, 2 * H) of in_proj's output."""
    return zxbcdt.split([d_inner, zxbcdt.shape[-1] - d_inner - 2 * H, 2 * H], dim=-1)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """Same-padded depthwise convolution along L. x (B, L, C), weight (C, 1, K) -> (B, L, C).

    As a 2-D convolution of height 1 in channels-last memory: x is already in that layout, nothing is transposed.
    """
    C, _, K = weight.shape
    x = x.unsqueeze(1).permute(0, 3, 1, 2)  # (B, C, 1, L)
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x, weight.to(x.dtype).unsqueeze(2), bias, padding=(0, K // 2), groups=C)
    return y.permute(0, 2, 3, 1).squeeze(1)


def _check_inner(a: InnerArguments) -> None:
    zxbcdt, dt_bias, conv_weight, headdim = a.zxbcdt, a.dt_bias, a.conv_weight, a.headdim
    d_state, ngroups, share_bc, dt_limit = a.d_state, a.ngroups, a.share_bc, a.dt_limit
    if dt_bias.ndim != 1:
        raise ValueError(f'dt_bias has shape {tuple(dt_bias.shape)}; it must be (H,)')
    if not zxbcdt.dtype.is_floating_point:
        raise TypeError(f'zxbcdt has dtype {zxbcdt.dtype}; allowed: float16, bfloat16, float32, float64')
    H, d_inner = a.H, a.d_inner
    if ngroups < 1 or H % ngroups:
        raise ValueError(f'ngroups = {ngroups}; it must divide the number of heads H = {H}')
    conv_dim = d_inner + (2 if share_bc else 4) * ngroups * d_state
    width = d_inner + conv_dim + 2 * H
    if zxbcdt.ndim != 3 or zxbcdt.shape[-1] != width or zxbcdt.shape[1] < 1:
        raise ValueError(
            f'zxbcdt has shape {tuple(zxbcdt.shape)}; it must be (B, L, {width}), L >= 1, for headdim = {headdim}, '
            f'H = {H}, d_state = {d_state}, ngroups = {ngroups}, share_bc = {share_bc}'
        )
    d_conv = conv_weight.shape[-1]
    if d_conv % 2 == 0:
        raise ValueError(f'conv_weight has an even d_conv = {d_conv}; it must be odd to keep the length L')
    for name, t, shape in (
        ('conv_weight', conv_weight, (conv_dim, 1, d_conv)),
        ('conv_bias', a.conv_bias, (conv_dim,)),
        ('dt_bias', dt_bias, (H,)),
        ('A_log', a.A_log, (H,)),
        ('D', a.D, (H,)),
        ('fc_D_weight', a.fc_D_weight, (H, d_inner)),
        ('norm_weight', a.norm_weight, (d_inner,)),
        ('init_states', a.init_states, (H, headdim, d_state)),
    ):
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(f'{name} has shape {tuple(t.shape)}; it must be {shape}')
        if t is not None and t.device != zxbcdt.device:
            raise ValueError(f'{name} is on device {t.device}; it must be on that of zxbcdt, {zxbcdt.device}')
    low, high = dt_limit
    if not 0.0 <= low <= high:
        raise ValueError(f'dt_limit = {tuple(dt_limit)}; it must be (min, max) with 0 <= min <= max')

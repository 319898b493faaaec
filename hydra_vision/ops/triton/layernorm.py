"""LayerNorm for eager mode, alone or behind the residual sum: half precision in and out, float32 inside, one pass.

Under autocast PyTorch casts the input to float32, normalises, and casts back before the projection that follows: 770
MB of traffic for 154 MB of tokens (batch 256, 196 tokens, width 768), 1232 MB in the backward pass. Here it is 154 and
231 MB. The sum x + factors * branch, whose factors a row are the mixer's norm and the drop path, is another 385 MB in
passes of its own and 154 MB in the same pass; backward 385 MB (the gradients' sum, the factors) and 154 MB.
``torch.compile`` fuses all of it by itself, so this is for eager mode only.
"""

from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chunks
from .function import refuse_second_derivatives, refuse_transforms
from .launch import launch

__all__ = ['MAX_WIDTH', 'add_layer_norm', 'add_rows', 'layer_norm']

MAX_WIDTH = 4096  # a row lives in the registers of one program
FORWARD_TILE = 2048  # elements a program, forward
BACKWARD_TILE = 1024  # elements a step of a program, backward
PROGRAMS = 792  # of the backward pass: six a multiprocessor of the largest GPU that the table knows


@triton.jit
def _added(x, branch, factors, rows, at, keep, ROWS, ADDS: tl.constexpr, SCALES: tl.constexpr):
    """x + factors * branch of some rows in float32; x alone without ADDS, no factors without SCALES."""
    value = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    if ADDS:
        more = tl.load(branch + at, mask=keep, other=0.0).to(tl.float32)
        if SCALES:
            more *= tl.load(factors + rows, mask=rows < ROWS, other=0.0)[:, None]
        value += more
    return value


@triton.jit
def add_rows_kernel(
    x,  # (ROWS, D) contiguous
    branch,  # (ROWS, D) contiguous
    factors,  # (ROWS,) float32
    total,  # (ROWS, D) contiguous, out
    ROWS,
    D,
    RB: tl.constexpr,
    DB: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * RB + tl.arange(0, RB)
    d = tl.arange(0, DB)
    keep = (rows < ROWS)[:, None] & (d < D)[None, :]
    at = rows[:, None] * D + d[None, :]
    value = _added(x, branch, factors, rows, at, keep, ROWS, True, True)
    tl.store(total + at, value.to(total.dtype.element_ty), mask=keep)


@triton.jit
def layer_norm_kernel(
    x,  # (ROWS, D) contiguous
    branch,  # (ROWS, D) contiguous, with ADDS
    factors,  # (ROWS,) float32, with SCALES
    w,  # (D,)
    bias,  # (D,)
    total,  # (ROWS, D) contiguous, out, with ADDS
    out,  # (ROWS, D) contiguous, out
    mean,  # (ROWS,) float32, out
    rstd,  # (ROWS,) float32, out
    ROWS,
    D,
    EPS,
    ADDS: tl.constexpr,
    SCALES: tl.constexpr,
    RB: tl.constexpr,
    DB: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * RB + tl.arange(0, RB)
    d = tl.arange(0, DB)
    ok = d < D
    keep = (rows < ROWS)[:, None] & ok[None, :]
    at = rows[:, None] * D + d[None, :]
    xv = _added(x, branch, factors, rows, at, keep, ROWS, ADDS, SCALES)  # (RB, DB)
    if ADDS:  # the rows that are kept are those that are normalised, rounded: the backward pass reads them again
        rounded = xv.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=keep)
        xv = rounded.to(tl.float32)
    mv = tl.sum(xv, axis=1) / D  # (RB,)
    centred = tl.where(keep, xv - mv[:, None], 0.0)
    rv = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + EPS)
    wv = tl.load(w + d, mask=ok, other=0.0).to(tl.float32)  # (DB,)
    bv = tl.load(bias + d, mask=ok, other=0.0).to(tl.float32)
    o = centred * rv[:, None] * wv[None, :] + bv[None, :]
    tl.store(out + at, o.to(out.dtype.element_ty), mask=keep)
    tl.store(mean + rows, mv, mask=rows < ROWS)
    tl.store(rstd + rows, rv, mask=rows < ROWS)


@triton.jit
def layer_norm_backward_kernel(
    x,  # (ROWS, D) contiguous: what was normalised
    w,  # (D,)
    g,  # (ROWS, D) contiguous
    residual,  # (ROWS, D) contiguous, with ADDS: the gradient of x from where else it went
    factors,  # (ROWS,) float32, with SCALES
    mean,  # (ROWS,)
    rstd,  # (ROWS,)
    dx,  # (ROWS, D) contiguous, out
    dbranch,  # (ROWS, D) contiguous, out, with SCALES: factors * dx
    part,  # (2, programs, D) float32, out: gradients of weight and bias from the program's rows
    ROWS,
    D,
    PER,  # rows a program, a multiple of RB
    ADDS: tl.constexpr,
    SCALES: tl.constexpr,
    RB: tl.constexpr,
    DB: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, RB)
    d = tl.arange(0, DB)
    ok = d < D
    begin = pid * PER
    end = tl.minimum(begin + PER, ROWS)
    wv = tl.load(w + d, mask=ok, other=0.0).to(tl.float32)[None, :]  # (1, DB)
    dw = tl.zeros((RB, DB), tl.float32)
    db = tl.zeros((RB, DB), tl.float32)
    keep = (begin + r < end)[:, None] & ok[None, :]
    at = (begin + r)[:, None] * D + d[None, :]
    x_next = tl.load(x + at, mask=keep, other=0.0)  # (RB, DB)
    g_next = tl.load(g + at, mask=keep, other=0.0)
    if ADDS:
        residual_next = tl.load(residual + at, mask=keep, other=0.0)
    for start in range(begin, end, RB):
        xv = x_next.to(tl.float32)
        gv = g_next.to(tl.float32)
        here = start + r < end  # (RB,)
        keep = here[:, None] & ok[None, :]
        at = (start + r)[:, None] * D + d[None, :]
        # the next rows are on their way while these are reduced
        later = (start + RB + r < end)[:, None] & ok[None, :]
        x_next = tl.load(x + at + RB * D, mask=later, other=0.0)
        g_next = tl.load(g + at + RB * D, mask=later, other=0.0)
        mv = tl.load(mean + start + r, mask=here, other=0.0)
        rv = tl.load(rstd + start + r, mask=here, other=0.0)
        hat = tl.where(keep, (xv - mv[:, None]) * rv[:, None], 0.0)
        dw += gv * hat
        db += gv
        gw = gv * wv
        along = tl.sum(gw * hat, axis=1) / D  # (RB,)
        level = tl.sum(gw, axis=1) / D
        dxv = (gw - hat * along[:, None] - level[:, None]) * rv[:, None]
        if ADDS:
            dxv += residual_next.to(tl.float32)
            residual_next = tl.load(residual + at + RB * D, mask=later, other=0.0)
        tl.store(dx + at, dxv.to(dx.dtype.element_ty), mask=keep)
        if SCALES:
            dbv = dxv * tl.load(factors + start + r, mask=here, other=0.0)[:, None]
            tl.store(dbranch + at, dbv.to(dbranch.dtype.element_ty), mask=keep)
    programs = tl.num_programs(0)
    tl.store(part + pid * D + d, tl.sum(dw, axis=0), mask=ok)
    tl.store(part + (programs + pid) * D + d, tl.sum(db, axis=0), mask=ok)


def _sizes(x: Tensor, tile: int) -> tuple[int, int, int, dict[str, int]]:
    """Rows, width, rows a step, and the compile-time sizes with the number of warps."""
    D = x.shape[-1]
    DB = triton.next_power_of_2(D)
    RB = max(1, tile // DB)
    return x.numel() // D, D, RB, {'RB': RB, 'DB': DB, 'num_warps': 8 if DB > 2048 else 4}


def sum_of_rows(x: Tensor, branch: Tensor, factors: Tensor) -> Tensor:
    """x + factors * branch, in the wider dtype of the two. All are contiguous."""
    rows, D, RB, sizes = _sizes(x, FORWARD_TILE)
    total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype), device=x.device)
    if rows:
        launch(add_rows_kernel, (triton.cdiv(rows, RB),), x, branch, factors, total, rows, D, **sizes)
    return total


def forward(
    x: Tensor, branch: Optional[Tensor], factors: Optional[Tensor], weight: Tensor, bias: Tensor, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Everything is contiguous; factors only with a branch.

    Returns:
        x + factors * branch, in the wider dtype of the two (without a branch x itself); its norm (..., D) in ``dtype``;
        mean and rstd of every row in float32.
    """
    rows, D, RB, sizes = _sizes(x, FORWARD_TILE)
    total = x
    if branch is not None:
        total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype), device=x.device)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows:
        launch(layer_norm_kernel, (triton.cdiv(rows, RB),),
            x, x if branch is None else branch, mean if factors is None else factors, weight, bias, total, out, mean,
            rstd, rows, D, eps, ADDS=branch is not None, SCALES=factors is not None, **sizes,
        )  # fmt: skip
    return total, out, mean, rstd


def backward(
    g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, residual: Optional[Tensor] = None,
    factors: Optional[Tensor] = None, branch_dtype: Optional[torch.dtype] = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Everything is contiguous.

    Args:
        g: Gradient of the norm.
        x: What was normalised.
        weight: Of the norm.
        mean: As ``forward`` returned it, like ``rstd``.
        rstd: Likewise.
        residual: Gradient of x from elsewhere, that is added.
        factors: Of the branch.
        branch_dtype: Of the branch; None for x's.

    Returns:
        Gradient of x; factors times it in ``branch_dtype``; (2, D) float32: gradients of weight and bias.
    """
    rows, D, RB, sizes = _sizes(x, BACKWARD_TILE)
    dx = torch.empty_like(x)
    dbranch = dx if factors is None else torch.empty(x.shape, dtype=branch_dtype or x.dtype, device=x.device)
    per = RB * triton.cdiv(triton.cdiv(rows, RB), PROGRAMS)
    if rows:
        programs = triton.cdiv(rows, per)
        part = torch.empty(2, programs, D, dtype=torch.float32, device=x.device)
        launch(layer_norm_backward_kernel, (programs,),
            x, weight, g, g if residual is None else residual, mean if factors is None else factors, mean, rstd, dx,
            dbranch, part, rows, D, per, ADDS=residual is not None, SCALES=factors is not None, **sizes,
        )  # fmt: skip
        sums = part.sum(1)
    else:
        sums = torch.zeros(2, D, dtype=torch.float32, device=x.device)
    return dx, dbranch.to(branch_dtype or x.dtype), sums


def _in_rows(t: Optional[Tensor]) -> Optional[Tensor]:
    return None if t is None else t.contiguous()


class LayerNormFunction(torch.autograd.Function):
    """``layer_norm``. Saves x as it came, not a float32 copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """Arguments as in ``layer_norm``."""
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        _, out, mean, rstd = forward(x, None, None, weight, bias, eps, dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Optional[Tensor], ...]:
        """Gradients of x, weight and bias."""
        refuse_second_derivatives()
        x, weight, mean, rstd = map(_in_rows, ctx.saved_tensors)  # a hook may have given others back
        dx, _, (dw, db) = backward(g.contiguous(), x, weight, mean, rstd)
        return dx, dw.to(weight.dtype), db.to(ctx.bias_dtype), None, None


class AddLayerNorm(torch.autograd.Function):
    """``add_layer_norm``. Saves the sum and no summand."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, factors: Optional[Tensor], weight: Tensor, bias: Tensor, eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Arguments as in ``add_layer_norm``."""
        x, branch, factors, weight, bias = map(_in_rows, (x, branch, factors, weight, bias))
        total, out, mean, rstd = forward(x, branch, factors, weight, bias, eps, dtype)
        ctx.save_for_backward(total, weight, mean, rstd, factors)
        ctx.dtypes = x.dtype, branch.dtype, bias.dtype
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    def backward(ctx: Any, dtotal: Optional[Tensor], g: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        """Gradients of x, branch, weight and bias."""
        refuse_second_derivatives()
        total, weight, mean, rstd, factors = map(_in_rows, ctx.saved_tensors)  # a hook may have given others back
        x_dtype, branch_dtype, bias_dtype = ctx.dtypes
        g = torch.zeros_like(total) if g is None else g.contiguous()
        dx, dbranch, (dw, db) = backward(g, total, weight, mean, rstd, _in_rows(dtotal), factors, branch_dtype)
        return dx.to(x_dtype), dbranch, None, dw.to(weight.dtype), db.to(bias_dtype), None, None


class AddRows(torch.autograd.Function):
    """``add_rows``. Saves the factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, factors: Tensor) -> Tensor:
        """Arguments as in ``add_rows``."""
        x, branch, factors = x.contiguous(), branch.contiguous(), factors.contiguous()
        ctx.save_for_backward(factors)
        ctx.dtypes = x.dtype, branch.dtype
        return sum_of_rows(x, branch, factors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Optional[Tensor], ...]:
        """Gradients of x and branch."""
        refuse_second_derivatives()
        (factors,), (x_dtype, branch_dtype) = ctx.saved_tensors, ctx.dtypes
        dbranch = torch.empty(g.shape, dtype=branch_dtype, device=g.device)
        if g.numel():
            chunks.scale_rows(g.contiguous(), factors.contiguous(), dbranch)
        return g.to(x_dtype), dbranch, None


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    D = x.shape[-1]
    if not 1 <= D <= MAX_WIDTH:
        raise ValueError(f'x has shape {tuple(x.shape)}; its last dimension must be between 1 and {MAX_WIDTH}')
    for name, t in (('weight', weight), ('bias', bias)):
        if tuple(t.shape) != (D,):
            raise ValueError(f'{name} has shape {tuple(t.shape)}; it must be ({D},)')
    refuse_transforms()


def _check_branch(x: Tensor, branch: Tensor, factors: Optional[Tensor]) -> None:
    if branch.shape != x.shape:
        raise ValueError(f'branch has shape {tuple(branch.shape)}; it must be that of x, {tuple(x.shape)}')
    if factors is not None and (factors.shape != x.shape[:-1] or factors.dtype != torch.float32):
        form = f'{tuple(factors.shape)}, {factors.dtype}'
        raise ValueError(f'factors: {form}; it must be {tuple(x.shape[:-1])}, torch.float32')


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: (..., D), D <= ``MAX_WIDTH``, float16, bfloat16 or float32.
        weight: (D,), any of these dtypes.
        bias: (D,).
        eps: Added to the variance.
        dtype: Of the result.

    Raises:
        ValueError: D is too large, or weight and bias do not have D entries.
        RuntimeError: inside a transform of torch.func.
    """
    _check(x, weight, bias)
    return LayerNormFunction.apply(x, weight, bias, eps, dtype)


def add_layer_norm(
    x: Tensor, branch: Tensor, factors: Optional[Tensor], weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + factors * branch and its LayerNorm over the last dimension, in one pass.

    Args:
        x: (..., D), D <= ``MAX_WIDTH``, float16, bfloat16 or float32.
        branch: (..., D), any of these dtypes.
        factors: (...) float32, a factor a row, constant to autograd; None for no factors.
        weight: (D,), any of these dtypes.
        bias: (D,).
        eps: Added to the variance.
        dtype: Of the norm.

    Returns:
        The sum (..., D), rounded once, in the wider dtype of x and branch; the norm of what it was rounded to, in
        ``dtype``.

    Raises:
        ValueError: a shape that does not fit, or D is too large.
        RuntimeError: inside a transform of torch.func.
    """
    _check(x, weight, bias)
    _check_branch(x, branch, factors)
    return AddLayerNorm.apply(x, branch, factors, weight, bias, eps, dtype)


def add_rows(x: Tensor, branch: Tensor, factors: Tensor) -> Tensor:
    """x + factors * branch, as ``add_layer_norm`` and without the norm."""
    _check_branch(x, branch, factors)
    refuse_transforms()
    return AddRows.apply(x, branch, factors)

"""The operators in whole chunks, as they run on Hopper, in Triton's interpreter (see test_triton_interpreter.py).

The interpreter knows no Gluon: the three Gluon kernels are dense PyTorch here. Every other kernel and all of the host
code run as they are, in float32, because NumPy has no bfloat16. Fresh memory is NaN: what nobody computes nobody reads.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_checks import inner_arguments, mix_arguments, poison_memory, value_and_grads

from hydra_vision.ops import hydra_inner
from hydra_vision.ops.arguments import InnerArguments
from hydra_vision.ops.reference import mix_dense

pytestmark = pytest.mark.skipif(os.environ.get('TRITON_INTERPRET') != '1', reason='runs in the interpreter')
LENGTHS = [1, 7, 70, 130, 196, 201, *(pytest.param(L, marks=pytest.mark.slow) for L in (64, 200, 400))]


def chunked(c, t: Tensor, shift: int = 0) -> Tensor:
    """(B, L, W) -> (B * nC, rows, W), row r holds token r + shift; zero outside the sequence."""
    at = torch.arange(c.nC * c.rows) + shift
    inside = (at >= 0) & (at < c.L)
    out = torch.zeros(c.B, len(at), t.shape[-1])
    out[:, inside] = t[:, at[inside]]
    return out.view(c.B * c.nC, c.rows, -1)


def factors(c, table: Tensor) -> Tensor:
    """(B * nC, H, rows, rows): decay times dt of each pair, zero on the diagonal."""
    left, left_column, right, right_column = table[..., : c.rows].unbind(2)
    i = torch.arange(c.rows)
    exponent = torch.where(
        i[:, None] > i, left[..., None] - left_column[:, :, None], right[..., None] - right_column[:, :, None]
    )
    return torch.exp2(exponent.masked_fill(i[:, None] == i, float('-inf')))


def whole(c, S: Tensor) -> Tensor:
    """(B * nC, rows, rows) with zeros where a tile that is not whole has no scores."""
    known = 64 * c.full + c.tail
    assert S[:, :known, :known].isfinite().all()
    return F.pad(S[:, :known, :known], (0, c.rows - known) * 2)


def mix_chunks(c, v, out, S, table, diag, states, rows, transposed=False, gate=None, diagonal=None):
    """``hopper_mix.mix_chunks``: of a last tile that is not whole it reads the tail's scores only."""
    S = whole(c, S)
    vc = chunked(c, v[..., : c.H * 64]).unflatten(2, (c.H, 64))
    y = torch.einsum('chij,cjhp->cihp', factors(c, table) * S[:, None], vc)
    if diag is not None:
        y += chunked(c, diag.expand(c.B, c.H, c.L).mT if diag.ndim == 3 else diag.expand(c.B, c.L, c.H))[..., None] * vc
    if states is not None:
        shift = 0 if transposed else 1
        for side, direction in enumerate((1, 0) if transposed else (0, 1)):  # left, right
            read = chunked(c, rows[side], -shift if side == 0 else shift)
            state = states[:, :, direction].transpose(1, 2).flatten(0, 1)  # (B * nC, H, N, P)
            decay = torch.exp2(table[:, :, 2 * side, : c.rows])
            y += torch.einsum('cin,chnp,chi->cihp', read, state, decay)
    y = y.reshape(c.B, -1, c.H * 64)[:, : c.L]
    if diagonal is not None:
        fc, ddiag = diagonal
        y = y + ddiag @ fc
    if gate is not None:
        z, weight, squares = gate
        squares.copy_(y.unflatten(2, (c.H, 64)).square().sum(-1).mT)
        y = y * weight * F.silu(z[..., : c.H * 64])
    out[..., : c.H * 64] = y


def score_grads(c, x, dy, S, ST, table, row_sums, col_sums, dS, dST):
    """``hopper_scores.score_grads``: without the pairs among a tail, and nothing beyond it."""
    S, ST = whole(c, S), whole(c, ST)
    assert torch.equal(ST, S.mT)
    xc, yc = (chunked(c, t[..., : c.H * 64]).unflatten(2, (c.H, 64)) for t in (x, dy))
    grad = torch.einsum('cihp,cjhp->chij', yc, xc) * factors(c, table)
    G = grad * S[:, None]
    sizes = [64] * c.full + [c.tail] * (c.NT - c.full)
    for I in range(c.NT):
        i = slice(64 * I, 64 * I + sizes[I])
        for J in range(c.NT):
            j = slice(64 * J, 64 * J + sizes[J])
            if I == J and sizes[I] < 64:
                continue
            g = G[:, :, i, j]
            lower, upper = (g.tril(), g.triu()) if I == J else (g, g)
            row_sums[:, :, J, i], col_sums[:, :, I, j] = lower.sum(3), lower.sum(2)
            if I == J:
                col_sums[:, :, c.NT, j] = upper.sum(2)
                for plane, half in ((J, lower), (c.NT, upper)):  # the columns' halves apart
                    row_sums[:, :, plane, i] = half[..., :32].sum(3)
                    row_sums[:, :, c.NT + 1 + (plane == c.NT), i] = half[..., 32:].sum(3)
            sums = grad[:, :, i, j].sum(1)
            dS[:, I, J, : sizes[I], : sizes[J]], dST[:, J, I, : sizes[J], : sizes[I]] = sums, sums.mT


def convolve(x, taps, fc, D, out, diag, width):
    """``hopper_conv.convolve``."""
    C = x.shape[2]
    out[:] = F.silu(F.conv1d(x.mT, taps[:7].T[:, None], taps[7], padding=3, groups=C)).mT
    if fc is not None:
        diag[:] = (out[..., :width] @ fc.T + D).mT


@pytest.fixture(autouse=True)
def in_chunks(monkeypatch):
    """Whole chunks in float32; the sizes of the problems that ran so."""
    from hydra_vision.ops.triton import chunks, hopper_conv, hopper_mix, hopper_scores

    def chunks_of(plan, start=None, d_conv=7):
        found.append(chunks.Chunks(plan.B, plan.L, plan.H, plan.device, torch.float32))
        return found[-1]

    found = []
    for module, function in ((hopper_mix, mix_chunks), (hopper_scores, score_grads), (hopper_conv, convolve)):
        monkeypatch.setattr(module, function.__name__, function)
    monkeypatch.setattr(chunks, 'chunks_of', chunks_of)
    monkeypatch.setattr(chunks, 'narrow', lambda t: t)
    poison_memory(monkeypatch)
    yield found
    assert found


def check(found: list[Tensor], exact: list[Tensor], tolerance: float = 2e-5) -> None:
    errors = [float((a.double() - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(found, exact)]
    assert len(found) == len(exact)
    assert all(error < tolerance for error in errors), errors


@pytest.mark.parametrize('L', LENGTHS)
def test_mix_and_gradients(L, in_chunks):
    from hydra_vision.ops.triton.api import quasiseparable_mix

    B, H = (2, 3) if L in (7, 70) else (1, 2)
    tensors = mix_arguments(B, L, H, 64, 1, 64, D='head' if L == 130 else 'token')[:9]
    tensors[4:8] = [t / 8 for t in tensors[4:8]]
    exact = value_and_grads(lambda a: mix_dense(*a), [t.double() for t in tensors])
    check(value_and_grads(lambda a: quasiseparable_mix(*a), tensors), exact)
    c = in_chunks[0]
    assert (c.NT, c.nC) == ((4 if 192 < L <= 200 else min(3, -(-L // 64))), 1 if L <= 200 else -(-L // 192))


@pytest.mark.parametrize(('L', 'late', 'share_bc'), [(7, True, True), (70, False, False)])
def test_inner_and_gradients(L, late, share_bc):
    """With ``late`` the norm's factors are applied outside, here to the rows themselves."""
    from hydra_vision.ops.triton import api

    tensors = inner_arguments(2 if L == 7 else 1, L, 2, 64, 1, 64, share_bc=share_bc)[:8]
    numbers = {'headdim': 64, 'd_state': 64, 'ngroups': 1, 'share_bc': share_bc}
    exact = value_and_grads(lambda a: hydra_inner(*a, **numbers, backend='reference'), [t.double() for t in tensors])

    def ours(a):
        y, rows = api.hydra_inner(InnerArguments(*a, None, 64, 64, 1, share_bc, (0.0, float('inf')), 1e-5), late)
        assert (rows is not None) == late
        return api.scale_rows(y, rows) if late else y

    check(value_and_grads(ours, tensors), exact)


@pytest.mark.parametrize('scale', [0.0, 1e-4, 1e4])
def test_the_norm_applied_late(scale):
    """Rows of zeros, tiny and large rows: the factors carry the whole range."""
    from hydra_vision.ops.triton import api

    tensors = inner_arguments(1, 7, 2, 64, 1, 64)[:8]
    tensors[2] = torch.zeros_like(tensors[2])
    tensors[0][:, :, 128:256] *= scale
    numbers = {'headdim': 64, 'd_state': 64, 'ngroups': 1}
    exact = hydra_inner(*(t.double() for t in tensors), **numbers, backend='reference')
    y, rows = api.hydra_inner(InnerArguments(*tensors, None, 64, 64, 1, False, (0.0, float('inf')), 1e-5), late=True)
    check([y * rows[..., None]], [exact])

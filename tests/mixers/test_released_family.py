"""The matrix mixers of goombalab/hydra (``hydra/modules/matrix_mixers``) from their formulas, with their state dicts.

Where the released module is right, its weights give its outputs here after renaming. Where it is not (see
docs/mixers.md), the test says how the two differ.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_vision import mixers

L, D_MODEL, HEADS, P, QK = 12, 8, 4, 4, 3
D_INNER = HEADS * P
NAMES = {'q_matrix': 'q', 'k_matrix': 'k', 'M': 'M', 'bias': 'c', 'conv_params': 't', 'BC': 'BC'}


def released_state(kind: str, dd: bool) -> dict:
    """A state dict with the released names and shapes, random."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return 0.3 * torch.randn(*shape, dtype=torch.float64, generator=generator)

    extras = {'toeplitz': 2 * HEADS, 'dense': 0, 'dft': 0}.get(kind, 2 * HEADS * QK) if dd else 0
    steps = 2 * HEADS if kind == 'quasiseparable' and dd else 0
    state = {
        'in_proj.weight': randn(2 * D_INNER + extras + steps, D_MODEL),
        'conv1d.weight': randn(D_INNER + extras, 1, 7),
        'conv1d.bias': randn(D_INNER + extras),
        'norm.weight': 1 + randn(D_INNER),
        'out_proj.weight': randn(D_MODEL, D_INNER),
    }
    own = {}
    if kind == 'dense':
        own['M'] = randn(HEADS, L, L)
    elif kind == 'toeplitz' and not dd:
        own['conv_params'] = randn(HEADS, 2 * L - 1)
    elif kind in ('low_rank', 'cauchy', 'attention') and not dd:
        own['q_matrix'], own['k_matrix'] = randn(L, HEADS, QK), randn(L, HEADS, QK)
    elif kind == 'cauchy':
        own['bias'] = torch.tensor(0.5, dtype=torch.float64)
    elif kind == 'quasiseparable':
        own.update(dt_bias=randn(HEADS), A_log=randn(HEADS), D=randn(HEADS))
        own['fc_D.weight'] = randn(HEADS, D_INNER)
        if not dd:
            own['BC'] = randn(L, 2 * HEADS * QK)
    return {**state, **{f'matrix_mixer.{k}': v for k, v in own.items()}}


def ours(kind: str, dd: bool, state: dict) -> mixers.MatrixMixer:
    kwargs = dict(headdim=P, dtype=torch.float64)
    if kind not in ('dense', 'dft'):
        kwargs['data_dependent'] = dd
    if kind not in ('dense', 'dft', 'toeplitz', 'quasiseparable'):
        kwargs['qk_dim'] = QK
    if kind == 'quasiseparable':
        kwargs.update(d_state=HEADS * QK, share_bc=True)
    if kind == 'dense' or (kind != 'dft' and not dd):
        kwargs['grid_size'] = L
    mixer = mixers.create(kind, D_MODEL, **kwargs)
    renamed = {}
    for key, value in state.items():
        name = key.removeprefix('matrix_mixer.')
        renamed[NAMES.get(name, name)] = value.reshape(1) if name == 'bias' else value
    mixer.load_state_dict(renamed, strict=True)
    return mixer


def released(kind: str, dd: bool, s: dict, u: Tensor) -> Tensor:
    """The released forward pass by its formulas, max_seq_len = L."""
    projected = u @ s['in_proj.weight'].T
    width = s['conv1d.weight'].shape[0]
    z, x, dt = projected.split([D_INNER, width, projected.shape[-1] - D_INNER - width], -1)
    x = F.conv1d(x.mT, s['conv1d.weight'], s['conv1d.bias'], padding=3, groups=width).mT
    v, extras = F.silu(x[..., :D_INNER]), x[..., D_INNER:]
    heads = v.unflatten(-1, (HEADS, P))
    own = {k.removeprefix('matrix_mixer.'): t for k, t in s.items() if k.startswith('matrix_mixer.')}
    position = torch.arange(L, dtype=u.dtype)
    if kind == 'quasiseparable':
        y = released_quasiseparable(own, F.silu(extras), dt, v, dd)
    else:
        q, k = (t.unflatten(-1, (HEADS, QK)) for t in extras.chunk(2, -1)) if extras.shape[-1] > 2 * HEADS else (0, 0)
        if not dd and 'q_matrix' in own:
            q, k = own['q_matrix'][None], own['k_matrix'][None]
        if kind == 'dense':
            M = own['M'][None] / L**0.5
        elif kind == 'dft':
            M = (torch.cos(2 * math.pi * position[:, None] * position / L) / L**0.5)[None, None]
        elif kind == 'low_rank':
            q, k = (F.silu(t) if dd else t for t in (q, k))
            M = torch.einsum('bihd,bjhd->bhij', q, k) / (L * QK) ** 0.5
        elif kind == 'attention':
            M = (torch.einsum('bihd,bjhd->bhij', q, k) / QK**0.5).softmax(-1)
        elif kind == 'cauchy':
            q, k = (t.exp() + (own['bias'] if dd else 0.0) for t in (q, k))
            M = (1 / (q[:, :, None] + k[:, None] + 1e-8)).sum(-1).permute(0, 3, 1, 2) / (L * QK) ** 0.5
        elif kind == 'vandermonde':
            q, k = (torch.cos(2 * math.pi * 1e-3 * torch.einsum('bihd,j->bhijd', t, position)) for t in (q, k))
            M = (q - k.transpose(2, 3)).sum(-1) / (2 * L * QK) ** 0.5
        y = torch.einsum('bhij,bjhp->bihp', M.expand(u.shape[0], HEADS, L, L), heads).flatten(-2) + v
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * s['norm.weight'] * F.silu(z)
    return y @ s['out_proj.weight'].T


def released_quasiseparable(own: dict, BC: Tensor, dt: Tensor, v: Tensor, dd: bool) -> Tensor:
    """Two causal scans, the second over the flipped sequence, each read one token later; and the diagonal."""
    if not dd:
        BC = own['BC'].expand(v.shape[0], -1, -1)
        dt = torch.zeros(*v.shape[:2], 2 * HEADS, dtype=v.dtype)
    B, C = BC.chunk(2, -1)
    A = -own['A_log'].exp()
    x = v.unflatten(-1, (HEADS, P))

    def scan(dt, B, C, x):
        h, rows = 0, []
        for n in range(L):
            write = torch.einsum('bh,bn,bhp->bhpn', dt[:, n], B[:, n], x[:, n])
            h = torch.exp(A * dt[:, n])[..., None, None] * h + write
            rows.append(torch.einsum('bhpn,bn->bhp', h, C[:, n]))
        return torch.stack([torch.zeros_like(rows[0]), *rows[:-1]], 1)

    dt_f, dt_b = (F.softplus(t + own['dt_bias']) for t in dt.chunk(2, -1))
    y = scan(dt_f, B, C, x) + scan(*(t.flip(1) for t in (dt_b, B, C, x))).flip(1)
    return (y + x * (v @ own['fc_D.weight'].T + own['D']).unsqueeze(-1)).flatten(-2)


@pytest.mark.parametrize(
    ('kind', 'dd'),
    [
        ('dense', False),
        ('dft', False),
        ('low_rank', True),
        ('low_rank', False),
        ('cauchy', True),
        ('cauchy', False),
        ('attention', True),
        ('attention', False),  # the formula: the released code runs for L = heads only
        ('vandermonde', True),
        ('quasiseparable', True),
        ('quasiseparable', False),
    ],
)
def test_released_weights_give_released_outputs(kind, dd):
    state = released_state(kind, dd)
    u = torch.randn(2, L, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(kind, dd, state)(u), released(kind, dd, state, u), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('dd', [True, False])
def test_released_toeplitz_is_off_by_one(dd):
    """Its FFT of size 2L-1 over x padded by L-1 in front gives t_{i-j+1}, and t_{-(L-1)} in the place of t_L."""
    state = released_state('toeplitz', dd)
    mixer = ours('toeplitz', dd, state)
    u = torch.randn(2, L, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    M = mixer.matrix(u).detach()
    t = torch.cat([M[..., 0, :].flip(-1), M[..., 1:, 0]], -1)  # coefficients -(L-1) ... L-1, scaled as theirs
    v = torch.randn(2, HEADS, P, L, dtype=torch.float64)
    padded = F.pad(v, (L - 1, 0))
    theirs = torch.fft.ifft(torch.fft.fft(padded) * torch.fft.fft(t).unsqueeze(2)).real[..., :L]
    i = torch.arange(L)
    offset = i[:, None] - i[None, :] + 1
    shifted = t[..., torch.where(offset == L, 1 - L, offset) + L - 1]
    torch.testing.assert_close(theirs, torch.einsum('bhij,bhpj->bhpi', shifted, v))
    ours_y = torch.einsum('bhij,bhpj->bhpi', M, v)
    assert (ours_y - theirs).norm() > 0.5 * ours_y.norm()


@torch.no_grad()
def test_released_toeplitz_swaps_tokens_and_channels():
    """Their coefficients rolled by one give their matrix here; their result (B, P, H, L) is read as (B, L, H, P)."""
    mixer = mixers.create('toeplitz', 12, headdim=6, data_dependent=False, grid_size=6, dtype=torch.float64)
    v = torch.randn(2, 6, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    padded = F.pad(v.permute(0, 3, 2, 1), (5, 0))
    theirs = torch.fft.ifft(torch.fft.fft(padded) * torch.fft.fft(mixer.t)).real[..., :6] * 0.5 / 6**0.5
    mixer.t.copy_(mixer.t.roll(-1, -1))
    ours = mixer.mix(v, None, mixer.tokens)
    torch.testing.assert_close(ours, theirs.permute(0, 3, 2, 1))
    assert (ours - theirs).norm() > 0.5 * ours.norm()


def test_released_vandermonde_without_data_learns_nothing_and_ours_does():
    """Theirs multiplies token t by a sum over l of M[t, l], and starts where every cosine has gradient zero."""
    q = torch.zeros(QK, L, requires_grad=True)
    torch.cos(2 * math.pi * q[:, :, None] * torch.arange(L)).sum().backward()
    assert not q.grad.any()
    mixer = mixers.create('vandermonde', D_MODEL, headdim=P, data_dependent=False, grid_size=L)
    M = mixer.matrix(torch.zeros(1, L, D_MODEL))
    M.square().sum().backward()
    assert mixer.q.grad.abs().max() > 0
    assert mixer.k.grad.abs().max() > 0

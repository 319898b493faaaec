"""Every matrix of the family entry by entry, from its formula: what the tests hold the mixers to."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_vision import mixers

SS_VARIANTS = ('causal', 'add', 'mult', 'concat', 'add_diag', 'add_shift', 'quasiseparable')
SILU_ON_V_ONLY = ('attention', 'cauchy', 'vandermonde', 'm2')  # beside v also the extras in all other classes


def cases(**common) -> dict:
    """id -> (name, kwargs) of every matrix, small."""
    found = {}
    for name in ('attention', 'cauchy', 'low_rank', 'vandermonde'):
        for dd in (True, False):
            found[f'{name}-{"dd" if dd else "di"}'] = (name, dict(data_dependent=dd, qk_dim=3))
    for dd in (True, False):
        found[f'toeplitz-{"dd" if dd else "di"}'] = ('toeplitz', dict(data_dependent=dd))
        for variant in SS_VARIANTS:
            kwargs = dict(variant=variant, data_dependent=dd, d_state=3)
            found[f'{variant}-{"dd" if dd else "di"}'] = ('semiseparable', kwargs)
    for variant in ('add', 'concat', 'quasiseparable'):
        kwargs = dict(variant=variant, share_bc=True, d_state=2, ngroups=2, dt_limit=(0.02, 0.05))
        found[f'{variant}-shared'] = ('semiseparable', kwargs)
    found['dense'] = ('dense', {})
    found['dft'] = ('dft', {})
    found['hartley'] = ('dft', dict(kernel='hartley', bias=True))
    found['monarch'] = ('monarch', {})
    found['m2'] = ('m2', dict(conv_bias=False))
    return found


def make(name: str, kwargs: dict, grid_size=None, d_model: int = 8, **more) -> mixers.MatrixMixer:
    """A float64 mixer of four heads whose parameters are all of order one."""
    torch.manual_seed(0)
    sizes = dict(expand=2) if name == 'm2' else dict(expand=2, headdim=d_model // 2)
    if mixers.needs_grid(name, **kwargs):
        sizes['grid_size'] = grid_size
    mixer = mixers.create(name, d_model, dtype=torch.float64, **{**sizes, **kwargs, **more})
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return mixer


def unpack(mixer: mixers.MatrixMixer, u: Tensor, name: str):
    """z (B, L, d_inner), v (B, L, H, P), extras (B, L, E) by the wrapper's definition."""
    d, P = mixer.d_inner, mixer.headdim
    heads = d // P // (2 if getattr(mixer, 'variant', '') == 'concat' else 1)
    width = mixer.conv1d.weight.shape[0]
    projected = F.linear(u, mixer.in_proj.weight, mixer.in_proj.bias)
    z, vx, plain = projected[..., :d], projected[..., d : d + width], projected[..., d + width :]
    vx = F.conv1d(
        vx.mT, mixer.conv1d.weight, mixer.conv1d.bias, padding=mixer.conv1d.weight.shape[-1] // 2, groups=width
    )
    v, extras = vx.mT[..., : heads * P], vx.mT[..., heads * P :]
    if name not in SILU_ON_V_ONLY:
        extras = F.silu(extras)
    return z, F.silu(v).unflatten(-1, (heads, P)), torch.cat([extras, plain], -1)


def entries(mixer: mixers.MatrixMixer, name: str, v: Tensor, extras: Tensor) -> Tensor:
    """(B or 1, H, L, L); for mult and concat forward and backward matrices one after the other along H."""
    L, H = v.shape[1:3]
    i, j = torch.arange(L)[:, None], torch.arange(L)[None, :]
    if name in ('low_rank', 'attention', 'cauchy', 'vandermonde'):
        d = mixer.qk_dim
        if mixer.data_dependent:
            q, k = (t.unflatten(-1, (H, d)).transpose(1, 2) for t in extras.chunk(2, -1))  # (B, H, L, d)
        else:
            q, k = (t.transpose(0, 1)[None] for t in (mixer.q, mixer.k))
        q, k = q[:, :, :, None, :], k[:, :, None, :, :]  # rows and columns of (B, H, L, L, d)
        if name == 'low_rank':
            return (q * k).sum(-1) / (L * d) ** 0.5
        if name == 'attention':
            return ((q * k).sum(-1) / d**0.5).softmax(-1)
        if name == 'cauchy':
            c = mixer.c if mixer.data_dependent else 0.0
            return (1 / (q.exp() + k.exp() + 2 * c + 1e-8)).sum(-1) / (L * d) ** 0.5
        turns = (2 * math.pi * 1e-3 * q * j[..., None]).cos() - (2 * math.pi * 1e-3 * k * i[..., None]).cos()
        return turns.sum(-1) / (2 * L * d) ** 0.5
    if name == 'toeplitz':
        if mixer.data_dependent:
            ahead, behind = extras.mT.chunk(2, 1)  # (B, H, L)
            return torch.where(i >= j, ahead[..., (i - j).abs()], behind[..., (i - j).abs()]) * 0.5 / L**0.5
        return mixer.t[None, :, i - j + L - 1] * 0.5 / L**0.5
    if name == 'dense':
        return mixer.M[None] / L**0.5
    if name == 'dft':
        angle = 2 * math.pi * (i * j).double() / L
        M = angle.cos() + (angle.sin() if mixer.kernel == 'hartley' else 0)
        return M.expand(1, H, L, L) / L**0.5
    if name == 'monarch':
        rows, columns = mixer.rows, mixer.columns
        W = rows.shape[-1]
        return (columns[:, i % W, i // W, j // W] * rows[:, j // W, i % W, j % W])[None]
    if name == 'm2':
        return mixer.filter(L)[None, :, i - j + L - 1] * extras.mT[:, :, None, :] / L
    return _semiseparable(mixer, v, extras)


def _semiseparable(mixer, v: Tensor, extras: Tensor) -> Tensor:
    batch, L, H = v.shape[:3]
    N, G, variant = mixer.d_state, mixer.ngroups, mixer.variant
    directions = 1 if variant == 'causal' else 2
    if mixer.data_dependent:
        BC, dt = extras[..., : -directions * H], extras[..., -directions * H :].unflatten(-1, (directions, H))
    else:
        BC, dt = mixer.BC.expand(batch, -1, -1), torch.zeros(batch, L, directions, H, dtype=v.dtype)
    dt = F.softplus(dt + mixer.dt_bias).clamp(*mixer.dt_limit)
    A = -mixer.A_log.exp()
    parts = [t.unflatten(-1, (G, N)).repeat_interleave(H // G, 2) for t in BC.split(G * N, -1)]  # (B, L, H, N) each
    Ms = []
    for n in range(directions):
        B, C = parts[2 * n : 2 * n + 2] if len(parts) > 2 else parts[:2]
        rows = []
        for i in range(L):
            row = []
            for j in range(L):
                lo, hi = (j + 1, i) if n == 0 else (i, j - 1)  # the tokens that decay, first and last
                if variant in ('add_shift', 'quasiseparable'):  # read one token earlier in the scan
                    lo, hi = (j + 1, i - 1) if n == 0 else (i + 1, j - 1)
                    read = i - 1 if n == 0 else i + 1
                    inside = j < i if n == 0 else j > i
                else:
                    read, inside = i, (j <= i if n == 0 else j >= i)
                if not inside:
                    row.append(torch.zeros(batch, H, dtype=v.dtype))
                    continue
                decay = (A * dt[:, lo : hi + 1, n].sum(1)).exp()
                row.append((C[:, read] * B[:, j]).sum(-1) * decay * dt[:, j, n])
            rows.append(torch.stack(row, -1))
        Ms.append(torch.stack(rows, -2))  # (B, H, L, L)
    if variant in ('mult', 'concat'):
        return torch.cat(Ms, 1)
    M = sum(Ms)
    if variant in ('add_diag', 'quasiseparable'):
        M = M + torch.diag_embed((F.linear(v.flatten(-2), mixer.fc_D.weight) + mixer.D).mT)
    return M


def output(mixer: mixers.MatrixMixer, name: str, u: Tensor) -> Tensor:
    """The whole mixer from the definition."""
    z, v, extras = unpack(mixer, u, name)
    M = entries(mixer, name, v, extras)
    variant = getattr(mixer, 'variant', '')

    def apply(M):
        return torch.einsum('bhij,bjhp->bihp', M.expand(u.shape[0], *M.shape[1:]), v)

    if variant == 'mult':
        y = apply(M[:, : v.shape[2]]) * apply(M[:, v.shape[2] :]) + v
    elif variant == 'concat':
        y = torch.cat([apply(M[:, : v.shape[2]]) + v, apply(M[:, v.shape[2] :]) + v], 2)
    elif variant in ('add_diag', 'quasiseparable'):
        y = apply(M)
    else:
        y = apply(M) + v
    y = y.flatten(-2)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * mixer.norm.weight * F.silu(z)
    return F.linear(y, mixer.out_proj.weight, mixer.out_proj.bias)

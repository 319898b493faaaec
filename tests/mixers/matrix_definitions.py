"""Every matrix of the family entry by entry, from its formula: what the tests hold the mixers to."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_vision import mixers

SS_VARIANTS = ('causal', 'add', 'mult', 'concat', 'add_diag', 'add_shift', 'quasiseparable')
SILU_ON_V_ONLY = ('attention', 'cauchy', 'vandermonde', 'm2')  # on v and the extras in all other classes


def cases(**common) -> dict:
    """id -> (name, kwargs) of every matrix, small."""
    found = {}
    for name in ('attention', 'cauchy', 'low_rank', 'vandermonde'):
        for dd in (True, False):
            found[f'{name}-{"dd" if dd else "di"}'] = (name, dict(data_dependent=dd, qk_dim=3))
        found[f'{name}-causal'] = (name, dict(causal=True, qk_dim=3))
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
    found['m2-own'] = ('m2', dict(wrapper='m2', filter_hidden=4))
    found['m2-wide'] = ('m2', dict(wrapper='m2', filter_hidden=4, expand=2))
    found['causal-centred'] = ('semiseparable', dict(variant='causal', conv='centred', d_state=3))
    found['causal-even'] = ('semiseparable', dict(variant='causal', d_conv=4, d_state=3))
    found['mamba'] = ('mamba', dict(d_state=3, dt_rank=2))
    found['vim'] = ('vim', dict(d_state=3, d_conv=3, conv_bias=False, bias=True))
    for checkpoint in ('mean', 'last'):
        found[f'checkpoint-{checkpoint}'] = ('checkpoint', dict(checkpoint=checkpoint))
        found[f'checkpoint-{checkpoint}-causal'] = ('checkpoint', dict(checkpoint=checkpoint, segment=2, causal=True))
        found[f'checkpoint-{checkpoint}-grid'] = ('checkpoint', dict(checkpoint=checkpoint, segment=(2, 3)))
    found['checkpoint-none'] = ('checkpoint', dict(segment=100, qkv_bias=True, proj_bias=True))
    found['scout'] = ('scout', dict(linear_kwargs=dict(d_state=3)))
    found['scout-vim'] = ('scout', dict(linear='vim', segment=(2, 2), checkpoint='last'))
    return found


def make(name: str, kwargs: dict, grid_size=None, d_model: int = 8, **more) -> mixers.Mixer:
    """A float64 mixer of two or four heads whose parameters are all of order one."""
    torch.manual_seed(0)
    sizes = {} if kwargs.get('wrapper') == 'm2' else dict(expand=2, headdim=d_model // 2)
    sizes = {argument: value for argument, value in sizes.items() if argument in mixers.arguments(name)}
    if mixers.needs_grid(name, **kwargs):
        sizes['grid_size'] = grid_size
    mixer = mixers.create(name, d_model, dtype=torch.float64, **{**sizes, **kwargs, **more})
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return mixer


def convolved(x: Tensor, conv: torch.nn.Conv1d, causal: bool) -> Tensor:
    """Depthwise convolution of x (B, L, C), centred or of the present token and those before it."""
    width = conv.weight.shape[-1]
    ahead = 0 if causal else width // 2
    x = F.pad(x.mT, (width - 1 - ahead, ahead))
    return F.conv1d(x, conv.weight, conv.bias, groups=x.shape[1]).mT


def unpack(mixer: mixers.MatrixMixer, u: Tensor, name: str):
    """z (B, L, d_inner), v (B, L, H, P), extras (B, L, E) by the wrapper's definition."""
    d, P = mixer.d_inner, mixer.headdim
    heads = d // P // (2 if getattr(mixer, 'variant', '') == 'concat' else 1)
    width = mixer.conv1d.weight.shape[0]
    projected = F.linear(u, mixer.in_proj.weight, mixer.in_proj.bias)
    z, vx, plain = projected[..., :d], projected[..., d : d + width], projected[..., d + width :]
    vx = convolved(vx, mixer.conv1d, causal=mixer.conv == 'causal')
    v, extras = vx[..., : heads * P], vx[..., heads * P :]
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
        seen = i >= j if mixer.causal else torch.ones(L, L, dtype=torch.bool)
        size = (seen.sum(1, keepdim=True) * d).to(v.dtype) ** 0.5  # tokens that a row sees, times d
        if name == 'low_rank':
            return (q * k).sum(-1) * seen / size
        if name == 'attention':
            return ((q * k).sum(-1) / d**0.5).masked_fill(~seen, float('-inf')).softmax(-1)
        if name == 'cauchy':
            c = mixer.c if mixer.data_dependent else 0.0
            return (1 / (q.exp() + k.exp() + 2 * c + 1e-8)).sum(-1) * seen / size
        turns = (2 * math.pi * 1e-3 * q * j[..., None]).cos() - (2 * math.pi * 1e-3 * k * i[..., None]).cos()
        return turns.sum(-1) * seen / (2**0.5 * size)
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


def selective_scans(mixer: mixers.Mamba, x: Tensor) -> list:
    """(E-channel matrices (B, E, L, L), convolved x (B, L, E)) of each direction, by Mamba's definition."""
    L, found = x.shape[1], []
    for suffix in mixer.directions:
        conv, x_proj, dt_proj, A_log, D = (
            getattr(mixer, name) for name in (f'conv1d{suffix}', f'x_proj{suffix}', f'dt_proj{suffix}',
                                              f'A{suffix}_log', f'D{suffix}')
        )  # fmt: skip
        t = x.flip(1) if suffix else x
        t = F.silu(convolved(t, conv, causal=True))
        r, B, C = F.linear(t, x_proj.weight).split([mixer.dt_rank, mixer.d_state, mixer.d_state], -1)
        dt = F.softplus(F.linear(r, dt_proj.weight, dt_proj.bias))
        M = torch.zeros(*x.shape[::2], L, L, dtype=x.dtype)
        for i in range(L):
            for j in range(i + 1):
                decay = (-A_log.exp() * dt[:, j + 1 : i + 1].sum(1).unsqueeze(-1)).exp()  # (B, E, N)
                M[:, :, i, j] = (C[:, i, None] * decay * B[:, j, None]).sum(-1) * dt[:, j]
        M = M + torch.diag_embed(D[:, None].expand(-1, L))
        found.append((M.flip(-1, -2), t.flip(1)) if suffix else (M, t))
    return found


def checkpoint_weights(mixer: mixers.CheckpointAttention, u: Tensor, grid=None) -> Tensor:
    """(B, H, L, L) Masked softmax over explicit keys: the token itself, then one per checkpoint."""
    q, k, _ = F.linear(u, mixer.qkv.weight, mixer.qkv.bias).unflatten(-1, (3, mixer.nheads, -1)).unbind(2)
    L, tokens = u.shape[1], mixer.tokens
    prefix, patches = tokens.num_prefix_tokens, L - tokens.num_prefix_tokens
    start = {'first': 0, 'middle': patches // 2, 'last': patches}[tokens.prefix_position]
    place = [n for n in range(L) if not start <= n < start + prefix]  # of each patch in the sequence
    if isinstance(mixer.segment, tuple):
        H, W = grid or tokens.size
        h, w = mixer.segment
        segments = [
            [place[y * W + x] for y in range(a, min(a + h, H)) for x in range(b, min(b + w, W))]
            for a in range(0, H, h) for b in range(0, W, w)
        ]  # fmt: skip
    else:
        s = round(patches**0.5) if mixer.segment == 'sqrt' else mixer.segment
        segments = [place[n : n + s] for n in range(0, patches - s + 1, s)]
    means = mixer.checkpoint == 'mean'
    groups = [[start + n] for n in range(prefix)] + [group if means else group[-1:] for group in segments]
    ends = [start + n for n in range(prefix)] + [group[-1] for group in segments]
    M = torch.zeros(u.shape[0], mixer.nheads, L, L, dtype=u.dtype)
    for i in range(L):
        seen = [g for g, end in zip(groups, ends) if (end < i if mixer.causal else g != [i])]
        keys = torch.stack([k[:, i], *(k[:, g].mean(1) for g in seen)], 2)  # (B, H, keys, P)
        weights = ((q[:, i, :, None] * keys).sum(-1) * mixer.headdim**-0.5).softmax(-1)
        M[:, :, i, i] += weights[..., 0]
        for n, g in enumerate(seen, 1):
            M[:, :, i, g] += weights[..., n : n + 1] / len(g)
    return M


def matrix(mixer: mixers.Mixer, name: str, u: Tensor) -> Tensor:
    """(B or 1, H, L, L) from the definition; of Vim forward and backward matrices one after the other along H."""
    if name == 'checkpoint':
        return checkpoint_weights(mixer, u)
    if name == 'scout':
        return checkpoint_weights(mixer.attention, mixer.norm(u + mixer.linear(u)))
    if name in ('mamba', 'vim'):
        x = F.linear(u, mixer.in_proj.weight, mixer.in_proj.bias).chunk(2, -1)[0]
        return torch.cat([M for M, _ in selective_scans(mixer, x)], 1)
    if getattr(mixer, 'wrapper', '') == 'm2':
        L = u.shape[1]
        i, j = torch.arange(L)[:, None], torch.arange(L)[None, :]
        x1, x2, _ = convolved(mixer.in_proj(u), mixer.conv1d, causal=True).mT.chunk(3, 1)  # (B, E, L)
        h = mixer.filter(L)[:, i - j + L - 1] + mixer.skip[:, None, None] * (i == j)
        return x2[..., None] * h * x1[:, :, None]
    _, v, extras = unpack(mixer, u, name)
    return entries(mixer, name, v, extras)


def output(mixer: mixers.Mixer, name: str, u: Tensor) -> Tensor:
    """The whole mixer from the definition."""
    if name == 'checkpoint':
        v = mixer.qkv(u).chunk(3, -1)[2].unflatten(-1, (mixer.nheads, -1))
        return mixer.proj(torch.einsum('bhij,bjhp->bihp', checkpoint_weights(mixer, u), v).flatten(-2))
    if name == 'scout':
        a = mixer.linear(u)
        return a + output(mixer.attention, 'checkpoint', mixer.norm(u + a))
    if name in ('mamba', 'vim'):
        x, z = mixer.in_proj(u).chunk(2, -1)
        ys = [torch.einsum('beij,bje->bie', M, t) for M, t in selective_scans(mixer, x)]
        return mixer.out_proj(sum(ys) / len(ys) * F.silu(z))
    if getattr(mixer, 'wrapper', '') == 'm2':
        v = convolved(mixer.in_proj(u), mixer.conv1d, causal=True).chunk(3, -1)[2]
        y = torch.einsum('beij,bje->bie', matrix(mixer, name, u), v)
        if mixer.residual_filter is not None:
            i = torch.arange(u.shape[1])
            h = mixer.residual_filter(u.shape[1])[:, i[:, None] - i + u.shape[1] - 1]
            y = y + torch.einsum('eij,bje->bie', h, u) + mixer.residual_skip * u
        return mixer.out_proj(y)
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

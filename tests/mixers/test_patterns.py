"""The four attention patterns of the Comprehensive Attention Benchmark, with every mixer; Hydra from a memory."""

import pytest
import torch
from matrix_definitions import make

from hydra_vision import mixers
from hydra_vision.mixers.base import PATTERNS
from hydra_vision.ops.semiseparable import semiseparable_matrix

L, D = 12, 8


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def create(name: str, kwargs) -> mixers.Mixer:
    if name == 'HydraCross':
        torch.manual_seed(0)
        return mixers.HydraCross(D, d_state=3, headdim=4, dtype=torch.float64)
    return make(name, dict(kwargs), (3, 4))


def run(mixer, pattern: str, u: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    if isinstance(mixer, mixers.VitAttention):  # timm's forward
        return mixer.cross(u, memory) if 'cross' in pattern else mixer(u, is_causal='non' not in pattern)
    return mixer(u, memory=memory) if 'cross' in pattern else mixer(u)


@pytest.mark.parametrize('pattern', PATTERNS)
@pytest.mark.parametrize('name', [*mixers.list_mixers(), 'HydraCross'])
def test_supported_patterns(name, pattern):
    """As in CAB: it runs, and, if causal, the output at i is that of the first i + 1 tokens (of u)."""
    cls = mixers.HydraCross if name == 'HydraCross' else type(create(name, {}))
    u, memory = randn(2, L, D), randn(2, 17, D, seed=2)
    if pattern not in cls.patterns:
        if 'cross' in pattern:
            with pytest.raises((TypeError, ValueError), match='memory'):
                run(create(name, {}), pattern, u, memory)
        return
    mixer = create(name, cls.patterns[pattern])
    y = run(mixer, pattern, u, memory)
    assert y.shape == u.shape
    if not pattern.startswith('non'):
        for i in range(L // 2, L):
            torch.testing.assert_close(run(mixer, pattern, u[:, : i + 1], memory)[:, -1], y[:, i])
    if 'cross' in pattern:  # every token hears of every token of the memory
        changed = memory.clone()
        changed[:, 3] += 1
        assert ((run(mixer, pattern, u, changed) - y).abs().amax(-1) > 1e-12).all()


def test_a_causal_matrix_with_a_centred_convolution_is_no_causal_mixer():
    u, changed = randn(1, L, D), randn(1, L, D)
    changed[:, 6] += 1
    for conv, seen in (('causal', [6]), ('centred', [3, 4, 5, 6])):
        mixer = make('semiseparable', dict(variant='causal', d_state=3, conv=conv))
        moved = (mixer(changed) - mixer(u)).abs().amax(-1)[0] > 1e-12
        assert moved[: min(seen)].sum() == 0
        assert moved[seen].all()


@pytest.mark.parametrize('name', ['attention', 'low_rank'])
def test_cross_against_the_dense_matrix(name):
    mixer = make(name, dict(qk_dim=3))
    u, memory = randn(2, 5, D), randn(2, 9, D, seed=2)
    z, v, extras = mixer._unpack(mixer.in_proj(u))
    _, v_memory, extras_memory = mixer._unpack(mixer.in_proj(memory))
    q, _ = mixer.queries_and_keys(extras, None)
    _, k = mixer.queries_and_keys(extras_memory, None)
    M = (q @ k.mT * 3**-0.5).softmax(-1) if name == 'attention' else q @ k.mT / (9 * 3) ** 0.5
    y = (torch.einsum('bhij,bjhp->bihp', M, v_memory) + v).flatten(-2)
    y = torch.nn.functional.rms_norm(y, (16,), mixer.norm.weight, 1e-5) * torch.nn.functional.silu(z)
    torch.testing.assert_close(mixer(u, memory=memory), mixer.out_proj(y))
    with pytest.raises(ValueError, match='memory'):
        make(name, dict(qk_dim=3, data_dependent=False), 9)(memory, memory=u)


@pytest.mark.parametrize('ngroups', [1, 2])
def test_hydra_from_a_memory_is_a_block_of_two_scans(ngroups):
    """Rows of u, columns of the memory: u behind it forward, before it backward, with dt = 0 and so without decay."""
    torch.manual_seed(0)
    mixer = mixers.HydraCross(D, d_state=3, headdim=4, ngroups=ngroups, dtype=torch.float64)
    with torch.no_grad():
        mixer.A_log.normal_()
    u, memory = randn(2, 5, D), randn(2, 9, D, seed=2)
    _, v, _ = mixer._query(u)
    x, _ = mixer._memory(memory)
    G, N = ngroups, 3
    C = torch.nn.functional.silu(mixer.query_proj(u))[..., 32:].unflatten(-1, (2, G, N))
    B = torch.nn.functional.silu(mixer.memory_proj(memory))[..., 16 : 16 + 2 * G * N].unflatten(-1, (2, G, N))
    dt = mixer.memory_proj(memory)[..., 16 + 2 * G * N :].unflatten(-1, (2, 4))
    dt = torch.nn.functional.softplus(dt + mixer.dt_bias)
    M = 0
    for direction, order in enumerate(([0, 1], [1, 0])):

        def joined(of_memory, of_u, order=order):
            return torch.cat([[of_memory, of_u][n] for n in order], 1)

        dt_joined = joined(dt[:, :, direction], torch.zeros(2, 5, 4, dtype=u.dtype))
        B_joined = joined(B[:, :, direction], torch.zeros(2, 5, G, N, dtype=u.dtype))
        C_joined = joined(torch.zeros(2, 9, G, N, dtype=u.dtype), C[:, :, direction])
        whole = semiseparable_matrix(dt_joined, -mixer.A_log.exp(), B_joined, C_joined, reverse=bool(direction))
        M = M + (whole[..., :5, 5:] if direction else whole[..., 9:, :9])
    torch.testing.assert_close(mixer.matrix(u, memory), M)
    y = torch.einsum('bhij,bjhp->bihp', M, x) + (mixer.fc_D(v.flatten(-2)) + mixer.D).unsqueeze(-1) * v
    y = torch.nn.functional.rms_norm(y.flatten(-2), (16,), mixer.norm.weight, 1e-5)
    y = y * torch.nn.functional.silu(mixer.query_proj(u)[..., :16])
    torch.testing.assert_close(mixer(u, memory), mixer.out_proj(y))
    with pytest.raises(ValueError, match='memory=None'):
        mixer(u)


def test_the_table_has_every_mixer():
    header, *rows = mixers.pattern_table()
    assert header == ('mixer', *PATTERNS)
    assert [row[0] for row in rows] == [*mixers.list_mixers(), 'HydraCross']
    assert ('attention', 'yes', 'causal=True', 'yes', 'causal=True') in rows

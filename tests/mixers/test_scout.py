"""Checkpoint attention beyond its definition on small grids: class tokens, sizes, no double count, memory."""

import pytest
import torch
from matrix_definitions import checkpoint_weights

from hydra_vision import mixers


def make(**kwargs) -> mixers.CheckpointAttention:
    torch.manual_seed(0)
    return mixers.create('checkpoint', 16, headdim=8, dtype=torch.float64, **kwargs)


def tokens(L: int) -> torch.Tensor:
    return torch.randn(2, L, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('checkpoint', ['mean', 'last'])
@pytest.mark.parametrize('position', ['first', 'middle', 'last'])
@pytest.mark.parametrize('segment', [5, 'sqrt', (2, 4)])
def test_class_tokens_are_checkpoints(segment, position, checkpoint, causal):
    grid = dict(grid_size=(5, 6)) if isinstance(segment, tuple) else {}
    mixer = make(
        segment=segment,
        checkpoint=checkpoint,
        causal=causal,
        num_prefix_tokens=2,
        prefix_position=position,
        **grid,
    )
    u = tokens(32).requires_grad_()
    M = checkpoint_weights(mixer, u)
    torch.testing.assert_close(mixer.matrix(u), M)
    v = mixer.qkv(u).chunk(3, -1)[2].unflatten(-1, (2, 8))
    expected = mixer.proj(torch.einsum('bhij,bjhp->bihp', M, v).flatten(-2))
    y = mixer(u)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    got, wanted = (torch.autograd.grad((t * weight).sum(), [u, mixer.qkv.weight]) for t in (y, expected))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b)
    start = {'first': 0, 'middle': 15, 'last': 30}[position]
    if not causal:  # everybody sees the class tokens, and no weight is counted twice
        assert (M[..., start : start + 2] > 0).all()
    torch.testing.assert_close(M.sum(-1), torch.ones_like(M[..., 0]))


def test_the_papers_mask():
    """Causal, the last token of each segment: the columns c_m with j <= i, or the diagonal."""
    mixer = make(segment=3, checkpoint='last', causal=True)
    M = mixer.matrix(tokens(11))
    i, j = torch.arange(11)[:, None], torch.arange(11)
    assert torch.equal(M[0, 0] != 0, ((j % 3 == 2) & (j <= i)) | (i == j))
    q, k, _ = mixer.qkv(tokens(11)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT * 8**-0.5).masked_fill(M[0, 0] == 0, float('-inf'))
    torch.testing.assert_close(M, scores.softmax(-1))


def test_a_causal_token_does_not_see_what_comes_after_it():
    for checkpoint in ('mean', 'last'):
        mixer = make(segment=4, checkpoint=checkpoint, causal=True)
        u = tokens(19)
        for n in (1, 4, 11, 18):
            torch.testing.assert_close(mixer(u[:, :n]), mixer(u)[:, :n])


def test_another_grid():
    mixer = make(segment=(2, 2), grid_size=(4, 4))
    u = tokens(15)
    torch.testing.assert_close(mixer.matrix(u, (3, 5)), checkpoint_weights(mixer, u, (3, 5)))
    assert mixer(u, (3, 5)).shape == u.shape
    mixer.set_input_size((3, 5))
    torch.testing.assert_close(mixer(u), mixer(u, (3, 5)))


def test_the_fused_form_is_the_plain_one(monkeypatch):
    from hydra_vision.mixers import scout

    mixer, u = make(segment=7), tokens(200)
    fused = mixer(u)
    monkeypatch.setattr(scout, '_fused_runs', lambda q: False)
    torch.testing.assert_close(mixer(u), fused)


def test_scores_are_never_held(largest_numel):
    L = 4096  # 64 checkpoints, fewer than the three columns of qkv per token
    mixer = mixers.create('checkpoint', 16, headdim=16)
    assert largest_numel(lambda: mixer(torch.randn(1, L, 16)).sum().backward()) == L * 3 * 16


def test_composition():
    mixer = mixers.create('scout', 16, headdim=8, linear='semiseparable', linear_kwargs=dict(variant='add', d_state=4))
    u = torch.randn(2, 9, 16)
    a = mixer.linear(u)
    torch.testing.assert_close(mixer(u), a + mixer.attention(torch.nn.functional.rms_norm(u + a, (16,), eps=1e-6)))
    assert mixer.no_weight_decay() == {'linear.A_log', 'linear.dt_bias'}


@pytest.mark.gpu
@pytest.mark.parametrize('kwargs', [{}, dict(checkpoint='last', segment=5), dict(num_prefix_tokens=1)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_on_the_gpu(kwargs, dtype):
    """Forward and backward, fused in half precision, against float64 on the CPU."""
    mixer = mixers.create('checkpoint', 64, headdim=32, dtype=torch.float64, **kwargs)
    u = torch.randn(2, 197, 64, dtype=torch.float64)
    mixer.to(dtype).double()  # the parameters that the other one has
    u = u.to(dtype).double()
    expected = mixer(u)
    expected.square().mean().backward()
    wanted = mixer.qkv.weight.grad.clone()
    mixer.zero_grad()
    y = mixer.to('cuda', dtype)(u.to('cuda', dtype))
    y.float().square().mean().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert (y.double().cpu() - expected).norm() < tolerance * expected.norm()
    assert (mixer.qkv.weight.grad.double().cpu() - wanted).norm() < tolerance * wanted.norm()

"""What the Triton backend says without running a kernel."""

import importlib.util

import pytest
import torch

HAS_TRITON = importlib.util.find_spec('triton') is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason='the package triton is not installed')


def test_reason_without_a_device(monkeypatch):
    from hydra_vision.ops.dispatch import _triton_reason as unavailable_reason

    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    if torch.cuda.is_available():
        assert unavailable_reason() is None
    else:
        assert 'CUDA' in unavailable_reason() or 'triton' in unavailable_reason()


@needs_triton
@pytest.mark.parametrize(
    ('sizes', 'dtype', 'error', 'words'),
    [
        ((1, 4, 2, 48, 1, 64), torch.float32, ValueError, 'headdim P = 48'),
        ((1, 4, 2, 64, 1, 24), torch.float32, ValueError, 'd_state N = 24'),
        ((1, 4, 2, 64, 1, 64), torch.float64, TypeError, 'float64'),
        ((1, 65537, 2, 64, 1, 64), torch.float32, ValueError, 'L = 65537'),
    ],
)
def test_limits_are_errors(sizes, dtype, error, words):
    from hydra_vision.ops.triton.plan import make_plan

    with pytest.raises(error, match=words):
        make_plan(*sizes, torch.empty(1, dtype=dtype))


@needs_triton
def test_heads_too_far_apart_for_32_bits_are_copied():
    from hydra_vision.ops.triton.function import _mix_arguments

    L, H, P, far = 40, 9, 16, 2**28  # head 8 begins at 2**31
    x = torch.empty_strided((1, L, H, P), (H * far, P, far, 1), dtype=torch.bfloat16, device='meta')
    dt = torch.empty(1, L, H, device='meta')
    bc = tuple(torch.empty_strided((1, L, H, P), (H * far, P, far, 1), device='meta') for _ in range(4))
    _, x, _, bc, _ = _mix_arguments(x, dt, dt, torch.empty(H, device='meta'), bc, None)
    assert all(t.stride() == (L * H * P, H * P, P, 1) for t in (x, *bc))


@needs_triton
def test_table_covers_every_size():
    from hydra_vision.ops.triton.table import L_BUCKETS, launch_for, shipped

    assert len(shipped()) == 3 * len(L_BUCKETS) * 4 * 4 * 3
    assert len({repr(launch) for launch in shipped().values()}) == 7
    for arch in (80, 86, 89, 90, 100):
        for L in (1, 64, 65, 196, 4096, 65536):
            launch = launch_for(arch, L, 64, 64, 'bfloat16')
            assert launch.tile in (16, 32, 64)
            assert launch.heads_of('mix_heads', 7) == 7


@needs_triton
def test_alignment_of_rows():
    from hydra_vision.ops.triton.plan import alignment

    t = torch.empty(4, 1036, dtype=torch.bfloat16)
    assert alignment(t, t.stride(0)) == 4
    assert alignment(t[:, 1:], t.stride(0)) == 1
    assert alignment(torch.empty(4, 64), 64) == 4


@needs_triton
def test_tuning_candidates_change_one_thing_at_a_time():
    from hydra_vision.ops.triton.table import launch_for
    from hydra_vision.ops.triton.tune import candidates

    start = launch_for(90, 196, 64, 64, 'bfloat16')
    first, *others = candidates(start)
    assert first == start
    for other in others:
        fields = ('tile', 'heads', 'stages', 'warps', 'tail')
        assert sum(getattr(other, field) != getattr(start, field) for field in fields) <= 1
    assert any(other.tail == 0 for other in others)


@needs_triton
@pytest.mark.parametrize(
    ('L', 'spans'),
    [
        *((L, ((1, tile),)) for L, tile in ((1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64))),
        *((L, ((3, 64), (1, tail))) for L, tail in ((196, 16), (209, 32))),
        *((L, ((4, 64),)) for L in (225, 256)),
    ],
)
def test_launches_of_the_last_tile(L, spans):
    """From 512 heads times batch on, where it has at most 32 tokens."""
    from hydra_vision.ops.triton.plan import make_plan
    from hydra_vision.ops.triton.table import Launch

    def found(batch, launch):
        x = torch.empty(batch, L, 8, 16, dtype=torch.bfloat16, device='meta')
        return make_plan(batch, L, 8, 16, 1, 16, x, launch).spans

    tiles = -(-L // 64)
    assert found(64, Launch(64, tail=512)) == spans
    assert found(63, Launch(64, tail=512)) == found(64, Launch(64)) == ((tiles, 64),)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU to tune for')
def test_tuning_without_a_device_is_an_error():
    from hydra_vision.ops.triton.tune import tune

    with pytest.raises(RuntimeError, match='CUDA'):
        tune()

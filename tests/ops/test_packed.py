"""Several sequences in one row: each gets what it gets alone, values and gradients."""

from itertools import pairwise

import pytest
import torch
from triton_checks import inner_arguments, mix_arguments, value_and_grads

from hydra_vision import Hydra
from hydra_vision.ops import hydra_inner, quasiseparable_mix

LENGTHS = [1, 5, 17, 2, 40, 1, 9]  # 75 tokens: borders within tiles and between them


def borders(lengths=LENGTHS):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


def rows_apart(function, tensors, with_tokens, lengths=LENGTHS):
    """The function on each sequence alone, side by side; ``with_tokens``: which tensors have tokens."""
    starts = borders(lengths).tolist()
    parts = []
    for begin, end in pairwise(starts):
        cut = [t[:, begin:end] if k in with_tokens and t is not None else t for k, t in enumerate(tensors)]
        parts.append(function(cut))
    return torch.cat(parts, dim=1)


def check(packed, alone, tensors, with_tokens, rtol, atol):
    got = value_and_grads(packed, tensors)
    expected = value_and_grads(lambda leaves: rows_apart(alone, leaves, with_tokens), tensors)
    for n, (a, b) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(
            a, b, rtol=rtol, atol=atol * float(b.abs().max() + 1), msg=lambda m, n=n: f'{n}: {m}'
        )


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('backend', ['reference', 'chunked'])
@pytest.mark.parametrize('extreme', [False, True])
def test_operator(backend, dtype, extreme):
    tensors = [None if t is None else t.to(dtype) for t in mix_arguments(1, sum(LENGTHS), 4, 8, 2, 8, extreme=extreme)]

    def mix(a, cu_seqlens=None):
        return quasiseparable_mix(*a[:9], cu_seqlens=cu_seqlens, backend=backend)

    tolerance = (1e-9, 1e-11) if dtype == torch.float64 else (1e-4, 1e-5)
    check(lambda a: mix(a, borders()), mix, tensors, (0, 1, 2, 4, 5, 6, 7, 8), *tolerance)


def test_operator_over_many_chunks():
    lengths = [300, 1, 700, 129]
    a = [t.double() for t in mix_arguments(1, sum(lengths), 2, 4, 1, 4) if t is not None]
    y = quasiseparable_mix(*a, cu_seqlens=borders(lengths))
    alone = rows_apart(lambda a: quasiseparable_mix(*a), a, (0, 1, 2, 4, 5, 6, 7, 8), lengths)
    torch.testing.assert_close(y, alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('options', [dict(), dict(share_bc=True, K=3), dict(K=9, bias=False)], ids=str)
def test_inner(options):
    tensors = [None if t is None else t.double() for t in inner_arguments(1, sum(LENGTHS), 4, 8, 2, 8, **options)]
    numbers = dict(headdim=8, d_state=8, ngroups=2, share_bc=options.get('share_bc', False))

    def inner(a, cu_seqlens=None):
        return hydra_inner(*a[:8], cu_seqlens=cu_seqlens, **numbers)

    check(lambda a: inner(a, borders()), inner, tensors, (0,), 1e-8, 1e-10)


def test_mixer():
    mixer = Hydra(32, headdim=16, d_state=16).double()
    u = torch.randn(1, sum(LENGTHS), 32, dtype=torch.float64)
    alone = torch.cat([mixer(part) for part in u.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(mixer(u, cu_seqlens=borders()), alone)
    torch.testing.assert_close(mixer(u, cu_seqlens=borders([75])), mixer(u))


def test_bad_borders():
    a = mix_arguments(1, 75, 4, 8, 2, 8)[:9]
    two = mix_arguments(2, 75, 4, 8, 2, 8)[:9]
    states = torch.zeros(4, 8, 8)
    for error, message, call in (
        (
            TypeError,
            'torch.float32; allowed: torch.int32',
            lambda: quasiseparable_mix(*a, cu_seqlens=borders().float()),
        ),
        (ValueError, r'shape \(1,\)', lambda: quasiseparable_mix(*a, cu_seqlens=borders()[:1])),
        (ValueError, 'B = 1; the batch is 2', lambda: quasiseparable_mix(*two, cu_seqlens=borders())),
        (ValueError, 'it must rise from 0 to L = 75', lambda: quasiseparable_mix(*a, cu_seqlens=borders([40, 34]))),
        (ValueError, 'init_states', lambda: quasiseparable_mix(*a, cu_seqlens=borders(), init_states=states)),
    ):
        with pytest.raises(error, match=message):
            call()

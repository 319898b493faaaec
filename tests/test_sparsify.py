"""HiP attention: the tree search against a plain one, attention against a dense mask, timm's models, the report.

MonarchAttention: against its formulas on the dense scores, where it is exact, its objective.
"""

import math
from itertools import pairwise

import pytest
import timm
import torch

from hydra_vision.ops.monarch_attention import monarch_attention, monarch_attention_matrix
from hydra_vision.sparsify import HipSettings, agreement, hip_attention, select_key_blocks, sparsify_attention

SMALL = dict(img_size=96, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=5)  # 144 patches


def build(name: str = 'vit_tiny_patch16_224', **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **kwargs}).eval()
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if 'gamma' in parameter:
                value.fill_(1.0)  # layer scales of 1e-6 would hide what attention does
    return model


def images(size: int = 96) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def heads(L: int, smooth: int = 1, P: int = 4) -> list[torch.Tensor]:
    """q, k, v (2, 3, L, P) in float64; neighbours are alike with ``smooth``."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 3, L, P, dtype=torch.float64, generator=generator) for _ in range(3)]
    kernel = torch.ones(1, 1, smooth, dtype=torch.float64) / smooth**0.5
    return [
        torch.nn.functional.conv1d(t.mT.reshape(-1, 1, L), kernel, padding='same').view(2, 3, P, L).mT for t in tensors
    ]


def plain_tree(q: torch.Tensor, k: torch.Tensor, s: HipSettings) -> set:
    """Key blocks of one block of queries (b_q, P): the paper's loop."""
    n, m = math.ceil(len(k) / s.key_block), s.keys // s.key_block
    if n <= m:
        return set(range(n))
    sampled = q[s.query_stride - 1 :: s.query_stride]
    ranges = [(i * n // m, (i + 1) * n // m) for i in range(m)]
    for _ in range(math.ceil(math.log2(n / m))):
        children = []
        for low, high in ranges:
            middle = low + (high - low) // 2
            children += [child for child in ((low, middle), (middle, high)) if child[0] < child[1]]
        scored = []
        for low, high in children:
            block = low + (high - low) // 2
            keys = k[block * s.key_block : (block + 1) * s.key_block][:: s.key_stride]
            scored.append(((sampled @ keys.T).max().item(), (low, high)))
        ranges = [child for _, child in sorted(scored, reverse=True)[:m]]
    assert all(high - low == 1 for low, high in ranges)
    return {low for low, _ in ranges}


@pytest.mark.parametrize(
    ('L', 'settings'),
    [
        (64, dict(keys=8, query_block=8)),
        (64, dict(keys=16, query_block=16, key_block=4, key_stride=2, query_stride=1)),
        (77, dict(keys=12, query_block=8, key_block=2, query_stride=3)),  # nothing divides
        (50, dict(keys=6, query_block=64, key_block=1)),
        (40, dict(keys=64, query_block=8)),  # all
    ],
)
def test_tree_search_is_the_papers(L, settings):
    settings = HipSettings(**settings)
    q, k, _ = heads(L)
    chosen = select_key_blocks(q, k, settings)
    b_q = settings.query_block
    for b in range(2):
        for h in range(3):
            for block in range(math.ceil(L / b_q)):
                rows = q[b, h, torch.arange(block * b_q, (block + 1) * b_q).clamp(max=L - 1)]
                found = chosen[b, h, block].tolist()
                assert len(set(found)) == len(found)
                assert set(found) == plain_tree(rows, k[b, h], settings)


@pytest.mark.parametrize('window', [False, True])
@pytest.mark.parametrize('reordered', [False, True])
@pytest.mark.parametrize('prefix', [0, 5])
def test_attention_is_dense_attention_under_the_mask(prefix, reordered, window):
    settings = HipSettings(keys=12, query_block=8, key_block=3, window=window)
    L = 53  # neither blocks of queries nor of keys divide it
    q, k, v = heads(prefix + L)
    order = torch.randperm(L, generator=torch.Generator().manual_seed(2)) if reordered else torch.arange(L)
    chosen = select_key_blocks(*(t[:, :, prefix:][:, :, order] for t in (q, k)), settings)
    seen = torch.zeros(2, 3, prefix + L, prefix + L, dtype=torch.bool)
    seen[..., :prefix, :] = seen[..., :prefix] = True
    for b in range(2):
        for h in range(3):
            for row in range(L):
                block = row // 8
                keys = [n for c in chosen[b, h, block].tolist() for n in range(3 * c, min(3 * c + 3, L))]
                keys += range(8 * block, min(8 * block + 8, L)) if window else []
                seen[b, h, prefix + order[row], prefix + order[keys]] = True
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    got = hip_attention(q, k, v, settings, prefix, order if reordered else None)
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings('ignore:flex_attention called without torch.compile')
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_block_masks_give_the_same(device):
    q, k, v = heads(5 + 700, smooth=9, P=64)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(2)).to(device)
    q, k, v = (t.to(device, torch.float32 if device == 'cuda' else torch.float64) for t in (q, k, v))
    expected, got = (
        hip_attention(q, k, v, HipSettings(keys=256, query_block=256, key_block=128, kernel=kernel), 5, order)
        for kernel in ('gather', 'flex')
    )
    tolerance = 5e-3 if device == 'cuda' else 1e-7  # products in TF32 there
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_a_few_blocks_of_queries_at_a_time(monkeypatch):
    from hydra_vision import sparsify

    settings = HipSettings(keys=8, query_block=4)
    q, k, v = heads(60)
    expected = hip_attention(q, k, v, settings)
    monkeypatch.setattr(sparsify, '_GATHERED', 1)
    torch.testing.assert_close(hip_attention(q, k, v, settings), expected)


@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        ('vit_tiny_patch16_224', {}),
        ('vit_little_patch16_reg4_gap_256', {}),  # registers, q and k normed
        ('deit3_small_patch16_224', {}),
        ('vit_small_patch14_reg4_dinov2', {}),
        ('vit_small_patch16_dinov3', {}),  # rotary
        ('eva02_tiny_patch14_224', {}),
    ],
)
def test_models_keep_their_weights(name, kwargs):
    model = build(name, **kwargs)
    x, state = images(), {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        dense = model(x)
        with sparsify_attention(model, keys=256) as handle:  # more than there are
            assert len(handle.names) == 2
            torch.testing.assert_close(model(x), dense)
        with sparsify_attention(model, keys=16, query_block=16):
            assert list(model.state_dict()) == list(state)
            sparse = model(x)
            assert sparse.shape == dense.shape
            assert not torch.equal(sparse, dense)
        assert torch.equal(model(x), dense)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        handle = sparsify_attention(model, blocks=[-1], keys=16)
        assert handle.names == ('blocks.1.attn',)
        assert handle.restore() is handle.restore()


def test_report():
    model = build()
    labels = torch.tensor([0, 1])
    found = agreement(model, images(), labels, keys=16, query_block=16)
    assert [row['name'] for row in found['layers']] == ['blocks.0.attn', 'blocks.1.attn']
    for row in found['layers']:
        assert 0 < row['recall'] <= row['oracle'] < 1
        assert row['error'] > 0
    assert {'top1_agreement', 'logit_difference', 'kl', 'cosine', 'top1_dense', 'top1_sparse'} < set(found)
    found = agreement(model, images(), keys=256)
    assert (found['top1_agreement'], found['logit_difference']) == (1.0, 0.0)
    assert all(row['recall'] == 1 and row['error'] == 0 for row in found['layers'])


def test_recall_is_the_weight_on_the_keys_that_are_seen():
    from hydra_vision.sparsify import _recall

    settings = HipSettings(keys=24, query_block=8, order='row')
    q, k, _ = heads(96, smooth=9)
    found = _recall(q, k, settings, 0, None)
    # with unit values the output of the dense weights is 1; what is not seen is missing
    weights = (q.float() @ k.float().mT * 4**-0.5).softmax(-1)
    chosen = select_key_blocks(q, k, settings)
    total = 0.0
    for row in range(96):
        own = set(range(row // 8 * 8, row // 8 * 8 + 8))
        for b in range(2):
            for h in range(3):
                keys = own | {n for c in chosen[b, h, row // 8].tolist() for n in (2 * c, 2 * c + 1)}
                total += weights[b, h, row, sorted(keys)].sum().item()
    assert found['recall'] == pytest.approx(total / (96 * 6), rel=1e-4)
    assert found['random'] < found['recall'] < found['oracle'] < 1


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        (dict(method='flash'), ValueError, "method='flash'; allowed: 'hip'"),
        (dict(blocks=[2]), ValueError, r'blocks=\[2\]: there are 2 attention modules'),
        (dict(key=4), TypeError, "no setting 'key'"),
        (dict(keys=7), ValueError, 'keys=7; it must be a multiple of key_block=2'),
        (dict(query_block=0), ValueError, 'query_block=0; it must be at least 1'),
        (dict(query_stride=128), ValueError, 'query_stride=128; it must be at most query_block=64'),
        (
            dict(kernel='flex'),
            ValueError,
            "key_block=2, query_block=64: kernel='flex' takes a key_block that is a mult",
        ),
        (dict(order='snake'), ValueError, "order='snake'; allowed: 'hilbert', 'row'"),
    ],
)
def test_bad_arguments_leave_the_model_alone(kwargs, error, message):
    model = build()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        sparsify_attention(model, **kwargs)
    assert [type(module) for module in model.modules()] == kinds


def test_what_cannot_be_sparse():
    with pytest.raises(ValueError, match='relative position biases'):
        sparsify_attention(build('beit_base_patch16_224'))
    with pytest.raises(ValueError, match='no attention that can be sparse'):
        sparsify_attention(timm.create_model('resnet18'))
    model = build()
    sparsify_attention(model, keys=16)
    with pytest.raises(RuntimeError, match='for inference'):
        model(images())
    model = build(dynamic_img_size=True)
    sparsify_attention(model, keys=16)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)  # a square
        with pytest.raises(ValueError, match="not the model's grid and no square"):
            model(torch.randn(1, 3, 64, 96))


def plain_monarch(scores: torch.Tensor, block: int, steps: int, n: int) -> torch.Tensor:
    """Weights (L, L) from the scores (L, L): the updates of the paper, number by number."""
    L = len(scores)
    blocks = [list(range(n, L))[a : a + block] for a in range(0, L - n, block)]
    weights = scores.softmax(-1).clone()
    for j in range(block):
        queries = [(row, own[j]) for row, own in enumerate(blocks) if j < len(own)]
        left = torch.eye(len(blocks), dtype=scores.dtype)
        for _ in range(steps):
            right = []
            for k, keys in enumerate(blocks):
                total = sum(left[row, k] for row, _ in queries)
                mean = sum(left[row, k] * scores[query, keys] for row, query in queries)
                right.append((mean / total if total > 0 else torch.zeros(len(keys), dtype=scores.dtype)).softmax(-1))
            for row, query in queries:
                logits = [r @ scores[query, keys] - r @ r.log() for r, keys in zip(right, blocks)]
                left_row = torch.stack([*logits, *scores[query, :n]]).softmax(-1)
                left[row] = left_row[: len(blocks)]
                weights[query, :n] = left_row[len(blocks) :]
                for keys, share, r in zip(blocks, left_row, right):
                    weights[query, keys] = share * r
    return weights


@pytest.mark.parametrize(('L', 'block', 'n'), [(12, 4, 0), (13, 4, 1), (16, 5, 2), (7, 7, 0), (6, 1, 1)])
@pytest.mark.parametrize('steps', [1, 3])
def test_monarch_attention_is_the_papers(L, block, n, steps):
    q, k, v = (2 * t for t in heads(L))
    M = monarch_attention_matrix(q, k, block, steps, n)
    scores = q @ k.mT / 2
    for b in range(2):
        for h in range(3):
            torch.testing.assert_close(M[b, h], plain_monarch(scores[b, h], block, steps, n), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(monarch_attention(q, k, v, block, steps, n), M @ v)


@pytest.mark.parametrize('block', [1, 15, 20])
def test_monarch_attention_is_exact_with_one_block_or_blocks_of_one(block):
    q, k, v = heads(17)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(monarch_attention(q, k, v, block, 1, 2), exact)


def test_each_step_of_monarch_attention_gains():
    q, k, _ = (3 * t for t in heads(24))
    scores, gained = q @ k.mT / 2, []
    for steps in range(1, 6):
        M = monarch_attention_matrix(q, k, 6, steps)
        torch.testing.assert_close(M.sum(-1), torch.ones_like(M[..., 0]))
        gained.append((M * scores + torch.special.entr(M)).sum((-1, -2)))
    best = scores.logsumexp(-1).sum(-1)
    for before, after in pairwise(gained):
        assert (after >= before - 1e-9).all()
        assert (after <= best).all()
    assert (gained[-1] > gained[0] + 1e-3).all()


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'vit_small_patch16_dinov3', 'eva02_tiny_patch14_224'])
def test_models_with_monarch_attention(name):
    model, x = build(name), images()
    with torch.no_grad():
        dense = model(x)
        with sparsify_attention(model, 'monarch') as handle:
            assert handle.settings.steps == 1
            assert not torch.equal(model(x), dense)
        with sparsify_attention(model, 'monarch', block=1):
            torch.testing.assert_close(model(x), dense, rtol=1e-3, atol=1e-4)
        assert torch.equal(model(x), dense)


def test_report_on_monarch_attention():
    model = build()
    found = agreement(model, images(), method='monarch', block=1)
    assert set(found['layers'][0]) == {'name', 'error'}
    assert max(layer['error'] for layer in found['layers']) < 1e-5
    assert agreement(model, images(), method='monarch', steps=2)['layers'][0]['error'] > 1e-4


@pytest.mark.parametrize(
    ('settings', 'error', 'message'),
    [
        (dict(steps=0), ValueError, 'steps=0; it must be at least 1'),
        (dict(block=0), ValueError, 'block=0; it must be at least 1'),
        (dict(keys=8), TypeError, "no setting 'keys'.*block, steps"),
    ],
)
def test_bad_settings_of_monarch_attention(settings, error, message):
    with pytest.raises(error, match=message):
        sparsify_attention(build(), 'monarch', **settings)

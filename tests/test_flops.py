"""Operations and traffic of a model, counted without computing."""

import pytest

from hydra_vision.flops import Counts, count_model, create_model, family_models


def test_family_holds_our_models_only():
    names = family_models()
    assert {'test_hydra_vit', 'hydra_vit_base', 'vim_tiny_patch16_224'} <= set(names)
    assert not any(name.startswith(('vit_', 'deit_')) for name in names)


def test_vit_by_hand():
    counts = count_model('test_vit', 160)
    assert count_model('test_vit') == counts  # 160 px is its default
    L, d, hidden = 101, 64, 192
    blocks = 6 * L * (d * 3 * d + d * d + 2 * d * hidden)
    ends = 100 * 768 * d + d * 1000
    assert counts.projection_flops == 2 * (blocks + ends)
    assert counts.mixing_flops == 2 * 6 * 2 * L * L * d
    assert counts.weights == 6 * (4 * d * d + 2 * d * hidden) + 768 * d + 1000 * d
    assert counts.stem_flops == 2 * 100 * 768 * d


def test_hydra_by_hand():
    counts = count_model('test_hydra_vit', 160)
    L, d, d_inner, heads = 100, 64, 128, 2
    width = 2 * d_inner + 4 * 64 + 2 * heads
    convolution = 7 * (d_inner + 4 * 64)
    blocks = 4 * L * (d * width + d_inner * heads + d_inner * d + convolution)
    ends = L * 768 * d + d * 1000
    assert counts.projection_flops == 2 * (blocks + ends)
    assert counts.mixing_flops > 0
    assert counts.projection_reads == 4 * L * (d + d_inner) + 3 * 160 * 160 + d
    assert counts.projection_writes == 4 * L * (width + d) + L * d + 1000
    assert (counts.mixer_reads, counts.mixer_writes) == (4 * L * width, 4 * L * d_inner)


def test_training_has_three_products_for_one():
    counts = count_model('test_hydra_vit', 160)
    assert counts.gemm_flops(2, False) == 2 * counts.projection_flops
    assert counts.gemm_flops(2, True) == 2 * (3 * counts.projection_flops - counts.stem_flops)


def test_traffic_by_hand():
    counts = Counts(
        parameters=0, projection_flops=0, mixing_flops=0, stem_flops=0, weights=1, projection_reads=1000,
        projection_writes=100, stem_reads=500, mixer_reads=20000, mixer_writes=3000,
    )  # fmt: skip
    assert counts.traffic(1, 2, False) == 2 * (1 + 1000 + 100 + 20000 + 3000)
    assert counts.traffic(5, 4, False) == 4 * (1 + 5 * 24100)
    assert counts.traffic(1, 2, True) == 2 * (3 + 3 * 1000 + 3 * 100 - 500 + 3 * 20000 + 2 * 3000)


def test_hydra_is_linear_in_tokens_and_vit_is_not():
    hydra, vit = ([count_model(name, s).mixing_flops for s in (512, 1024)] for name in ('test_hydra_vit', 'test_vit'))
    assert hydra[1] / hydra[0] == pytest.approx(4.0, rel=0.15)
    assert vit[1] / vit[0] > 15


def test_create_model_sets_the_size_where_there_is_one():
    assert create_model('test_hydra_vit', (96, 64), backend='chunked').patch_embed.img_size == (96, 64)
    assert create_model('test_resnet', 96).default_cfg['input_size'] == (3, 160, 160)
    with pytest.raises(TypeError):
        create_model('test_resnet', 96, backend='chunked')

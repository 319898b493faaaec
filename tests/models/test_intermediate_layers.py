"""get_intermediate_layers as DINO-style code calls it: timm's semantics, on a model without a class token."""

import inspect

import pytest
import timm
import torch

import hydra_vision  # noqa: F401


def build(name: str = 'test_hydra_vit', **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, img_size=(32, 64), **kwargs).eval()


def outputs(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output of every block, by hooks."""
    seen = []
    hooks = [block.register_forward_hook(lambda _, __, y: seen.append(y)) for block in model.blocks]
    with torch.inference_mode():
        model.forward_features(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(('n', 'blocks'), [(1, [3]), (3, [1, 2, 3]), ([0, 2], [0, 2]), ((-1,), [3])])
def test_layers_are_the_blocks(n, blocks):
    model, x = build(), torch.randn(2, 3, 32, 64)
    seen = outputs(model, x)
    with torch.inference_mode():
        plain = model.get_intermediate_layers(x, n)
        normed = model.get_intermediate_layers(x, n=n, norm=True)
        maps = model.get_intermediate_layers(x, n=n, reshape=True, norm=True)
        assert len(plain) == len(normed) == len(maps) == len(blocks)
        for i, block in enumerate(blocks):
            torch.testing.assert_close(plain[i], seen[block])
            torch.testing.assert_close(normed[i], model.norm(seen[block]))
            torch.testing.assert_close(maps[i], normed[i].transpose(1, 2).reshape(2, 64, 2, 4))


def test_last_layer_normed_is_what_the_head_pools():
    model, x = build(), torch.randn(2, 3, 32, 64)
    with torch.inference_mode():
        (tokens,) = model.get_intermediate_layers(x, norm=True)
        torch.testing.assert_close(tokens, model.forward_features(x))
        torch.testing.assert_close(model.head(tokens.mean(1)), model(x))


@pytest.mark.parametrize('position', ['first', 'middle', 'last'])
@pytest.mark.parametrize('reshape', [False, True])
def test_class_token_is_returned_as_timm_does(position, reshape):
    ours, theirs = build(class_token=True, class_token_position=position), build('test_vit')
    x = torch.randn(2, 3, 32, 64)
    with torch.inference_mode():
        for model in (ours, theirs):
            results = model.get_intermediate_layers(x, n=2, reshape=reshape, return_prefix_tokens=True, norm=True)
            assert len(results) == 2
            for patches, prefix in results:
                assert prefix.shape == (2, 1, 64)
                assert patches.shape == ((2, 64, 2, 4) if reshape else (2, 8, 64))
            torch.testing.assert_close(results[-1][1][:, 0], model.forward_features(x)[:, 0])
        bare = ours.get_intermediate_layers(x, n=2, reshape=reshape, norm=True)
        assert [y.shape for y in bare] == [y.shape for y in theirs.get_intermediate_layers(x, n=2, reshape=reshape)]


def test_without_a_class_token_there_is_no_prefix():
    model, x = build(), torch.randn(2, 3, 32, 64)
    (tokens,) = model.get_intermediate_layers(x, return_prefix_tokens=True)
    assert tokens.shape == (2, 8, 64)


def test_signature_is_timms():
    ours, theirs = (inspect.signature(build(name).get_intermediate_layers) for name in ('test_hydra_vit', 'test_vit'))
    masks = {'attn_mask', 'is_causal'}  # of attention, which there is none of
    assert list(ours.parameters) == [name for name in theirs.parameters if name not in masks]
    for name, parameter in ours.parameters.items():
        assert parameter.default == theirs.parameters[name].default


@pytest.mark.parametrize('n', [0, 5, [4], [-5]])
def test_layers_out_of_range(n):
    with pytest.raises((AssertionError, ValueError)):
        build().get_intermediate_layers(torch.randn(1, 3, 32, 64), n=n)

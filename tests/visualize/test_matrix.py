"""Mixing matrices of a model on an image: the right tokens, the right rows, a picture."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import hydra_vision  # noqa: F401
from hydra_vision.cli import main
from hydra_vision.models.scan_order import SCAN_ORDERS
from hydra_vision.visualize.matrix import find_mixers, mixing_matrices, plot_block

RANDOM = ['--model', 'test_hydra_vit', '--random-init', '--device', 'cpu']


def tiny(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_hydra_vit', depth=2, **{'img_size': (64, 96), **kwargs}).eval()


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / 'photo.png'
    noise = np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_matrix_is_that_of_the_mixer_on_its_own_input():
    model, image = tiny(), torch.randn(1, 3, 64, 96)
    first, last = mixing_matrices(model, image, blocks=[0, -1])
    assert (first.name, last.name) == ('blocks.0.mixer', 'blocks.1.mixer')
    assert (first.block, last.block) == (0, 1)
    assert last.grid == (4, 6)
    with torch.no_grad():
        x = model.patch_embed(image)
        x = model.blocks[0](x)
        expected = model.blocks[1].mixer.matrix(model.blocks[1].norm1(x))[0]
    torch.testing.assert_close(last.matrix, expected)
    assert torch.equal(last.row(2, 5), last.matrix[:, 2 * 6 + 5].reshape(-1, 4, 6))


@pytest.mark.parametrize('order', SCAN_ORDERS)
@pytest.mark.parametrize('token', [None, 'first', 'middle', 'last'])
def test_tokens_lie_where_the_scan_takes_them(order, token):
    """Blocks that pass tokens on unchanged show where each patch of the embedding stands in their input."""
    kwargs = {} if token is None else dict(class_token=True, class_token_position=token)
    model, image, seen = tiny(scan_order=order, **kwargs), torch.randn(1, 3, 64, 96), {}
    for i, block in enumerate(model.blocks):
        torch.nn.init.zeros_(block.mixer.out_proj.weight)
        block.norm1.register_forward_pre_hook(lambda _, args, i=i: seen.update({i: args[0][0]}))
    second, first = mixing_matrices(model, image, blocks=[1, 0])
    assert (first.block, second.block) == (0, 1)
    with torch.no_grad():
        patches = model.patch_embed(image)[0]
    for block in (first, second):
        sequence = seen[block.block]
        torch.testing.assert_close(sequence[block.order[block.num_prefix_tokens :]], patches)
        assert sorted(block.order.tolist()) == list(range(len(sequence)))
        where = torch.cdist(patches[None, 15], sequence).argmin()  # row 2, column 3
        assert block.position(2, 3) == where
        assert torch.equal(block.row(2, 3)[:, 1, 4], block.matrix[:, where, block.position(1, 4)])


@pytest.mark.parametrize('mixer', ['toeplitz', 'attention', 'vit_attention'])
@pytest.mark.parametrize('dynamic', [False, True])
def test_other_mixers(mixer, dynamic):
    kwargs = {} if mixer == 'vit_attention' else {'mixer_kwargs': {'data_dependent': False}}
    model = tiny(mixer=mixer, dynamic_img_size=dynamic, **kwargs)
    size = (48, 80) if dynamic else (64, 96)
    block = mixing_matrices(model, torch.randn(1, 3, *size), blocks=[1])[0]
    assert block.grid == (size[0] // 16, size[1] // 16)
    if 'attention' in mixer:
        torch.testing.assert_close(block.row(1, 1).sum((1, 2)), torch.ones(len(block.matrix)))


def test_heads_are_chosen_and_the_model_is_left_as_it_was():
    model, image = tiny(expand=4), torch.randn(1, 3, 64, 96)
    (every,) = mixing_matrices(model, image, blocks=[1])
    (some,) = mixing_matrices(model, image, blocks=[1], heads=[2, -4])
    assert torch.equal(some.matrix, every.matrix[[2, 0]])
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert [name for name, _ in find_mixers(model)] == ['blocks.0.mixer', 'blocks.1.mixer']


def test_bad_input():
    model, image = tiny(), torch.randn(1, 3, 64, 96)
    with pytest.raises(ValueError, match='block=2; there are 2'):
        mixing_matrices(model, image, blocks=[2])
    with pytest.raises(ValueError, match='head=7'):
        mixing_matrices(model, image, heads=[7])
    with pytest.raises(ValueError, match='one image'):
        mixing_matrices(model, image.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match='no mixer with a matrix'):
        mixing_matrices(timm.create_model('test_vit'), torch.randn(1, 3, 160, 160))
    (block,) = mixing_matrices(model, image, blocks=[0])
    with pytest.raises(ValueError, match='rows 0 to 3, columns 0 to 5'):
        block.row(4, 0)


def test_plot_has_a_panel_for_every_head():
    (block,) = mixing_matrices(tiny(expand=4), torch.randn(1, 3, 64, 96), blocks=[0])
    figure = plot_block(block, torch.rand(64, 96, 3), (1, 2), title='a title')
    titles = [axes.get_title() for axes in figure.axes]
    for head in range(4):
        assert f'head {head}: M' in titles
        assert f'head {head}: row of the patch' in titles
    lower = next(axes for axes in figure.axes if axes.get_title() == 'head 3: row of the patch')
    np.testing.assert_array_equal(lower.images[0].get_array(), block.row(1, 2)[3])
    assert lower.get_xlabel() == 'patch column'


def test_a_head_a_channel_does_not_make_a_wall_of_panels():
    (block,) = mixing_matrices(tiny(mixer='m2', img_size=32), torch.randn(1, 3, 32, 32), blocks=[0])
    assert block.matrix.shape == (128, 4, 4)
    figure = plot_block(block, torch.rand(32, 32, 3), (0, 0), title='a title')
    assert 'the first 27 of 128 heads' in figure.get_suptitle()
    titles = [axes.get_title() for axes in figure.axes]
    assert 'head 26: M' in titles
    assert 'head 27: M' not in titles


def test_command(photo, tmp_path, capsys):
    out = tmp_path / 'a.png'
    options = ['--layer', '1', '--heads', '0,3', '--patch', '2,3', '--img-size', '96', *RANDOM]
    options += ['--model-kwargs', 'depth=2', 'expand=4']
    assert main(['visualize', 'matrix', str(photo), *options, '--output', str(out)]) == 0
    assert 'test_hydra_vit, random weights' in capsys.readouterr().out
    with Image.open(out) as picture:
        assert min(picture.size) > 400


def test_command_refuses_what_is_no_image(fails, tmp_path):
    (tmp_path / 'text.png').write_text('no image')
    assert 'text.png cannot be read' in fails('visualize', 'matrix', tmp_path / 'text.png', *RANDOM)

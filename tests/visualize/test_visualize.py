"""Pictures show what they say: against scikit-learn, closed forms, and hooks inside the models."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import hydra_vision  # noqa: F401
from hydra_vision.cli import main
from hydra_vision.features import FeatureError, image_features, load_backbone, open_images
from hydra_vision.models.scan_order import SCAN_ORDERS, raster_index
from hydra_vision.visualize import effective_receptive_field, grad_cam, pca_rgb, reshape_transform, similarity_map
from hydra_vision.visualize.features import plot_similarity
from hydra_vision.visualize.figures import load_pictures
from hydra_vision.visualize.receptive_field import field_side

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = f'local-dir:{ROOT / "weights" / "hydra_vit_nano_digits"}'
RANDOM = ['--model', 'test_hydra_vit', '--random-init', '--img-size', '32x64', '--device', 'cpu']


def small(name: str = 'test_hydra_vit', **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, img_size=(32, 64), num_classes=5, **kwargs).eval()


def test_pca_is_scikit_learns_on_one_basis():
    from sklearn.decomposition import PCA

    torch.manual_seed(0)
    features = torch.randn(3, 8, 4, 6) * torch.arange(1, 9).reshape(8, 1, 1)
    colours, share = pca_rgb(features)
    tokens = features.permute(0, 2, 3, 1).reshape(-1, 8).double().numpy()
    pca = PCA(3).fit(tokens)
    np.testing.assert_allclose(share, pca.explained_variance_ratio_, rtol=1e-5)
    expected = pca.transform(tokens)
    for i in range(3):
        ours = colours[..., i].flatten().numpy()
        inside = (ours > 0) & (ours < 1)
        assert abs(np.corrcoef(ours[inside], expected[inside, i])[0, 1]) > 0.99999
    again, _ = pca_rgb(torch.cat([features, features[:1]]))
    torch.testing.assert_close(again[0], again[3])  # the same patch has the same colour in every image
    with pytest.raises(FeatureError, match='no three principal components'):
        pca_rgb(torch.randn(1, 2, 5, 5))


def test_pca_signs_and_range():
    """The largest loading of each component is positive; 98 of 100 patches span black to full colour."""
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(8, 3)).Q
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    values = torch.randn(400, 3) * torch.tensor([3.0, 2.0, 1.0])
    for sign in (1, -1):
        features = (sign * values @ directions.T).T.reshape(1, 8, 20, 20)
        colours = pca_rgb(features)[0].reshape(-1, 3)
        for i in range(3):
            inside = (colours[:, i] > 0) & (colours[:, i] < 1)
            assert inside.float().mean() == pytest.approx(0.98, abs=0.006)
            assert np.corrcoef(colours[inside, i], sign * values[inside, i])[0, 1] > 0.98


def test_rounding_is_no_picture():
    torch.manual_seed(0)
    flat = 7 + 1e-6 * torch.randn(1, 16, 5, 5)  # what a model gives for equal patches
    assert pca_rgb(flat)[0].max() < 0.2
    figure = plot_similarity(torch.rand(1, 50, 50, 3), flat, (1, 1), ['a'], 'title')
    drawn = figure.axes[1].images[0]
    assert drawn.norm(drawn.get_array()).min() > 0.99


def test_the_frame_is_around_the_patch():
    torch.manual_seed(0)
    figure = plot_similarity(torch.rand(1, 40, 90, 3), torch.randn(1, 8, 4, 6), (3, 1), ['a'], 'title')
    upper, lower = (axes.patches[0].get_bbox().extents for axes in figure.axes[:2])
    np.testing.assert_allclose(upper, [14.5, 29.5, 29.5, 39.5])  # x0 y0 x1 y1: column 1 of 15 px, row 3 of 10 px
    np.testing.assert_allclose(lower, [0.5, 2.5, 1.5, 3.5])


def test_pictures_are_what_the_model_sees(photo):
    """The whole image, squashed; normalised for the model, in its own colours for the reader."""
    backbone = load_backbone('test_hydra_vit', random_init=True, img_size=(32, 64))
    x, pictures = load_pictures(backbone, open_images(photo), [0])
    with Image.open(photo) as image:
        whole = np.asarray(image.resize((64, 32), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(pictures[0], whole, atol=0.01)
    mean, std = (torch.tensor(backbone.data[key]) for key in ('mean', 'std'))
    torch.testing.assert_close(x[0].permute(1, 2, 0) * std + mean, pictures[0])


def test_similarity():
    features = torch.randn(2, 8, 4, 6)
    maps = similarity_map(features, (3, 5))
    assert maps.shape == (2, 4, 6)
    assert maps[0, 3, 5] == pytest.approx(1)
    expected = torch.cosine_similarity(features[1, :, 2, 1], features[0, :, 3, 5], dim=0)
    torch.testing.assert_close(maps[1, 2, 1], expected)
    with pytest.raises(FeatureError, match=r'patch=\(4, 0\) is outside of the grid; allowed: rows 0 to 3'):
        similarity_map(features, (4, 0))


def test_receptive_field_of_a_model_that_does_not_mix_is_its_patch():
    model = small()
    x = torch.randn(2, 3, 32, 64)
    field = effective_receptive_field(model, x)
    assert field.shape == (32, 64)
    assert (field > 0).float().mean() > 0.9  # untrained, every token still sees every other one
    for block in model.blocks:
        torch.nn.init.zeros_(block.mixer.out_proj.weight)
    field = effective_receptive_field(model, x)
    inside = torch.zeros(32, 64, dtype=torch.bool)
    inside[16:32, 32:48] = True
    assert field.max() == 1
    assert (field[inside] > 0).all()
    assert not field[~inside].any()


@pytest.mark.parametrize('layers', [None, [1]])
def test_receptive_field_is_no_rounding(layers):
    """Gradients that float32 can tell from noise: float64 gives the same picture, other images another one."""
    model, x = small(scan_order='snake'), torch.randn(2, 3, 32, 64)
    field = effective_receptive_field(model, x, layers=layers)
    exact = effective_receptive_field(model.double(), x.double(), layers=layers)
    torch.testing.assert_close(field, exact, atol=1e-4, rtol=1e-3)
    generator, expected = torch.Generator().manual_seed(0), 0
    for image in x.double():
        direction = torch.randn(64, generator=generator).double()
        pixels = image[None].requires_grad_()
        maps = model.forward_intermediates(pixels, indices=layers or 1, norm=True, intermediates_only=True)
        (maps[-1][0, :, 1, 2] @ direction).backward()
        expected = expected + pixels.grad[0].abs().sum(0)
    torch.testing.assert_close(exact, (expected / expected.max()).float())


def test_field_side():
    field = torch.zeros(32, 64)
    field[16:32, 32:48] = 1  # the middle one of 2 x 4
    assert field_side(field, 1.0, (2, 4)) == pytest.approx((16 * 16 / (32 * 64)) ** 0.5)
    for square, long in (((), ()), (((4, 4),), ((2, 8),))):
        assert field_side(torch.ones(40, 40), 0.25, *square) == pytest.approx(0.5, abs=0.03)
        assert field_side(torch.ones(20, 80), 1.0, *long) == 1
    point = torch.zeros(41, 41)
    point[20, 20] = 1
    assert field_side(point) == pytest.approx(1 / 41)


TOKENS = [dict(), *(dict(class_token=True, class_token_position=position) for position in ('first', 'middle', 'last'))]


@pytest.mark.parametrize('order', SCAN_ORDERS)
@pytest.mark.parametrize('token', TOKENS, ids=lambda token: token.get('class_token_position', 'none'))
def test_reshape_transform_undoes_scan_orders(order, token):
    model = small(scan_order=order, **token)
    x, seen = torch.randn(1, 3, 32, 64), {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, y, i=i: seen.update({i: y}))
    with torch.inference_mode():
        maps = model.forward_intermediates(x, intermediates_only=True, output_fmt='NCHW')
        for i, expected in enumerate(maps):
            torch.testing.assert_close(reshape_transform(model, (32, 64), block=i)(seen[i]), expected)


def test_reshape_transform_of_a_vit_and_bad_input():
    vit = small('test_vit')
    tokens = vit.forward_features(torch.randn(2, 3, 32, 64))
    expected = tokens[:, 1:].transpose(1, 2).reshape(2, -1, 2, 4)
    torch.testing.assert_close(reshape_transform(vit, (32, 64))(tokens), expected)
    with pytest.raises(FeatureError, match='9 of them fit images'):
        reshape_transform(vit, (32, 64))(tokens[:, 1:])
    with pytest.raises(FeatureError, match='block=4 is out of range'):
        reshape_transform(small(), (32, 64), block=4)
    with pytest.raises(FeatureError, match='ResNet has no tokens'):
        reshape_transform(timm.create_model('test_resnet'), (32, 64))


def test_grad_cam_at_the_norm_splits_the_logit():
    image = pytest.importorskip('pytorch_grad_cam').utils.image
    model, x = small(), torch.randn(2, 3, 32, 64)
    maps, classes = grad_cam(model, x)
    assert maps.shape == (2, 32, 64)
    with torch.inference_mode():
        assert classes.tolist() == model(x).argmax(1).tolist()
        patches = image_features(model, x, pool='none')
        for i, chosen in enumerate(classes):
            values = torch.einsum('dhw,d->hw', patches[i], model.head.weight[chosen] / 8).clamp_min(0)
            expected = image.scale_cam_image(values[None].numpy(), (64, 32))
            expected = image.scale_cam_image(expected)[0]  # the library scales each layer, then all layers together
            np.testing.assert_allclose(maps[i], expected, atol=1e-4)


POOLED = dict(class_token=True, class_token_position='middle', global_pool='token')


@pytest.mark.parametrize(
    ('build', 'kwargs'),
    [
        *(({}, kwargs) for kwargs in (dict(), dict(block=0), dict(block=-1))),
        *((POOLED, kwargs) for kwargs in (dict(), dict(block=0))),  # behind the last mixer, patches have no gradient
    ],
)
def test_grad_cam_of_a_class(build, kwargs):
    pytest.importorskip('pytorch_grad_cam')
    model, x = small(scan_order='alternate', **build), torch.randn(2, 3, 32, 64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    maps, classes = grad_cam(model, x, classes=[3, 0], **kwargs)
    assert classes.tolist() == [3, 0]
    assert maps.isfinite().all()
    assert maps.flatten(1).std(1).min() > 0
    other, _ = grad_cam(model, x, classes=[1, 1], **kwargs)
    assert not torch.allclose(maps, other)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for bad in ([5, 0], [1]):
        with pytest.raises(FeatureError, match='allowed: one each, 0 to 4'):
            grad_cam(model, x, classes=bad)


def test_grad_cam_of_an_image_of_another_size():
    pytest.importorskip('pytorch_grad_cam')
    maps, _ = grad_cam(small(), torch.randn(1, 3, 128, 160))
    assert maps.shape == (1, 128, 160)


@pytest.mark.parametrize('block', [0, 1, -1])
def test_grad_cam_of_a_block_by_hand(block):
    """Scan orders alternate: the map of a block lies on the grid as that block scans."""
    image = pytest.importorskip('pytorch_grad_cam').utils.image
    model, x, kept = (
        small(scan_order='alternate', class_token=True, class_token_position='middle'),
        torch.randn(1, 3, 32, 64),
        [],
    )
    handle = model.blocks[block].register_forward_hook(lambda _, __, y: kept.append(y))
    logit = model(x)[0, 2]
    handle.remove()
    (gradient,) = torch.autograd.grad(logit, kept[0])
    order = raster_index('column' if block % 2 else 'row', 2, 4)
    patches = torch.empty(64, 2 * 4)
    weights = torch.cat([gradient[0, :4], gradient[0, 5:]]).mean(0)  # the class token stands at 4
    patches[:, order] = torch.cat([kept[0][0, :4], kept[0][0, 5:]]).detach().T
    values = (weights @ patches).clamp_min(0).reshape(1, 2, 4)
    expected = image.scale_cam_image(image.scale_cam_image(values.detach().numpy(), (64, 32)))[0]
    maps, _ = grad_cam(model, x, classes=[2], block=block)
    np.testing.assert_allclose(maps[0], expected, atol=1e-4)


def test_grad_cam_without_a_head():
    pytest.importorskip('pytorch_grad_cam')
    model = small()
    model.reset_classifier(0)
    with pytest.raises(FeatureError, match='no classification head'):
        grad_cam(model, torch.randn(1, 3, 32, 64))


def test_untrained_twin():
    backbone = load_backbone(CHECKPOINT)
    twin = backbone.untrained()
    assert twin.weights == 'random'
    assert not any(module.training for module in twin.model.modules())
    assert twin.fingerprint() == backbone.untrained().fingerprint() != backbone.fingerprint()
    assert {k: v.shape for k, v in twin.model.state_dict().items()} == {
        k: v.shape for k, v in backbone.model.state_dict().items()
    }


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / 'photo.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    ('kind', 'options'),
    [
        ('pca', ['--layer', '1']),
        ('similarity', ['--patch', '1,3']),
        ('receptive-field', []),
        ('gradcam', ['--target', '7']),
        ('matrix', ['--layer', '2', '--heads', '0', '--patch', '0,0']),
    ],
)
def test_command_draws_each_kind(kind, options, photo, tmp_path, capsys):
    if kind == 'gradcam':
        pytest.importorskip('pytorch_grad_cam')
    out = tmp_path / 'out.png'
    assert main(['visualize', kind, str(photo), '--index', '0', '--output', str(out), *options, *RANDOM]) == 0
    assert 'test_hydra_vit, random weights' in capsys.readouterr().out
    with Image.open(out) as picture:
        assert min(picture.size) > 200
        assert len(picture.convert('RGB').getcolors(1_000_000)) > 100


def test_gallery_is_what_the_page_shows(tmp_path, capsys):
    """The command on the page makes the pictures on the page, each small."""
    pytest.importorskip('pytorch_grad_cam')
    page = (ROOT / 'docs' / 'gallery.md').read_text()
    (command,) = [line for line in page.splitlines() if line.startswith('hydra-vision visualize gallery')]
    words = command.split()[1:]
    model = words.index('--model') + 1
    words[model] = words[model].replace('local-dir:', f'local-dir:{ROOT}/')
    words[words.index('--output') + 1] = str(tmp_path)
    assert main([word for word in words if word != '--overwrite']) == 0
    made = {path.name for path in tmp_path.iterdir()}
    kept = {path.name: path.stat().st_size for path in (ROOT / 'docs' / 'gallery').iterdir()}
    assert made == set(kept)
    assert max(kept.values()) < 150_000
    assert all(f'](gallery/{name})' in page for name in made)


def test_command_says_what_is_wrong(fails, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = photo.read_bytes()
    for words, match in (
        ('pcaa photo.png', "nearest valid name is 'pca'"),
        ('pca photo.png --target 3', '--target is for gradcam'),
        ('pca photo.png --index 1', 'image 1 is out of range'),
        ('pca photo.png --index 0 --output p.jpg', 'must end in .png'),
        ('pca photo.png --index 0 --output photo.png', 'exists already'),
        ('pca photo.png --index 0 --layer 4', 'layer 4 is out of range'),
        ('pca photo.png --crop-pct 0.5', '--crop-pct'),  # pictures show whole images
        ('matrix photo.png --index 0,0', 'matrix draws one image'),
        ('matrix photo.png --index 0 --layer 4', 'block=4'),
        ('matrix photo.png --index 0 --heads 2', 'head=2'),
        ('matrix photo.png --index 0 --patch 2,0', 'outside of the grid'),
        ('matrix photo.png --index 0 --patch 1', 'ROW,COLUMN'),
        ('matrix photo.png --index 0 --model test_vit --img-size 32', 'no mixer with a matrix'),
        ('gallery photo.png --output photo.png', 'a gallery needs one'),
        ('pca photo.png --dpi 100000', 'allowed: 10 to 1200'),
    ):
        assert match in fails('visualize', *words.split()[:2], *RANDOM, *words.split()[2:])
    assert 'no model' in fails('visualize', 'pca', 'photo.png')
    assert [path.name for path in tmp_path.iterdir()] == ['photo.png']
    assert photo.read_bytes() == before


def test_command_says_what_is_wrong_with_a_class(fails, photo, tmp_path):
    pytest.importorskip('pytorch_grad_cam')
    command = ['visualize', 'gradcam', photo, *RANDOM, '--output', tmp_path / 'p.png', '--target']
    for target, match in (('cat', 'no class names'), ('1000', '0 to 999')):
        assert match in fails(*command, target)


def test_a_missing_extra_is_named(photo, monkeypatch, fails, tmp_path):
    monkeypatch.setitem(__import__('sys').modules, 'pytorch_grad_cam', None)
    error = fails('visualize', 'gradcam', photo, '--output', tmp_path / 'o.png', *RANDOM)
    assert "pip install 'hydra-vision[explain]'" in error


def test_captum_attributes_through_the_mixers():
    attr = pytest.importorskip('captum.attr')
    model, x = small(), torch.randn(1, 3, 32, 64)
    values, gap = attr.IntegratedGradients(model).attribute(x, target=2, n_steps=32, return_convergence_delta=True)
    assert values.shape == x.shape
    with torch.inference_mode():
        difference = model(x)[0, 2] - model(torch.zeros_like(x))[0, 2]
    assert float(values.sum()) == pytest.approx(float(difference), abs=0.02)
    assert abs(float(gap)) < 0.02

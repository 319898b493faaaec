"""Scan orders: permutations of any grid, outputs by rows, tracing, other image sizes."""

import itertools

import pytest
import timm
import torch

from hydra_vision.models import scan_order
from hydra_vision.models.hydra_vit import checkpoint_filter_fn
from hydra_vision.models.scan_order import SCAN_ORDERS, raster_index, reorder
from hydra_vision.visualize.matrix import mixing_matrices

ORDERS = [order for order in SCAN_ORDERS if order != 'row']


def tiny(order, **kwargs):
    torch.manual_seed(0)
    kwargs = {'img_size': (48, 80), 'depth': 3, 'scan_order': order, **kwargs}
    model = timm.create_model('test_hydra_vit', **kwargs)
    for parameter in model.parameters():  # far from the near-identity of a new model
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return model.eval()


@pytest.mark.parametrize('order', ['row', 'column', 'snake', 'hilbert'])
def test_every_order_visits_every_patch_once(order):
    for height in range(1, 12):
        for width in range(1, 12):
            assert sorted(raster_index(order, height, width)) == list(range(height * width))


def test_known_orders():
    assert raster_index('row', 2, 3) == [0, 1, 2, 3, 4, 5]
    assert raster_index('column', 2, 3) == [0, 3, 1, 4, 2, 5]
    assert raster_index('snake', 3, 2) == [0, 1, 3, 2, 4, 5]
    assert raster_index('hilbert', 2, 2) in ([0, 2, 3, 1], [0, 1, 3, 2])
    with pytest.raises(ValueError, match="order='zigzag'"):
        raster_index('zigzag', 2, 2)
    with pytest.raises(ValueError, match="scan_order='spiral'"):
        tiny('spiral')


@pytest.mark.parametrize('order', ['snake', 'hilbert'])
def test_neighbours_in_the_sequence_touch(order):
    for height, width in [(1, 1), (1, 9), (7, 1), (8, 8), (14, 14), (12, 20), (7, 10), (13, 5), (24, 9), (15, 27)]:
        cells = [divmod(i, width) for i in raster_index(order, height, width)]
        steps = [(abs(y - v), abs(x - u)) for (y, x), (v, u) in itertools.pairwise(cells)]
        assert all(max(step) == 1 for step in steps)
        diagonal = steps.count((1, 1))
        assert diagonal <= (1 if order == 'hilbert' and (height % 2 or width % 2) else 0)


def test_hilbert_keeps_close_patches_closer_than_rows():
    """Half of the patches within a 4 x 4 window follow each other within few steps."""

    def spread(order):
        place = torch.empty(16, 16)
        place.view(-1)[torch.tensor(raster_index(order, 16, 16))] = torch.arange(256.0)
        windows = place.unfold(0, 4, 4).unfold(1, 4, 4).reshape(16, 16)
        return (windows.amax(1) - windows.amin(1)).mean()

    assert spread('hilbert') == 15
    assert spread('row') == 51


@pytest.mark.parametrize('class_index', [-1, 0, 7, 15])
def test_reorder_and_its_gradient(class_index):
    length = 15 + (class_index >= 0)
    x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    y = reorder(x, 3, 5, 'snake', 'hilbert', class_index)
    assert torch.equal(reorder(y, 3, 5, 'hilbert', 'snake', class_index), x)
    patches = [t for t in range(length) if t != class_index]
    raster = x.new_empty(2, 15, 3)
    raster[:, raster_index('snake', 3, 5)] = x.detach()[:, patches]
    assert torch.equal(y[:, patches], raster[:, raster_index('hilbert', 3, 5)])
    if class_index >= 0:
        assert torch.equal(y[:, class_index], x[:, class_index])
    weight = torch.randn_like(y)
    (grad,) = torch.autograd.grad((y * weight).sum(), x)
    assert torch.equal(grad, reorder(weight, 3, 5, 'hilbert', 'snake', class_index))


@pytest.mark.parametrize('position', [None, 'first', 'middle', 'last'])
@pytest.mark.parametrize('order', ORDERS)
def test_model_against_blocks_on_permuted_tokens(order, position):
    """Permuting before each block and back after it, by hand, gives the same features and maps."""
    kwargs = {} if position is None else {'class_token': True, 'class_token_position': position}
    model = tiny(order, pos_embed='learn', **kwargs)
    x = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        tokens = model.patch_embed(x) + model.pos_embed
        cls = None if position is None else model.cls_token.expand(2, -1, -1)
        maps = []
        for i, block in enumerate(model.blocks):
            now = ('row', 'column')[i % 2] if order == 'alternate' else order
            index = torch.tensor(raster_index(now, 3, 5))
            sequence = tokens[:, index]
            if cls is not None:
                cut = {'first': 0, 'middle': 7, 'last': 15}[position]
                sequence = torch.cat([sequence[:, :cut], cls, sequence[:, cut:]], 1)
            sequence = block(sequence)
            if cls is not None:
                cls = sequence[:, cut : cut + 1]
                sequence = torch.cat([sequence[:, :cut], sequence[:, cut + 1 :]], 1)
            tokens = torch.empty_like(sequence)
            tokens[:, index] = sequence
            maps.append(tokens.transpose(1, 2).reshape(2, -1, 3, 5))
        expected = model.norm(tokens if cls is None else torch.cat([cls, tokens], 1))
        final, intermediates = model.forward_intermediates(x)
        torch.testing.assert_close(model.forward_features(x), expected)
        torch.testing.assert_close(final, expected)
        for ours, theirs in zip(intermediates, maps, strict=True):
            torch.testing.assert_close(ours, theirs)
        row = tiny('row', pos_embed='learn', **kwargs)
        row.load_state_dict(model.state_dict())
        assert not torch.allclose(row(x), model(x), atol=1e-3)  # the order matters


@pytest.mark.parametrize('order', ORDERS)
def test_other_sizes(order):
    model = tiny(order, dynamic_img_size=True)
    fixed = tiny(order)
    fixed.load_state_dict(model.state_dict())
    for size in [(48, 80), (32, 16), (96, 64)]:
        fixed.set_input_size(size)
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(model(x), fixed(x))
            (features,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
            assert features.shape == (1, 64, size[0] // 16, size[1] // 16)


@pytest.mark.parametrize('order', ['column', 'alternate', 'hilbert'])
def test_fx_script_and_checkpointing(order, tmp_path):
    model, x = tiny(order, class_token=True, class_token_position='middle'), torch.randn(2, 3, 48, 80)
    expected = model(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    torch.jit.save(torch.jit.script(model), tmp_path / 'model.pt')
    torch.testing.assert_close(torch.jit.load(tmp_path / 'model.pt')(x), expected)
    expected.sum().backward()
    plain = model.patch_embed.proj.weight.grad.clone()
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).sum().backward()
    torch.testing.assert_close(model.patch_embed.proj.weight.grad, plain)


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize(
    ('order', 'dynamic'),
    [
        ('alternate', True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (('hilbert', False), ('snake', True))),
    ],
)
def test_a_trace_can_be_made_and_saved(tmp_path, order, dynamic):
    scan_order._CACHE.clear()  # the first call of all is the trace
    model = tiny(order, depth=2, class_token=True, class_token_position='last', dynamic_img_size=dynamic)
    x = torch.randn(2, 3, 48, 80)
    torch.jit.save(torch.jit.trace(model, x), tmp_path / 'model.pt')
    torch.testing.assert_close(torch.jit.load(tmp_path / 'model.pt')(x + 1), model(x + 1), rtol=1e-4, atol=1e-5)
    model(x).sum().backward()  # nothing of the trace is left in the cache


def test_inference_mode_leaves_nothing_that_breaks_training():
    model, x = tiny('hilbert', img_size=(64, 144)), torch.randn(1, 3, 64, 144)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()


@pytest.mark.slow
def test_compile_and_export():
    def scan(x):  # (B, H, W, C)
        return reorder(x.flatten(1, 2), x.shape[1], x.shape[2], 'row', 'hilbert', -1) * 2

    torch._dynamo.reset()
    compiled = torch.compile(scan, backend='aot_eager', fullgraph=True)
    for height, width in [(3, 5), (4, 4), (7, 2)]:  # from the second one on, sizes are symbols
        x = torch.randn(2, height, width, 3, requires_grad=True)
        assert torch.equal(compiled(x), scan(x))
        grads = [torch.autograd.grad((f(x) ** 2).sum(), x)[0] for f in (compiled, scan)]
        assert torch.equal(*grads)
    exported = torch.export.export(_Scan(scan), (x,)).module()
    assert torch.equal(exported(x), scan(x))


@pytest.mark.parametrize('size', [(3, 5), (4, 4), (1, 6), (7, 2)], ids=str)
@pytest.mark.parametrize('orders', list(itertools.product(('row', 'column', 'snake'), repeat=2)), ids=str)
def test_arithmetic_for_exporters_gives_the_same_index(orders, size):
    H, W = size
    for class_index in (-1, 0, H * W // 2, H * W):
        tokens = torch.arange(H * W + (class_index >= 0))
        expected = scan_order._positions(H, W, *orders, class_index)
        assert scan_order._computed(tokens, H, W, *orders, class_index).tolist() == expected


class _Scan(torch.nn.Module):
    def __init__(self, scan):
        super().__init__()
        self.scan = scan

    def forward(self, x):
        return self.scan(x)


def test_dropped_patches():
    model = tiny('hilbert', patch_drop_rate=0.5).train()
    assert model.forward_features(torch.randn(2, 3, 48, 80)).shape == (2, 7, 64)
    with pytest.raises(ValueError, match="'alternate'"):
        tiny('alternate', patch_drop_rate=0.5)


def test_parameters_a_patch_stay_at_their_grid():
    kwargs = {'mixer': 'low_rank', 'mixer_kwargs': {'data_dependent': False}}
    model = tiny('hilbert', **kwargs)
    assert model(torch.randn(1, 3, 48, 80)).shape == (1, 1000)
    with pytest.raises(ValueError, match='position parameters are resampled by rows'):
        model.set_input_size((64, 64))
    with pytest.raises(ValueError, match='dynamic_img_size=False'):
        tiny('hilbert', dynamic_img_size=True, **kwargs)
    state = tiny('hilbert', **{**kwargs, 'img_size': 48}).state_dict()  # nine patches in scan order
    name = 'blocks.0.mixer.q'  # not resampled by rows: loading names the mismatch
    assert checkpoint_filter_fn(state, model)[name] is state[name]


def test_pictures_know_the_order():
    model = tiny('alternate')
    blocks = mixing_matrices(model, torch.randn(1, 3, 48, 80))
    assert blocks[0].order.tolist() == list(range(15))
    place = torch.empty(15, dtype=torch.long)
    place[raster_index('column', 3, 5)] = torch.arange(15)
    assert torch.equal(blocks[1].order, place)
    assert blocks[1].position(0, 1) == 3


def test_transforms_of_functions():
    model = (
        timm.create_model('test_hydra_vit', img_size=32, depth=2, scan_order='alternate').eval().requires_grad_(False)
    )
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.func.vmap(lambda image: model(image[None])[0])(x), model(x))
    gradient = torch.func.grad(lambda images: model(images).sum())(x)
    x.requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(model(x).sum(), x)[0])

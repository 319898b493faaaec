"""Batches of images of several sizes, padded or packed: each gets what it gets alone. And timm's NaFlex interface."""

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_naflex_loader
from timm.data.naflex_dataset import NaFlexCollator
from timm.data.naflex_transforms import Patchify

import hydra_vision  # noqa: F401

SIZES = [(64, 48), (32, 96), (48, 48), (16, 16)]
CLASS_TOKEN = [dict(class_token=True, class_token_position=p, global_pool='token') for p in ('first', 'middle', 'last')]
VARIANTS = [
    dict(),
    dict(global_pool='avgmax', dt_limit=(0.0, 0.1)),
    *CLASS_TOKEN,
    dict(pos_embed='learn', class_token=True, class_token_position='middle', share_bc=True, ngroups=2),
    dict(scan_order='snake', global_pool='max'),
    dict(scan_order='hilbert', class_token=True, class_token_position='last'),
    dict(scan_order='alternate', class_token=True, class_token_position='middle', global_pool='token'),
    dict(mixer=('quasiseparable', 'attention', 'vit_attention', 'vim'), headdim=16),
    dict(mixer='mamba'),
    *(dict(mixer='semiseparable', headdim=16, mixer_kwargs=dict(variant=v)) for v in ('causal', 'add', 'concat')),
]


def create(**kwargs):
    torch.manual_seed(0)
    options = {} if kwargs.get('mixer') else dict(d_state=16, headdim=16)
    depth = len(kwargs.get('mixer', '')) if isinstance(kwargs.get('mixer'), tuple) else 2
    kwargs = {'img_size': 64, 'num_classes': 5, 'depth': depth, 'embed_dim': 32, **options, **kwargs}
    model = timm.create_model('test_hydra_vit', dynamic_img_size=True, **kwargs).double().eval()
    with torch.no_grad():  # so that a class token, a state, ... matters
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator).double() for size in SIZES]  # the loader's patches are float32


def naflex_batch(length=24):
    patchify = Patchify(16)
    batch, _ = NaFlexCollator(length)([(patchify(image), 0) for image in images()])
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(batch['patches'].shape, generator=generator, dtype=torch.float64)
    batch['patches'] = torch.where(batch['patch_valid'].unsqueeze(-1), batch['patches'].double(), noise)
    return batch


def padded_batch():
    """Images with noise to their right and below, and which patches are theirs."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(len(SIZES), 3, 80, 96, generator=generator, dtype=torch.float64)
    valid = torch.zeros(len(SIZES), 5, 6, dtype=torch.bool)
    for b, image in enumerate(images()):
        _, H, W = image.shape
        x[b, :, :H, :W] = image
        valid[b, : H // 16, : W // 16] = True
    return x, valid


def packed_batch():
    """A row of all images' patches, those of each image shuffled."""
    batch = naflex_batch()
    generator = torch.Generator().manual_seed(5)
    valid, parts = batch['patch_valid'], {'patches': [], 'patch_coord': []}
    for b, own in enumerate(valid):
        order = torch.randperm(int(own.sum()), generator=generator)
        for name, part in parts.items():
            part.append(batch[name][b][own][order])
    cu_seqlens = torch.nn.functional.pad(valid.sum(1).cumsum(0), (1, 0))
    return {**{name: torch.cat(part).unsqueeze(0) for name, part in parts.items()}, 'cu_seqlens': cu_seqlens}


@pytest.mark.parametrize('kwargs', VARIANTS, ids=str)
def test_an_image_in_a_padded_batch_gets_what_it_gets_alone(kwargs):
    model = create(**kwargs)
    alone = torch.cat([model(image[None]) for image in images()])
    assert alone.std(0).min() > 1e-3
    x, valid = padded_batch()
    for rows in (model(naflex_batch()), model(x, patch_valid=valid.flatten(1))):
        torch.testing.assert_close(rows, alone, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize('kwargs', [*VARIANTS[:9], dict(mixer=('hydra', 'vit_attention'), headdim=16)], ids=str)
def test_an_image_in_a_packed_row_gets_what_it_gets_alone(kwargs):
    model = create(**kwargs)
    alone = torch.cat([model(image[None]) for image in images()])
    rows = model(packed_batch())
    assert rows.shape == alone.shape
    torch.testing.assert_close(rows, alone, rtol=1e-8, atol=1e-9)


def test_gradients_in_a_batch():
    model = create(class_token=True, class_token_position='last', pos_embed='learn').train()
    x, valid = padded_batch()
    batches = [lambda: model(x, patch_valid=valid), lambda: model(packed_batch())]
    gradients = []
    for out in (torch.cat([model(image[None]) for image in images()]), *(batch() for batch in batches)):
        gradients.append(torch.autograd.grad(out.square().sum(), list(model.parameters())))
    model.set_grad_checkpointing()
    for batch in batches:
        gradients.append(torch.autograd.grad(batch().square().sum(), list(model.parameters())))
    for alone, *others in zip(*gradients):
        for other in others:
            torch.testing.assert_close(other, alone, rtol=1e-8, atol=1e-10)


def test_stochastic_depth_drops_packed_images_one_by_one():
    model, batch = create(drop_path_rate=0.9, mlp_ratio=2.0).train(), packed_batch()
    torch.manual_seed(0)
    same = torch.stack([(model(batch) == model(batch)).all(1) for _ in range(40)])  # (40, images)
    assert same.any()
    assert not same.all()
    assert (same.any(1) & ~same.all(1)).any()


def test_features_stand_where_the_patches_stood():
    model = create(class_token=True, scan_order='hilbert')
    x, valid = padded_batch()
    features = model.forward_features(x, patch_valid=valid)
    assert torch.equal(features['patch_valid'], valid.flatten(1))
    alone = model.forward_features(images()[1][None])[0]
    torch.testing.assert_close(features['patches'][1, 0], alone[0])
    torch.testing.assert_close(features['patches'][1, 1:][valid[1].flatten()], alone[1:])


@pytest.mark.parametrize('norm', [False, True])
@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(scan_order='alternate', class_token=True, class_token_position='middle', depth=3),
        dict(scan_order='hilbert', pos_embed='learn'),
    ],
    ids=str,
)
def test_intermediates_of_an_image_are_those_it_has_alone(kwargs, norm):
    model = create(**kwargs)
    how = dict(indices=[0, 1], return_prefix_tokens=True, norm=norm, output_dict=True)
    expected = [model.forward_intermediates(image[None], output_fmt='NLC', **how) for image in images()]
    maps = [model.forward_intermediates(image[None], **how)['image_intermediates'] for image in images()]
    x, valid = padded_batch()
    padded = model.forward_intermediates(x, patch_valid=valid, **how)
    naflex = model.forward_intermediates(naflex_batch(), output_fmt='NLC', **how)
    batch = packed_batch()
    packed = model.forward_intermediates(batch, output_fmt='NLC', **how)
    assert torch.equal(naflex['patch_valid'], naflex_batch()['patch_valid'])
    assert torch.equal(packed['cu_seqlens'], batch['cu_seqlens'])
    n = model.num_prefix_tokens
    features = model.forward_features(batch)
    close = lambda got, wanted: torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9)  # noqa: E731
    for b, alone in enumerate(expected):
        h, w = maps[b][0].shape[2:]
        begin, end = batch['cu_seqlens'][b : b + 2].tolist()
        by_rows = (batch['patch_coord'][0, begin:end] * torch.tensor([w, 1])).sum(1)
        for i in (0, 1):
            own = alone['image_intermediates'][i][0]
            close(padded['image_intermediates'][i][b, :, :h, :w], maps[b][i][0])
            close(naflex['image_intermediates'][i][b, : h * w], own)
            close(packed['image_intermediates'][i][0, begin:end], own[by_rows])
            for batched in (padded, naflex) if n else ():
                close(batched['image_intermediates_prefix'][i][b], alone['image_intermediates_prefix'][i][0])
            if n:
                close(packed['image_intermediates_prefix'][i][:, b], alone['image_intermediates_prefix'][i][0])
        begin, end = features['cu_seqlens'][b : b + 2].tolist()
        final = torch.cat([alone['image_features'][0, :n], alone['image_features'][0, n:][by_rows]])
        close(packed['image_features'][0, begin:end], final)
        close(features['patches'][0, begin:end], final)


def test_forms_of_intermediates():
    model, batch = create(class_token=True), naflex_batch()
    final, pairs = model.forward_intermediates(batch, 1, True, False, False, 'NLC')  # timm's order of arguments
    only = model.forward_intermediates(batch, 1, True, False, True, 'NLC', True)
    assert torch.equal(pairs[0][0], only[0][0])
    assert torch.equal(pairs[0][1], only[0][1])
    torch.testing.assert_close(final, model.forward_features(batch)['patches'])
    parts = (batch['patches'], 1, True, False, False, 'NLC', True, False, batch['patch_coord'], batch['patch_valid'])
    assert torch.equal(model.forward_intermediates(*parts)[0][0], only[0][0])
    (early,) = model.forward_intermediates(batch, [0], stop_early=True, output_fmt='NLC', intermediates_only=True)
    (late,) = model.forward_intermediates(batch, [0], output_fmt='NLC', intermediates_only=True)
    assert torch.equal(early, late)
    with pytest.raises(ValueError, match="output_fmt='NCHW': the images of a NaFlex batch have no common grid"):
        model.forward_intermediates(batch)


def test_unpooled_tokens_of_a_packed_row():
    model, batch = create(global_pool=''), packed_batch()
    assert model(batch).shape == (1, batch['patches'].shape[1], 5)


def test_what_cannot_be_packed_is_named():
    batch = packed_batch()
    for kwargs, message in (
        (dict(mixer=('hydra', 'mamba')), 'cu_seqlens, block 1: Mamba has no form for several sequences'),
        (dict(learnable_init_states=True), 'cu_seqlens, block 0: learnable_init_states=True'),
    ):
        with pytest.raises(ValueError, match=message):
            create(**kwargs)(batch)
    model, (x, _) = create(), padded_batch()
    row, coord, cu_seqlens = batch.values()
    for message, arguments in (
        ('give one of the two', (row, coord, torch.ones(row.shape[:2], dtype=torch.bool), cu_seqlens)),
        (r'images \(B, C, H, W\) stand in no row', (x, None, None, cu_seqlens)),
        ('patches of shape .* need the', (row, None, None, cu_seqlens)),
        (r'it must rise from 0 to L = ', (row, coord, None, cu_seqlens[:-1])),
        ('the batch is 2', (row.expand(2, -1, -1), coord.expand(2, -1, -1), None, cu_seqlens)),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(ValueError, match='dropped from a packed batch; set patch_drop_rate=0'):
        create(patch_drop_rate=0.5).train()(batch)
    model.blocks[1].mixer.conv1d.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match='cu_seqlens, block 1: conv1d, fc_D or norm was replaced'):
        model(batch)


def test_patches_as_tensors_and_of_another_size():
    model, batch = create(), naflex_batch()
    expected = model(batch)
    square = batch['patches'].unflatten(2, (16, 16, 3))
    assert torch.equal(model(square, batch['patch_coord'], batch['patch_valid']), expected)
    smaller = square.permute(0, 1, 4, 2, 3).flatten(0, 1)
    smaller = torch.nn.functional.avg_pool2d(smaller, 2).unflatten(0, square.shape[:2]).permute(0, 1, 3, 4, 2)
    assert model({**batch, 'patches': smaller}).shape == expected.shape


def test_what_cannot_leave_padding_out_is_named():
    x, valid = padded_batch()
    for kwargs, message in (
        (dict(mixer='low_rank'), 'patch_valid, block 0: LowRank has no form'),
        (dict(mixer=('hydra', 'dft')), 'patch_valid, block 1: Fourier has no form'),
        (dict(mixer='attention', mixer_kwargs=dict(data_dependent=False)), 'Attention has no form'),
        (dict(learnable_init_states=True), 'learnable_init_states=True'),
        (dict(dt_limit=(0.01, 1.0)), 'dt_limit has the minimum 0.01'),
    ):
        with pytest.raises(ValueError, match=message):
            create(**kwargs)(x, patch_valid=valid)
    model, batch = create(), naflex_batch()
    for message, arguments in (
        (r'patch_valid has shape \(4, 29\)', (x, None, valid.flatten(1)[:, 1:])),
        (r'torch.float64; it must be \(4, 30\), torch.bool', (x, None, valid.double())),
        (r'patch_coord: patches of shape \(4, 24, 768\)', (batch['patches'], None, batch['patch_valid'])),
        (r'patch_coord has shape \(4, 23, 2\)', (batch['patches'], batch['patch_coord'][:, 1:])),
        (r'it must be \(B, N, 768\)', (batch['patches'][..., 1:], batch['patch_coord'])),
        ('images .* have their own', (x, batch['patch_coord'])),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(ValueError, match='set patch_drop_rate=0'):
        create(patch_drop_rate=0.5).train()(x, patch_valid=valid)


def test_one_compiled_graph():
    model = create()
    x, valid = padded_batch()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(x, patch_valid=valid), model(x, patch_valid=valid))


def test_timms_naflex_loader_trains():
    generator = torch.Generator().manual_seed(4)
    colours = torch.randint(0, 256, (2, 3), generator=generator)
    sizes = torch.randint(20, 90, (24, 2), generator=generator).tolist()
    dataset = [(Image.new('RGB', size, tuple(colours[i % 2].tolist())), i % 2) for i, size in enumerate(sizes)]
    loader = create_naflex_loader(
        dataset, train_seq_lens=(6, 16), batch_size=8, is_training=True, num_workers=0, device=torch.device('cpu')
    )
    model = create(num_classes=2).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for epoch in range(4):
        loader.dataset.set_epoch(epoch)
        for batch, targets in loader:
            losses.append(torch.nn.functional.cross_entropy(model(batch), targets))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
    assert losses[-1] < 0.5 * losses[0]

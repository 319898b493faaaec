"""lightly on our backbones: contrastive, self-distilled and masked pretraining each take a step that helps."""

import pytest
import timm
import torch
from torch import nn

from hydra_vision.downstream import random_token_mask


def backbone(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model('test_hydra_vit', **{'depth': 2, 'img_size': 64, 'num_classes': 0, **kwargs})


def step(modules: list[nn.Module], loss, **kwargs) -> tuple[float, float]:
    """The loss before and after a few steps on one batch; every parameter of the first module gets a gradient."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, **kwargs)
    values = []
    for _ in range(4):
        value = loss()
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        for name, p in modules[0].named_parameters():
            assert p.grad is not None or not p.requires_grad, name
        optimizer.step()
    return values[0], values[-1]


def test_indices_stay_in_scan_order():
    keep, mask = random_token_mask((5, 17), 0.5, num_prefix_tokens=1)
    assert keep.shape == (5, 9)
    assert (keep[:, 0] == 0).all()
    assert (keep.diff(dim=1) > 0).all()
    assert (mask.diff(dim=1) > 0).all()
    assert torch.equal(torch.cat([keep, mask], 1).sort(1).values, torch.arange(17).expand(5, 17))
    assert not torch.equal(keep[0], keep[1])
    for L, ratio, kept in ((100, 0.9, 10), (10, 0.9, 1), (196, 0.75, 49), (197, 0.6, 78), (16, 0.0, 16)):
        keep, mask = random_token_mask((2, L), ratio)
        assert (keep.shape[1], mask.shape[1]) == (kept, L - kept)
    for ratio in (1.0, -0.1):
        with pytest.raises(ValueError, match='mask_ratio'):
            random_token_mask((1, 16), ratio)
    with pytest.raises(ValueError, match='keeps none'):
        random_token_mask((1, 4), 0.9)


def test_simclr():
    heads = pytest.importorskip('lightly.models.modules.heads')
    from lightly.loss import NTXentLoss

    model, head, criterion = backbone(), heads.SimCLRProjectionHead(64, 64, 32), NTXentLoss(temperature=0.2)
    x = torch.randn(4, 3, 64, 64)
    views = x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)
    before, after = step([model, head], lambda: criterion(*(head(model(view)) for view in views)))
    assert after < before


def test_dino_multi_crop():
    heads = pytest.importorskip('lightly.models.modules.heads')
    from lightly.loss import DINOLoss
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    student, teacher = (
        nn.Sequential(backbone(dynamic_img_size=True), heads.DINOProjectionHead(64, 64, 32, 128)) for _ in range(2)
    )
    teacher.load_state_dict(student.state_dict())
    deactivate_requires_grad(teacher)
    criterion = DINOLoss(output_dim=128)
    crops = [torch.randn(4, 3, side, side) for side in (64, 64, 32, 32)]

    def loss() -> torch.Tensor:
        update_momentum(student, teacher, m=0.99)
        targets = [teacher(crop) for crop in crops[:2]]
        return criterion(targets, [student(crop) for crop in crops], epoch=0)

    start = {key: t.clone() for key, t in teacher.state_dict().items()}
    before, after = step([student], loss)
    assert before > 0
    assert after > 0
    # 3 steps at momentum 0.99: the teacher has moved, and stays near where it was
    moved = max((t - start[key]).abs().max().item() for key, t in teacher.state_dict().items())
    assert 0 < moved < 1e-2


@pytest.mark.parametrize('class_token', [False, True])
def test_mae(class_token):
    lightly = pytest.importorskip('lightly.models.modules')
    from lightly.models import utils

    prefix = int(class_token)
    vit = backbone(pos_embed='learn', class_token=class_token, global_pool='token' if class_token else 'avg')
    if class_token:  # lightly adds the position embedding to patches only where no_embed_class says so
        assert vit.no_embed_class
    encoder = lightly.MaskedVisionTransformerTIMM(vit=vit, pos_embed_initialization='learn')
    assert encoder.sequence_length == 16 + prefix
    decoder = lightly.MaskedVisionTransformerDecoderTIMM(
        num_patches=16, embed_dim=32, depth=1, num_heads=2, num_prefix_tokens=prefix
    )
    embed, predict = nn.Linear(64, 32), nn.Linear(32, 16 * 16 * 3)
    images = torch.randn(4, 3, 64, 64)
    idx_keep, idx_mask = random_token_mask((4, encoder.sequence_length), num_prefix_tokens=prefix)
    target = utils.get_at_index(utils.patchify(images, 16), idx_mask - prefix)

    def loss() -> torch.Tensor:
        encoded = embed(encoder.encode(images, idx_keep=idx_keep))
        tokens = utils.repeat_token(decoder.mask_token, (4, encoder.sequence_length))
        decoded = decoder.decode(utils.set_at_index(tokens, idx_keep, encoded))
        return nn.functional.mse_loss(predict(utils.get_at_index(decoded, idx_mask)), target)

    encoder.mask_token.requires_grad_(False)
    vit.head.requires_grad_(False)
    before, after = step([encoder, decoder, embed, predict], loss)
    assert after < before


def test_simmim():
    lightly = pytest.importorskip('lightly.models.modules')
    from lightly.models import utils

    encoder = lightly.MaskedVisionTransformerTIMM(
        vit=backbone(pos_embed='learn'), weight_initialization='skip', pos_embed_initialization='skip'
    )
    predict = nn.Linear(64, 16 * 16 * 3)
    images = torch.randn(4, 3, 64, 64)
    _, idx_mask = random_token_mask((4, 16), 0.5)
    target = utils.get_at_index(utils.patchify(images, 16), idx_mask)

    def loss() -> torch.Tensor:
        tokens = encoder.encode(images, idx_mask=idx_mask)
        return nn.functional.l1_loss(predict(utils.get_at_index(tokens, idx_mask)), target)

    before, after = step([encoder, predict], loss)
    assert after < before


def test_dropping_is_a_scan_over_the_rest():
    """lightly's path through the model is the model's own on the kept tokens; their order matters."""
    lightly = pytest.importorskip('lightly.models.modules')
    vit = backbone(pos_embed='learn').eval()
    encoder = lightly.MaskedVisionTransformerTIMM(
        vit=vit, weight_initialization='skip', pos_embed_initialization='skip'
    )
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(encoder.encode(images), vit.forward_features(images))
    keep, _ = random_token_mask((1, 16), 0.5)
    expected = vit.norm(vit.blocks((vit.patch_embed(images) + vit.pos_embed)[:, keep[0]]))
    torch.testing.assert_close(encoder.encode(images, idx_keep=keep), expected)
    flipped = encoder.encode(images, idx_keep=keep.flip(1)).flip(1)
    assert (flipped - expected).abs().max() > 1e-4

"""Evaluation against counting by hand, and on a GPU that is behind its loader."""

import pytest
import torch
from timm.data.loader import PrefetchLoader

from hydra_vision.train.evaluate import evaluate


class Brightness(torch.nn.Module):
    """Class k for an image whose pixels are k, after ``cycles`` of doing nothing on the GPU."""

    def __init__(self, classes, cycles=0):
        super().__init__()
        self.classes, self.cycles = classes, cycles

    def forward(self, images):
        if self.cycles:
            torch.cuda._sleep(self.cycles)
        level = images.float().mean((1, 2, 3))
        return -(level[:, None] - torch.arange(self.classes, device=images.device)).abs()


def test_counts_and_leaves_out_images_without_a_class():
    levels = torch.tensor([0, 1, 2, 3, 4, 5])
    images = levels[:, None, None, None].expand(-1, 3, 4, 4).float()
    targets = torch.tensor([0, 1, 3, 1, -1, 5])  # right, right, near, further off, not counted, right
    loader = [(images[:4], targets[:4]), (images[4:], targets[4:])]
    model = Brightness(7).train()
    found = evaluate({'a': model, 'b': model}, loader, torch.device('cpu'))
    assert found['a'] == found['b']
    assert found['a']['images'] == 5
    assert found['a']['top1'] == pytest.approx(60.0)
    assert found['a']['top5'] == pytest.approx(100.0)
    counted = targets >= 0
    loss = torch.nn.functional.cross_entropy(model(images)[counted], targets[counted])
    assert found['a']['loss'] == pytest.approx(float(loss), rel=1e-6)
    assert model.training


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_images_are_not_overwritten_while_the_gpu_is_behind():
    device = torch.device('cuda')
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None, None].expand(-1, 16, 3, 64, 64)
    batches = [(image.contiguous().pin_memory(), torch.full((16,), k)) for k, image in enumerate(images)]
    loader = PrefetchLoader(batches, mean=(0.0,) * 3, std=(1 / 255,) * 3, device=device)
    found = evaluate({'model': Brightness(40, cycles=4_000_000)}, loader, device)
    assert found['model']['top1'] == 100.0

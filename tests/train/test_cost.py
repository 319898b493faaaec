import pytest
import timm
import torch

from hydra_vision.bench.counting import count_model
from hydra_vision.train import cost
from hydra_vision.train.config import Config

CUDA = torch.device('cuda')


def recipe(name: str, **kwargs) -> Config:
    return Config.from_dict({'model': {'name': name, 'kwargs': kwargs}})


def test_operations_of_a_training_image():
    """Three forward passes, but for the gradient of the pixels, which nobody needs."""
    counts = count_model('test_hydra_vit', 160)
    flops = cost.training_flops(recipe('test_hydra_vit'), 1000, (3, 160, 160))
    assert flops == 3 * counts.flops - counts.stem_flops
    assert cost.training_flops(recipe('test_hydra_vit', depth=1), 1000, (3, 160, 160)) < flops
    assert cost.training_flops(recipe('test_vit'), 1000, (3, 160, 160)) > 0


def test_a_linear_layer_by_hand():
    embed, tokens, depth = 64, 100, 6
    flops = cost.training_flops(recipe('test_vit'), 10, (3, 160, 160))
    mlp = 2 * 2 * tokens * embed * 3 * embed * depth  # test_vit: mlp_ratio 3, without the attention
    model = timm.create_model('test_vit', num_classes=10)
    assert len(model.blocks) == depth
    assert 3 * mlp < flops < 3 * 6 * mlp


def test_a_linear_probe_has_no_backward_pass_but_that_of_the_classifier():
    counts = count_model('test_vit', 160)
    probe = Config.from_dict({'model': {'name': 'test_vit', 'freeze_backbone': True}})
    assert cost.training_flops(probe, 1000, (3, 160, 160)) == counts.flops + 2 * 64 * 1000


@pytest.mark.parametrize(
    ('name', 'amp', 'tf32', 'expected'),
    [
        ('NVIDIA H200', torch.bfloat16, True, 989e12),
        ('NVIDIA H100 PCIe', torch.float16, True, 756e12),
        ('NVIDIA H100 80GB HBM3', None, True, 495e12),
        ('NVIDIA A100-SXM4-80GB', torch.bfloat16, False, 312e12),
        ('NVIDIA L40S', torch.bfloat16, False, 362e12),
        ('NVIDIA L4', torch.bfloat16, False, 121e12),
        ('NVIDIA L40', torch.bfloat16, False, None),
        ('NVIDIA RTX A4000', torch.bfloat16, False, None),
        ('NVIDIA H200 NVL', torch.bfloat16, False, 835e12),
        ('NVIDIA H200', None, False, None),
        ('Some New GPU', torch.bfloat16, True, None),
    ],
)
def test_peaks_by_name_of_the_device(monkeypatch, name, amp, tf32, expected):
    monkeypatch.setattr(cost, 'device_name', lambda device: name)
    assert cost.peak_flops(CUDA, amp, tf32) == expected


def test_the_peak_and_the_hours_are_those_of_all_devices(monkeypatch):
    monkeypatch.setattr(cost, 'device_name', lambda device: 'NVIDIA H200')
    monkeypatch.setattr(cost.build, 'amp_dtype', lambda *_: torch.bfloat16)
    found = cost.measure_cost(recipe('test_vit'), 10, (3, 160, 160), CUDA, devices=8)
    assert found.peak == 8 * 989e12
    assert found.flops == cost.training_flops(recipe('test_vit'), 10, (3, 160, 160))
    assert cost.estimate(5400, 8, 'GPU') == '1:30:00 (h:mm:ss), 12.00 GPU hours'


def test_utilisation_is_told_only_where_the_peak_is_known():
    known = cost.Cost(flops=2e9, peak=1e12)
    assert known.mfu(100.0) == pytest.approx(0.2)
    unknown = cost.Cost(flops=2e9, peak=cost.peak_flops(torch.device('cpu'), torch.bfloat16, True))
    assert unknown.mfu(100.0) is None
    assert 'no MFU' in unknown.describe(torch.device('cpu'))
    assert cost.Cost(flops=None, peak=1e12).mfu(1.0) is None

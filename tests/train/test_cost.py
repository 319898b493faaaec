"""What a run costs: operations, peaks, and the short measurements of --dry-run and --bench-data."""

from types import SimpleNamespace

import pytest
import torch

from hydra_vision.flops import count_model
from hydra_vision.train import cost, measure
from hydra_vision.train.config import Config
from hydra_vision.train.cost import Cost
from hydra_vision.train.distributed import World
from hydra_vision.train.report import speed_line

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


def test_a_dry_run_prints_the_cost_and_writes_nothing(tiny, run, tmp_path):
    code, out, error = run(*tiny, '--dry-run')
    assert code == 0, error
    for text in ('2 steps of 8 images', '3 epochs, 3 validations', 'processor hours', 'nothing was written'):
        assert text in ' '.join(out.replace('│', ' ').split()), out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('devices', [1, 4])
def test_the_estimate_by_hand(monkeypatch, devices):
    """1000 images of 16 px a second and process, 250 of 32 px, 500 in validation: every size counts with its epochs."""
    config = Config.from_dict(
        {
            'data': {'img_size': 32, 'progressive_sizes': [16, 32], 'batch_size': 100},
            **{'schedule': {'epochs': 10, 'cooldown_epochs': 1}, 'run': {'validate_every': 2}},
        }
    )
    shown = []
    trainer = SimpleNamespace(
        **{'config': config, 'device': torch.device('cpu'), 'world': World(size=devices), 'epochs': 11},
        **{'cost': Cost(1e9, 1e13), 'console': None, 'train_loader': [None] * 20},
        val_loader=SimpleNamespace(dataset=range(1500)),
    )
    trainer.resize = lambda epoch: setattr(trainer, 'train_size', (3, 16, 16) if epoch < 5 else (3, 32, 32))
    pace = lambda trainer: (100, 0.1 if trainer.train_size[1] == 16 else 0.4)  # noqa: E731
    monkeypatch.setattr(measure, '_training_speed', pace)
    monkeypatch.setattr(measure, '_validation_rate', lambda trainer: 500.0)
    monkeypatch.setattr(measure, 'print_table', lambda console, title, header, rows: shown.extend(rows))
    measure.dry_run(trainer)
    rows = dict(shown)
    training, validating = 5 * 2000 / 1000 + 6 * 2000 / 250, 6 * 1500 / 500
    seconds = (training + validating) / devices
    assert rows['whole run'] == f'11 epochs, 6 validations, {devices} process(es)'
    assert rows['estimate'] == f'0:{int(seconds) // 60:02}:{int(seconds) % 60:02} (h:mm:ss), 0.02 processor hours'
    assert rows['validation share'] == f'{100 * validating / (training + validating):.0f} %'
    assert [row[1] for row in shown if row[0] == 'MFU'] == [f'{10 * devices:.1f} %', f'{2.5 * devices:.1f} %']
    assert {'training 5 epochs at 16x16', 'training 6 epochs at 32x32'} <= rows.keys()


def test_a_dry_run_takes_accumulated_batches_for_one_update(tiny, run):
    _, out, _ = run(*tiny, '--dry-run', '--accum-steps', 2, '--set', 'augment.mixup=0.5')
    assert '2 steps of 16 images' in ' '.join(out.replace('│', ' ').split())


def test_the_data_benchmark_says_which_one_is_the_limit(tiny, run, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, '_SECONDS', 0.3)
    code, out, error = run(*tiny, '--bench-data', '--workers', 1)
    assert code == 0, error
    assert 'loader alone, 1 process' in out
    assert 'the device is the limit' in out or 'the loader is the limit' in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('loader', 'device', 'text'),
    [(300.0, 100.0, 'the device is the limit: the loader is 3.0 times as fast'), (100.0, 400.0, 'about 9 processes')],
)
def test_the_verdict(loader, device, text):
    assert text in measure._verdict(loader, device, workers=2)


def test_measurements_take_no_output_folder(fails):
    assert 'leave out --output' in fails('--dry-run', '--output', 'x', code=2)
    assert 'not allowed with' in fails('--dry-run', '--bench-data', code=2)


@pytest.mark.parametrize(
    ('share', 'text'),
    [(0.03, '3 % of it (the loader keeps up)'), (0.3, 'would save up to that'), (0.8, 'the loader is the limit')],
)
def test_the_summary_says_how_long_training_waited_for_data(share, text):
    """Epochs weigh by their time."""
    rows = [{'seconds': 10.0, 'images_per_second': 100.0}, {'seconds': 30.0, 'images_per_second': 20.0}]
    line = speed_line([{**row, 'data_wait': share, 'mfu': None, 'peak_memory_gib': 1.5} for row in rows])
    assert line.startswith('training 0:00:40, 40 img/s, waiting for data ')
    assert text in line
    assert line.endswith('peak memory 1.50 GiB')

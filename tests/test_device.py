"""Device, autocast type and workers by name."""

import pytest
import torch

from hydra_vision.device import amp_dtype, available_cores, pick_device, worker_count
from hydra_vision.errors import UserError


def test_devices():
    assert pick_device('cpu') == torch.device('cpu')
    assert pick_device().type == ('cuda' if torch.cuda.is_available() else 'cpu')
    for name in ('cuda:99', 'nonsense', 'meta', ''):
        with pytest.raises(UserError, match='allowed: auto, cpu, cuda') as error:
            pick_device(name)
        assert '\n' not in str(error.value)


def test_amp_names():
    cpu = torch.device('cpu')
    assert amp_dtype('auto', cpu) is None
    assert amp_dtype('none', cpu) is None
    assert amp_dtype('bf16', cpu) is amp_dtype('bfloat16', cpu) is torch.bfloat16
    assert amp_dtype('fp16', cpu) is torch.float16
    with pytest.raises(UserError, match='allowed'):
        amp_dtype('fp8', cpu)


def test_workers():
    assert worker_count(3) == 3
    assert worker_count(0) == 0
    assert worker_count() == min(available_cores(), 16)
    assert worker_count(processes=10_000) == 1
    with pytest.raises(UserError):
        worker_count(-1)

import pytest
import torch

from benchmarks.kernels import main
from hydra_vision.errors import UserError


@pytest.mark.gpu
@pytest.mark.parametrize('what', ['inner', 'host'])
def test_times_of_one_call(what, capsys):
    assert main([what, '--batch', '1', '--length', '64', '--heads', '2', '--rounds', '3', '--time-limit', '0']) == 0
    text = capsys.readouterr().out
    assert ('_kernel' if what == 'inner' else 'forward + backward') in text


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_times_of_one_call_need_a_gpu():
    with pytest.raises(UserError, match='CUDA device'):
        main(['host'])

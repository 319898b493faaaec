"""Training on images of mixed sizes by timm's NaFlex transforms and collator."""

import pytest
import torch
from conftest import COLORS
from PIL import Image

from hydra_vision.train.checkpoint import load_checkpoint


@pytest.fixture
def mixed(tmp_path, tiny):
    """A recipe, and a folder of one-coloured images of several sizes."""
    for split, count in (('train', 16), ('val', 6)):
        for label, color in COLORS.items():
            folder = tmp_path / 'mixed' / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                size = ((12, 30), (24, 8), (16, 16))[index % 3]
                Image.new('RGB', size, color).save(folder / f'{index}.png')
    config = ('--config', tiny[1], '--data-dir', str(tmp_path / 'mixed'), '--epochs', '3')
    return (*config, '--set', 'data.naflex_seq_len=12', '--set', 'augment.erase_prob=0.2')


def test_it_learns_and_resumes_in_the_middle_of_an_epoch(mixed, run, tmp_path):
    code, out, err = run(*mixed, '--output', 'whole')
    assert code == 0, err
    whole = load_checkpoint(tmp_path / 'whole' / 'last.pt')
    assert whole['best']['top1'] > 90
    assert whole['best']['images'] == 18
    code, *_ = run(*mixed, '--output', 'cut', '--set', 'checkpoint.every_steps=4', '--set', 'checkpoint.keep_last=9')
    assert code == 0
    middle = next(p for p in sorted((tmp_path / 'cut').rglob('*.pt')) if load_checkpoint(p)['progress']['batches'])
    code, _, err = run('--resume', middle, '--output', 'again')
    assert code == 0, err
    again = load_checkpoint(tmp_path / 'again' / 'last.pt')
    for name, t in whole['state_dict'].items():
        assert torch.equal(t, again['state_dict'][name]), name


def test_measuring_and_what_does_not_fit(mixed, run, fails):
    code, _, err = run(*mixed, '--dry-run')
    assert code == 0, err
    for setting in ('augment.mixup=0.2', 'run.channels_last=true', 'augment.crop_mode=rkrc'):
        assert 'not with data.naflex_seq_len' in fails(*mixed, '--set', setting, code=2)
    assert 'takes no patches' in fails(*mixed, '--model', 'test_vit', code=2)

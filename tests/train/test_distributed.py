"""Several processes: on the CPU through gloo here, on GPUs through NCCL where there are two."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import hydra_vision
from hydra_vision.errors import ConfigError
from hydra_vision.io import read_csv
from hydra_vision.train import build
from hydra_vision.train.checkpoint import BEST, LAST, load_checkpoint
from hydra_vision.train.config import Config
from hydra_vision.train.distributed import World, world_from_environment
from hydra_vision.train.sampling import local_batch

ROOT = Path(hydra_vision.__file__).parents[1]
# Nothing that each process draws by itself: one and two processes do the same sums in another order.
PLAIN = ('--set', 'model.drop_path_rate=0', '--set', 'optim.name=sgd', '--lr', '0.05', '--set', 'log.every=1')

KWARGS = ', kwargs: {patch_size: 4, depth: 1, embed_dim: 64}'


def losses(folder: Path) -> list[float]:
    return [float(row['loss']) for row in read_csv(folder / 'steps.csv')]


def assert_close_runs(first: Path, second: Path, tolerance: float = 1e-4) -> None:
    assert losses(first) == pytest.approx(losses(second), rel=tolerance)
    one, two = (load_checkpoint(folder / LAST) for folder in (first, second))
    assert one['updates'] == two['updates']
    for key in ('state_dict', 'state_dict_ema'):
        for name, value in one[key].items():
            torch.testing.assert_close(value, two[key][name], rtol=tolerance, atol=tolerance, msg=f'{key} {name}')
    for row, other in zip(one['history'], two['history'], strict=True):
        assert row['val_top1'] == other['val_top1']
        assert row['val_loss'] == pytest.approx(other['val_loss'], rel=tolerance)


@pytest.mark.parametrize(
    'options',
    [
        ('--accum-steps', 2, '--set', 'optim.clip_grad=0.1'),
        *(pytest.param(case, marks=pytest.mark.slow) for case in ((), ('--set', 'augment.repeats=3'))),
    ],
)
def test_two_processes_learn_what_one_learns(tiny, run, processes, tmp_path, options):
    """The same batches, learning rate, losses, weights, averages and validation; 18 validation images on 2 x 8."""
    assert run(*tiny, *PLAIN, *options, '--output', 'one')[0] == 0
    two = processes(*tiny, *PLAIN, *options, '--output', 'two', world=2)
    assert two.wait() == [0, 0], two.output()
    assert_close_runs(tmp_path / 'one', tmp_path / 'two')
    assert load_checkpoint(tmp_path / 'two' / BEST)['best']['images'] == 18
    assert (tmp_path / '1.log').read_text() == ''  # only rank 0 tells
    assert '(4 x 2 processes' in (tmp_path / '0.log').read_text()
    for row in load_checkpoint(tmp_path / 'two' / BEST)['history']:
        assert row['images_per_second'] * row['seconds'] == pytest.approx(48, rel=0.05)


@pytest.mark.slow
def test_gradients_in_bfloat16_are_close_to_those_in_float32(tiny, processes, tmp_path):
    for name in ('fp32', 'bf16'):
        started = processes(*tiny, *PLAIN, '--set', f'distributed.gradients={name}', '--output', name, world=2)
        assert started.wait() == [0, 0], started.output()
    assert losses(tmp_path / 'bf16') != losses(tmp_path / 'fp32')
    assert losses(tmp_path / 'bf16') == pytest.approx(losses(tmp_path / 'fp32'), rel=0.02)


@pytest.mark.parametrize('strategy', ['ddp', pytest.param('fsdp', marks=pytest.mark.slow)])
def test_processes_that_are_killed_go_on_bit_by_bit(
    tiny, processes, killed_at_update_8, tmp_path, assert_same_run, strategy
):
    random = ('--set', 'model.drop_path_rate=0.3', '--set', 'augment.mixup=0.2', '--set', 'augment.erase_prob=0.5')
    command = (*tiny, *random, '--set', f'distributed.strategy={strategy}', '--set', 'checkpoint.every_steps=1')
    command = (*command, '--set', 'log.every=1', '--epochs', 2)
    whole = processes(*command, '--output', 'whole', world=2)
    assert whole.wait() == [0, 0], whole.output()
    assert 'from epoch 1 and' in killed_at_update_8(*command)
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')


def test_sharded_training_is_that_of_one_process_and_its_checkpoint_fits_everywhere(tiny, run, processes, tmp_path):
    plain = (*tiny, *PLAIN, '--set', 'optim.clip_grad=0.1')
    assert run(*plain, '--output', 'one')[0] == 0
    two = processes(*plain, '--set', 'distributed.strategy=fsdp', '--output', 'two', world=2)
    assert two.wait() == [0, 0], two.output()
    assert_close_runs(tmp_path / 'one', tmp_path / 'two')
    code, out, error = run('--resume', 'two', '--epochs', 4, '--set', 'distributed.strategy=ddp')
    assert code == 0, error
    assert 'resuming with 1 instead of 2 processes' in out
    assert load_checkpoint(tmp_path / 'two' / LAST)['epoch'] == 4


@pytest.mark.parametrize('asked', [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_process_stops_all_at_the_same_step(tiny, run, processes, tmp_path, asked):
    command = (*tiny, *PLAIN, '--epochs', 200, '--output', 'run')
    started = processes(*command, world=2)
    started.wait_for_update(tmp_path / 'run', 5)
    os.kill(started.ids[1], asked)
    assert started.wait(30) == [128 + asked] * 2, started.output()
    assert started.output().count('stopped by') == 1
    state = load_checkpoint(tmp_path / 'run' / LAST)
    assert state['updates'] >= 5
    assert len(state['random']) == 2


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--batch-size', '7'), 'data.batch_size=7 is for all processes together and cannot be shared by 2'),
        (('--batch-size', '6', '--set', 'augment.mixup=1'), 'mixup and cutmix need an even number: multiples of 4'),
        (('--lr', '-1'), 'optim.lr=-1 is not valid'),
        (('--resume', 'nowhere.pt'), "no checkpoint 'nowhere.pt'"),
        (('--resume', '~no_such_user/run'), "--resume='~no_such_user/run'"),
        (
            ('--set', 'distributed.strategy=fsdp', '--set', 'optim.clip_grad=1', '--set', 'optim.clip_mode=agc'),
            'shards',
        ),
    ],
)
def test_mistakes_are_told_once(tiny, processes, tmp_path, arguments, message):
    started = processes(*tiny, *arguments, '--output', 'run', world=2)
    codes = started.wait()
    assert codes[0] == codes[1] != 0
    assert started.output().count('error: ') == 1
    assert message in started.output()
    assert not (tmp_path / 'run').exists()


def test_a_process_that_cannot_read_its_images_names_itself(image_folder, processes, tmp_path):
    """33 images in 2 processes: the unreadable one is read by one of them."""
    folder = image_folder(train=12, val=2)
    (folder / 'train' / 'red' / '003.png').write_bytes(b'')
    small = ('--model', 'test_vit', '--num-classes', 3, '--img-size', 32, '--batch-size', 36, '--device', 'cpu')
    small = (*small, '--set', 'data.max_unreadable=0', '--workers', 0, '--set', 'run.threads=1')
    started = processes('--data-dir', folder, *small, '--output', 'run', world=2)
    end = time.monotonic() + 60
    while 'error: ' not in started.output() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)
    started.kill(signal.SIGKILL)  # as torchrun does
    started.wait()
    assert 'red/003.png' in started.output()


@pytest.mark.parametrize('size', [1, 3])
def test_validation_of_a_checkpoint_by_several_processes(finished, validated, processes, tmp_path, size):
    alone = validated('run')
    shared = processes('--validate', 'run', '--json', '--set', f'data.val_batch_size={size}', world=2)
    assert shared.wait() == [0, 0], shared.output()
    found = json.loads((tmp_path / '0.log').read_text())['results']
    for name, result in alone.items():
        assert found[name]['images'] == 18
        assert found[name]['top1'] == pytest.approx(result['top1'])
        assert found[name]['loss'] == pytest.approx(result['loss'], rel=1e-5)


@pytest.mark.slow
def test_batch_norms_share_their_statistics(tiny, run, processes, tmp_path):
    """What is saved, and validated on every process, is the mean of what the processes have."""
    recipe = tmp_path / 'resnet.yaml'
    recipe.write_text((Path(tiny[1])).read_text().replace('hydra_vit_nano', 'test_resnet').replace(KWARGS, ''))
    command = ('--config', recipe, *tiny[2:], '--img-size', 32, '--epochs', 2, '--set', 'model.drop_path_rate=0')
    started = processes(*command, '--output', 'run', world=2)
    assert started.wait() == [0, 0], started.output()
    assert run('--resume', 'run', '--output', 'other', '--epochs', 2)[0] == 0
    last = load_checkpoint(tmp_path / 'run' / LAST)
    found = processes('--validate', 'run/last.pt', '--json', world=1)
    assert found.wait() == [0]
    result = json.loads(found.output())['results']['raw']
    assert result['loss'] == pytest.approx(last['history'][-1]['val_loss'], rel=1e-4)


@pytest.mark.slow
def test_torchrun_forwards_a_signal_and_one_process_can_go_on(tiny, run, tmp_path):
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    command = [*torchrun, '-m', 'hydra_vision.train', *tiny, *PLAIN, '--workers', '1']
    command += ['--epochs', '300', '--output', 'run']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    with open(tmp_path / 'log', 'w') as log:
        started = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=environment)
        end = time.monotonic() + 120
        while not (tmp_path / 'run' / 'steps.csv').is_file() and time.monotonic() < end:
            time.sleep(0.1)
        started.terminate()
        asked = time.monotonic()
        started.wait(60)
    assert time.monotonic() - asked < 30
    assert 'stopped by SIGTERM; saved' in (tmp_path / 'log').read_text()
    done = load_checkpoint(tmp_path / 'run' / LAST)['epoch']
    code, out, _ = run('--resume', 'run', '--epochs', str(done + 2))
    assert code == 0
    assert 'resuming with 1 instead of 2 processes' in out


def test_the_learning_rate_follows_the_batch_of_all_processes():
    config = Config.from_dict(
        {'optim': {'lr': 1e-3, 'lr_batch_size': 1024, 'accum_steps': 2}, 'data': {'batch_size': 256}}
    )
    assert config.lr_scale == 0.5  # 512 images per step on any number of processes
    assert local_batch(256, 8, mixes=False) == 32
    with pytest.raises(ConfigError, match='multiples of 3'):
        local_batch(256, 3, mixes=False)


@pytest.mark.parametrize(
    ('variables', 'message'),
    [
        ({'WORLD_SIZE': '2'}, 'start several processes with torchrun'),
        ({'WORLD_SIZE': '2', 'RANK': 'x', 'LOCAL_RANK': '0'}, 'start several processes with torchrun'),
        ({'WORLD_SIZE': '2', 'RANK': '2', 'LOCAL_RANK': '0'}, 'RANK=2 is not valid for WORLD_SIZE=2'),
    ],
)
def test_an_environment_that_does_not_fit(monkeypatch, variables, message):
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    assert world_from_environment() == World()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        world_from_environment()


def test_every_process_needs_a_gpu_of_its_own(monkeypatch):
    with pytest.raises(ConfigError, match="'cuda:0' is one device for 2 processes"):
        build.pick_device(Config.from_dict({'run': {'device': 'cuda:0'}}), World(1, 2, 1))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    with pytest.raises(ConfigError, match='process 1 of this machine has no GPU: it has 1'):
        build.pick_device(Config.from_dict({'run': {'device': 'cuda'}}), World(1, 2, 1))


def test_sharding_needs_several_processes(tiny, fails):
    assert 'needs several processes' in fails(*tiny, '--set', 'distributed.strategy=fsdp', code=2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
@pytest.mark.parametrize('strategy', ['ddp', 'fsdp'])
def test_two_gpus_learn_what_one_learns(tiny, tmp_path, strategy):
    for count in (1, 2):
        torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={count}']
        command = [*torchrun, '-m', 'hydra_vision.train', *tiny, *PLAIN, '--device', 'cuda', '--amp', 'none']
        command += ['--set', 'run.tf32=false', '--output', str(count)]
        command += ['--set', f'distributed.strategy={strategy}'] if count > 1 else []
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, 'PYTHONPATH': str(ROOT)},
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert_close_runs(tmp_path / '1', tmp_path / '2', tolerance=1e-3)

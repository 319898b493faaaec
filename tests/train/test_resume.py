"""Runs that are interrupted and go on: the end is that of a run that never was."""

import multiprocessing
import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest
import torch

from hydra_vision.io import read_csv
from hydra_vision.train import checkpoint, engine
from hydra_vision.train.checkpoint import BEST, KEPT, LAST, CheckpointSchedule, load_checkpoint, save_checkpoint
from hydra_vision.train.main import main

# Everything that is random at once: dropout, stochastic depth, augmentation, erasing, mixing, order.
RANDOM = (
    *('--set', 'model.drop_rate=0.1', '--set', 'model.drop_path_rate=0.2', '--set', 'augment.erase_prob=0.3'),
    *('--set', 'augment.auto_augment=rand-m5-mstd0.5', '--set', 'augment.mixup=0.2', '--set', 'augment.cutmix=1'),
    *('--accum-steps', '2', '--set', 'optim.clip_grad=1'),
)


@pytest.fixture(scope='module')
def random_whole(tiny, tmp_path_factory):
    """Such a run, not interrupted."""
    folder = tmp_path_factory.mktemp('random') / 'run'
    assert main([*tiny, *RANDOM, '--output', str(folder)]) == 0
    return folder


def at_update(monkeypatch, update: int, act) -> None:
    """Calls `act` before the given optimizer step."""
    before = engine.Learner.update

    def step(self, measure=False):
        if self.updates + 1 == update:
            act()
        before(self, measure)

    monkeypatch.setattr(engine.Learner, 'update', step)


def interrupt() -> None:
    raise KeyboardInterrupt


def shake_generators() -> None:
    """What another process would start with."""
    random.seed(5), np.random.seed(5), torch.manual_seed(5)


@pytest.mark.parametrize(
    ('workers', 'every', 'where'), [(0, None, ', from epoch 2 on'), (2, 1, ', from epoch 2 and 2 batches')]
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(
    tiny, random_whole, run, tmp_path, monkeypatch, assert_same_run, workers, every, where
):
    arguments = (*tiny, *RANDOM, '--workers', workers, '--set', f'checkpoint.every_steps={every or "null"}')
    with monkeypatch.context() as patch:
        at_update(patch, 8, interrupt)  # 3 updates an epoch
        code, _, error = run(*arguments, '--output', 'parts')
    assert code == 130
    assert '--resume auto' in error
    shake_generators()
    code, out, _ = run(*arguments, '--output', 'parts', '--resume', 'auto')
    assert code == 0
    assert where in out
    assert_same_run(random_whole, tmp_path / 'parts')
    assert [row['epoch'] for row in read_csv(tmp_path / 'parts' / 'summary.csv')] == ['1', '2', '3']


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_at_random_ends_as_one_that_never_was(
    tiny, run, processes, tmp_path, assert_same_run
):
    """kill -9: in the middle of a step, of validation, of a checkpoint that is being written."""
    arguments = (*tiny, *RANDOM, '--epochs', 20, '--set', 'log.every=1', '--set', 'checkpoint.every_steps=2')
    assert run(*arguments, '--output', 'whole')[0] == 0
    generator = random.Random(0)
    parts, reached = tmp_path / 'parts', 0
    for _ in range(10):
        started = processes(*arguments, '--output', parts, '--resume', 'auto')
        reached = started.wait_for_update(parts, min(reached + generator.randint(1, 4), 50))
        time.sleep(generator.random() * 0.08)
        started.kill(signal.SIGKILL)
        assert started.wait() == [-signal.SIGKILL]
    last = processes(*arguments, '--output', parts, '--resume', 'auto')
    assert last.wait() == [0], last.output()
    assert_same_run(tmp_path / 'whole', parts)
    rows = [
        [(row['updates'], row['loss'], row['grad_norm']) for row in read_csv(folder / 'steps.csv')]
        for folder in (tmp_path / 'whole', parts)
    ]
    assert rows[0] == rows[1]  # the log has neither a gap nor a row twice
    assert not list(parts.rglob('*.tmp'))


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1'])
def test_a_signal_saves_and_ends_the_run_at_once(tiny, random_whole, run, tmp_path, monkeypatch, assert_same_run, name):
    number = getattr(signal, name)
    arguments = (*tiny, *RANDOM)
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_update(patch, 5, lambda: os.kill(os.getpid(), number))
        code, _, error = run(*arguments, '--output', 'parts')
    assert signal.getsignal(number) is handler
    assert code == 128 + number
    assert f'stopped by {name}; saved parts/last.pt (epochs done: 1, step 5)' in error
    state = load_checkpoint(tmp_path / 'parts' / LAST)
    assert (state['updates'], state['progress']['batches']) == (5, 4)
    shake_generators()
    assert run(*arguments, '--output', 'parts', '--resume', 'auto')[0] == 0
    assert_same_run(random_whole, tmp_path / 'parts')


def test_a_signal_to_the_loader_processes_as_well_loses_nothing(
    tiny, whole, run, tmp_path, monkeypatch, assert_same_run
):
    """torchrun and SLURM send it to all of them."""
    arguments = (*tiny, '--workers', 2)

    def stop_all():
        stopped = (*multiprocessing.active_children(), multiprocessing.current_process())
        # By another process: from this one, PyTorch's loader processes take it for an orderly end.
        subprocess.run(['kill', '-TERM', *(str(process.pid) for process in stopped)], check=True)
        time.sleep(0.2)  # PyTorch looks after its processes

    with monkeypatch.context() as patch:
        at_update(patch, 8, stop_all)
        code, _, error = run(*arguments, '--output', 'parts')
    assert code == 143, error
    assert 'step 8' in error
    assert run(*arguments, '--output', 'parts', '--resume', 'auto')[0] == 0
    assert_same_run(whole, tmp_path / 'parts')


def test_a_signal_during_validation_repeats_only_the_validation(
    tiny, whole, run, tmp_path, monkeypatch, assert_same_run
):
    validate = engine.Trainer._validate_epoch

    def signalled(self, meter, row):
        if row['epoch'] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        validate(self, meter, row)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Trainer, '_validate_epoch', signalled)
        code, _, error = run(*tiny, '--output', 'parts')
    assert code == 143
    assert '(epochs done: 1, step 12)' in error
    shake_generators()
    assert run(*tiny, '--output', 'parts', '--resume', 'auto')[0] == 0
    assert_same_run(whole, tmp_path / 'parts')


def test_checkpoints_by_the_clock(tiny, run, tmp_path, monkeypatch):
    at_update(monkeypatch, 4, interrupt)
    assert run(*tiny, '--set', 'checkpoint.every_minutes=1e-9', '--output', 'run')[0] == 130
    assert load_checkpoint(tmp_path / 'run' / LAST)['updates'] == 3


def test_the_clock_asks_once_for_a_checkpoint():
    """Several processes follow a wish one update later: asked again by then, they would write each checkpoint twice."""
    schedule = CheckpointSchedule(every_steps=None, every_minutes=1)
    assert not schedule.due_by_clock()
    schedule.saved -= 61
    assert [schedule.due_by_clock(), schedule.due_by_clock()] == [True, False]


def improving(monkeypatch, scores: list[float]) -> None:
    """Lets the validations of a run end with the given top-1, for raw and averaged weights."""
    given = iter(scores)

    def evaluate(models, loader, *_):
        top1 = next(given)
        return {name: {'top1': top1, 'top5': 100.0, 'loss': 1.0, 'images': 18} for name in models}

    monkeypatch.setattr(engine, 'evaluate', evaluate)


def stopping(function, name: str, folder):
    """`function`, which writes or names a file, interrupted at this name once epoch 2 has its checkpoint."""

    def write(first, second):
        written = 'summary.csv' if first == folder.relative_to(folder.parent) else second.name
        if written == name and (folder / KEPT / 'step-000000012.pt').exists():
            interrupt()
        function(first, second)

    return write


@pytest.mark.parametrize('name', [LAST, BEST, 'summary.csv'])
def test_a_kill_between_the_files_of_a_checkpoint_leaves_none_behind(tiny, run, tmp_path, monkeypatch, name):
    """The checkpoint of epoch 2 is written; what names or tells it is not."""
    improving(monkeypatch, [10.0, 30.0, 20.0])
    with monkeypatch.context() as patch:
        for module, function in ((checkpoint, 'link'), (engine.report, 'write_summary')):
            patch.setattr(module, function, stopping(getattr(module, function), name, tmp_path / 'run'))
        assert run(*tiny, '--output', 'run')[0] == 130
    (tmp_path / 'run' / KEPT / '.step-000000015.pt.tmp').write_bytes(b'half')  # killed while it was written
    assert run(*tiny, '--output', 'run', '--resume', 'auto', '--epochs', 2)[0] == 0
    assert [row['val_top1'] for row in read_csv(tmp_path / 'run' / 'summary.csv')] == ['10', '30']
    assert run('--resume', 'run', '--epochs', 3)[0] == 0
    assert load_checkpoint(tmp_path / 'run' / BEST)['epoch'] == 2
    assert load_checkpoint(tmp_path / 'run' / LAST)['epoch'] == 3
    assert not list((tmp_path / 'run').rglob('*.tmp'))


def test_resuming_before_later_checkpoints_and_the_best_one_renames_them(tiny, run, tmp_path, monkeypatch):
    improving(monkeypatch, [20.0, 10.0, 30.0, 15.0])
    assert run(*tiny, '--output', 'run')[0] == 0
    code, out, _ = run('--resume', 'run/checkpoints/step-000000012.pt', '--set', 'optim.lr=1e-3')
    assert code == 0
    assert 'renamed: run/best.pt.old' in out
    assert load_checkpoint(tmp_path / 'run' / 'best.pt.old')['best']['top1'] == 30
    assert load_checkpoint(tmp_path / 'run' / KEPT / 'step-000000018.pt.old')['config']['optim']['lr'] == 2e-3
    state = load_checkpoint(tmp_path / 'run' / LAST)
    assert (state['best']['top1'], state['best']['epoch'], state['updates']) == (20, 1, 18)
    assert not (tmp_path / 'run' / BEST).exists()  # of epoch 1 nothing is left: keep_best was 1, and epoch 3 better


def test_a_damaged_newest_checkpoint_is_named_and_the_run_goes_on_before_it(tiny, finished, run, fails, tmp_path):
    newest = finished / KEPT / 'step-000000018.pt'
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 255
    newest.write_bytes(content)
    code, out, _ = run(*tiny, '--output', 'run', '--resume', 'auto')
    assert code == 0
    for text in ('warning: ', 'step-000000018.pt', 'continuing from', 'step-000000012.pt'):
        assert text in out
    assert newest.with_name('step-000000018.pt.old').is_file()
    assert load_checkpoint(finished / LAST)['epoch'] == 3
    for path in finished.rglob('*.pt'):
        path.write_bytes(b'')
    assert 'no checkpoint of run is intact' in fails(*tiny, '--output', 'run', '--resume', 'auto', code=1)


def test_a_run_that_goes_on_with_nothing_but_the_validation_of_an_epoch_left(tiny, run, monkeypatch):
    """No pace is known then, of which the remaining time would follow."""
    validate = engine.Trainer._validate_epoch
    with monkeypatch.context() as patch:
        patch.setattr(engine.Trainer, '_validate_epoch', lambda *_: interrupt())
        assert run(*tiny, '--set', 'checkpoint.every_steps=6', '--output', 'run')[0] == 130
    assert engine.Trainer._validate_epoch is validate
    code, out, _ = run('--resume', 'run', '--epochs', '2')
    assert code == 0
    assert 'from epoch 0' not in out
    assert 'epoch   1/2' in out


def test_the_newest_and_the_best_checkpoints_are_kept(tiny, run, tmp_path):
    keep = ('--set', 'checkpoint.keep_last=1', '--set', 'checkpoint.keep_best=2')
    assert run(*tiny, *keep, '--epochs', '5', '--output', 'run')[0] == 0
    history = load_checkpoint(tmp_path / 'run' / LAST)['history']
    ranked = sorted(((max(row['val_top1'], row['ema_top1']), row['updates']) for row in history), reverse=True)
    expected = {history[-1]['updates'], *(updates for _, updates in ranked[:2])}
    assert {int(path.stem[5:]) for path in (tmp_path / 'run' / KEPT).iterdir()} == expected


def test_another_batch_size_needs_the_end_of_an_epoch(tiny, run, fails, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_update(patch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(*tiny, '--output', 'run')[0] == 143
    error = fails('--resume', 'run', '--batch-size', '4', code=2)
    assert 'data.batch_size: 8 -> 4 is not possible in the middle of epoch 2' in error
    first = 'run/checkpoints/step-000000006.pt'
    assert run('--resume', first, '--batch-size', '4', '--output', 'other')[0] == 0


def test_what_is_left_of_a_run_without_a_checkpoint_is_used_again(tiny, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_update(patch, 2, interrupt)
        assert run(*tiny)[0] == 130
    assert [path.name for path in (tmp_path / 'output').iterdir()] == ['tiny']
    code, out, _ = run(*tiny, '--resume', 'auto')
    assert code == 0
    assert 'from epoch' not in out
    assert [path.name for path in (tmp_path / 'output').iterdir()] == ['tiny']


@pytest.mark.parametrize('epochs', [2, 3])
def test_a_run_with_all_its_epochs_done_says_so(finished, run, tmp_path, epochs):
    before = (tmp_path / 'run' / LAST).read_bytes()
    code, out, _ = run('--resume', 'run', '--epochs', epochs)
    assert code == 0
    assert (tmp_path / 'run' / LAST).read_bytes() == before
    assert 'best: ' in out
    assert f'run     {epochs} epochs: nothing to train, the checkpoint has 3 epochs already' in out


def test_a_checkpoint_of_another_world_draws_new_numbers_for_new_processes(finished, run, tmp_path):
    state = load_checkpoint(tmp_path / 'run' / LAST)
    save_checkpoint(tmp_path / 'run', {**state, 'random': state['random'] * 4}, is_best=False)
    code, out, _ = run('--resume', 'run', '--epochs', '4')
    assert code == 0
    assert 'resuming with 1 instead of 4 processes' in out

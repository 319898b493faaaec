import gc
import math
import multiprocessing
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hydra_vision.io import read_csv
from hydra_vision.train import engine, tasks
from hydra_vision.train.checkpoint import LAST, load_checkpoint


def summary(folder: Path) -> list[dict[str, str]]:
    return read_csv(folder / 'summary.csv')


def test_a_resume_takes_changed_settings_and_says_so(finished, run, tmp_path):
    code, out, _ = run('--resume', 'run', '--epochs', '4', '--set', 'optim.weight_decay=0.3')
    assert code == 0
    assert 'resuming with schedule.epochs: 3 -> 4' in out
    assert 'resuming with optim.weight_decay: 0.05 -> 0.3' in out
    state = load_checkpoint(tmp_path / 'run' / LAST)
    assert state['epoch'] == 4
    assert {group['weight_decay'] for group in state['optimizer']['param_groups']} == {0.0, 0.3}


def break_losses(monkeypatch, batch: int) -> None:
    """Makes the loss of one batch NaN, counted from 0 over the run."""
    create = tasks.create_loss

    def create_loss(config):
        loss, calls = create(config), iter(range(10**6))

        class Breaking(torch.nn.Module):
            def forward(self, logits, targets):
                return loss(logits, targets) * (math.nan if next(calls) == batch else 1)

        return Breaking()

    monkeypatch.setattr(tasks, 'create_loss', create_loss)


def spoil_gradients(monkeypatch, updates: dict[int, float]) -> None:
    """Puts a value into one gradient before the given optimizer steps."""
    before = engine.Learner.update

    def step(self, measure=False):
        if self.updates + 1 in updates:
            next(self.model.parameters()).grad.view(-1)[0] = updates[self.updates + 1]
        before(self, measure)

    monkeypatch.setattr(engine.Learner, 'update', step)


@pytest.mark.parametrize('check_every', [1, 4])
def test_a_loss_that_is_nan_stops_the_run_with_the_last_good_checkpoint(
    tiny, fails, tmp_path, monkeypatch, check_every
):
    monkeypatch.setitem(engine._CHECK_EVERY, 'cpu', check_every)
    break_losses(monkeypatch, 8)  # 6 batches per epoch
    error = fails(*tiny, '--output', 'run', code=1)
    assert 'the loss became nan at step 9 (epoch 2, batch 3)' in error
    assert f'the last good checkpoint is {Path("run") / LAST} (epoch 1)' in error
    state = load_checkpoint(tmp_path / 'run' / LAST)
    assert state['epoch'] == 1
    assert all(value.isfinite().all() for value in state['state_dict'].values())
    assert (tmp_path / 'run' / 'curve.png').is_file()


def test_a_loss_that_is_nan_is_left_out_of_the_mean_where_steps_may_be_skipped(tiny, run, tmp_path, monkeypatch):
    break_losses(monkeypatch, 8)
    assert run(*tiny, '--set', 'optim.skip_nonfinite=1', '--output', 'run')[0] == 0
    state = load_checkpoint(tmp_path / 'run' / LAST)
    assert state['skipped'] == 1
    assert all(math.isfinite(row['train_loss']) for row in state['history'])


def test_bad_steps_are_skipped_up_to_a_limit(tiny, run, fails, tmp_path, monkeypatch):
    spoil_gradients(monkeypatch, {3: math.nan, 9: math.inf})
    assert run(*tiny, '--set', 'optim.skip_nonfinite=2', '--set', 'log.every=6', '--output', 'run')[0] == 0
    state = load_checkpoint(tmp_path / 'run' / LAST)
    assert (state['updates'], state['skipped']) == (18, 2)
    assert all(value.isfinite().all() for value in state['state_dict'].values())
    assert [row['skipped'] for row in read_csv(tmp_path / 'run' / 'steps.csv')] == ['1', '2', '2']
    error = fails(*tiny, '--set', 'optim.skip_nonfinite=1', '--output', 'other', code=1)
    assert '2 steps had a loss or a gradient that is NaN or infinite, the latest at step 9' in error
    assert 'optim.skip_nonfinite=1' in error
    assert 'the last good checkpoint is other/last.pt (epoch 1)' in error


def test_a_skipped_step_changes_neither_weights_nor_averages(tiny, run, tmp_path, monkeypatch):
    seen = []
    update = engine.Learner.update

    def spy(self, measure=False):
        before = [tensor.clone() for tensor in (*self.model.parameters(), *self.ema.parameters())]
        update(self, measure)
        after = (*self.model.parameters(), *self.ema.parameters())
        seen.append(all(torch.equal(first, second) for first, second in zip(before, after, strict=True)))

    monkeypatch.setattr(engine.Learner, 'update', spy)
    spoil_gradients(monkeypatch, {4: math.nan})
    assert run(*tiny, '--epochs', '2', '--set', 'optim.skip_nonfinite=1', '--output', 'run')[0] == 0
    assert [number for number, unchanged in enumerate(seen, start=1) if unchanged] == [4]


def test_too_little_memory_says_what_would_need_less(tiny, fails, monkeypatch):
    def backward(*_, **__):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 1 GiB.')

    monkeypatch.setattr(engine.Trainer, 'forward_backward', backward)
    assert 'a smaller --batch-size with a larger --accum-steps' in fails(*tiny, code=1)


def test_weights_that_broke_in_the_last_step_are_not_saved(tiny, fails, tmp_path, monkeypatch):
    update = engine.Learner.update

    def breaking(self, measure=False):
        update(self, measure)
        if self.updates == 12:
            with torch.no_grad():
                self.model.head.bias[0] = math.inf

    monkeypatch.setattr(engine.Learner, 'update', breaking)
    error = fails(*tiny, '--output', 'run', code=1)
    assert 'a weight or a running statistic is no longer finite after step 12 (epoch 2)' in error
    assert load_checkpoint(tmp_path / 'run' / LAST)['epoch'] == 1


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_keeps_the_previous_one(
    tiny, fails, tmp_path, monkeypatch
):
    save, calls = torch.save, iter(range(100))

    def full(state, file):
        if next(calls) == 1:
            file.write(b'some bytes')
            raise OSError(28, 'No space left on device')
        save(state, file)

    monkeypatch.setattr(torch, 'save', full)
    error = fails(*tiny, '--output', 'run', code=1)
    assert 'No space left on device' in error
    assert 'the previous last.pt is intact' in error
    assert load_checkpoint(tmp_path / 'run' / LAST)['epoch'] == 1


def test_validation_of_a_checkpoint_gives_the_results_of_the_run(finished, run, validated, tmp_path):
    last = summary(tmp_path / 'run')[-1]
    results = validated('run/last.pt')
    for name, column in (('raw', 'val'), ('EMA', 'ema')):
        assert results[name]['top1'] == pytest.approx(float(last[f'{column}_top1']), abs=1e-3)
        assert results[name]['loss'] == pytest.approx(float(last[f'{column}_loss']), rel=1e-4)
        assert results[name]['images'] == 18
    best = max(float(row[column]) for row in summary(tmp_path / 'run') for column in ('val_top1', 'ema_top1'))
    assert max(result['top1'] for result in validated('run').values()) == pytest.approx(best, abs=1e-3)
    code, out, _ = run('--validate', 'run', '--set', 'data.val_batch_size=7')
    assert code == 0
    assert 'EMA' in out


def test_accumulated_batches_give_the_update_of_one_large_batch(tiny, run, tmp_path):
    plain = (*tiny, '--set', 'model.drop_path_rate=0', '--set', 'augment.hflip=0', '--set', 'optim.name=sgd')
    plain = (*plain, '--set', 'augment.scale=[1, 1]', '--set', 'augment.ratio=[1, 1]')
    plain = (*plain, '--set', 'augment.interpolation=bicubic', '--lr', '0.1')
    assert run(*plain, '--output', 'large', '--batch-size', 16)[0] == 0
    assert run(*plain, '--output', 'small', '--batch-size', 8, '--accum-steps', 2)[0] == 0
    large, small = (load_checkpoint(tmp_path / name / LAST) for name in ('large', 'small'))
    assert large['updates'] == small['updates'] == 9
    for name, value in large['state_dict'].items():
        torch.testing.assert_close(value, small['state_dict'][name], rtol=1e-4, atol=1e-6)


def test_an_update_with_fewer_batches_weighs_them_fully(tiny, run, tmp_path, monkeypatch):
    """6 batches in groups of 4: the last group holds 2, and its gradient is their mean, not half of it."""
    seen = []
    backward = engine.Trainer.forward_backward

    def spy(self, images, targets, group, last):
        seen.append((group, last))
        return backward(self, images, targets, group, last)

    monkeypatch.setattr(engine.Trainer, 'forward_backward', spy)
    assert run(*tiny, '--accum-steps', 4, '--output', 'run')[0] == 0
    assert seen == [(4, False), (4, False), (4, False), (4, True), (2, False), (2, True)] * 3
    assert load_checkpoint(tmp_path / 'run' / LAST)['updates'] == 6


@pytest.mark.parametrize('told', [4, 8])
def test_a_stream_that_told_a_wrong_length_is_trained_on_to_its_end(tiny, run, tmp_path, monkeypatch, told):
    """6 batches in groups of 4 where the loader says 4 or 8: two updates, every loss counted."""
    create = engine.data.train_loader

    class Stream:
        def __init__(self, loader):
            self.loader = loader

        def __getattr__(self, name):
            return getattr(self.loader, name)

        def __iter__(self):
            return iter(self.loader)

        def __len__(self):
            return told

    monkeypatch.setattr(engine.data, 'train_loader', lambda *arguments: Stream(create(*arguments)))
    assert run(*tiny, '--accum-steps', 4, '--epochs', 2, '--output', 'run')[0] == 0
    state = load_checkpoint(tmp_path / 'run' / LAST)
    assert state['updates'] == 4
    assert all(math.isfinite(row['train_loss']) for row in state['history'])


def test_checkpointed_activations_and_channels_last_change_nothing(tiny, whole, run, tmp_path):
    options = ('--set', 'run.grad_checkpointing=true', '--set', 'run.channels_last=true')
    assert run(*tiny, *options, '--output', 'other')[0] == 0
    plain, other = (load_checkpoint(folder / LAST)['state_dict'] for folder in (whole, tmp_path / 'other'))
    for name, value in plain.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4)


def test_bfloat16_and_mixing_that_is_switched_off(tiny, run, tmp_path, monkeypatch):
    mixed = []
    backward = engine.Learner.backward

    def spy(self, images, targets, *arguments):
        mixed.append(bool((targets.max(dim=1).values < 0.85).any()))  # smoothed by 0.1, mixed by about a half
        return backward(self, images, targets, *arguments)

    types, evaluate = [], engine.evaluate
    monkeypatch.setattr(engine, 'evaluate', lambda *arguments: types.append(arguments[3]) or evaluate(*arguments))
    monkeypatch.setattr(engine.Learner, 'backward', spy)
    mix = ('--set', 'augment.mixup=8', '--set', 'augment.smoothing=0.1', '--set', 'augment.mix_off_epoch=1')
    options = ('--amp', 'bf16', *mix)
    assert run(*tiny, *options, '--output', 'run')[0] == 0
    assert types == [torch.bfloat16] * 3
    assert [any(mixed[start : start + 6]) for start in (0, 6, 12)] == [True, False, False]
    rows = summary(tmp_path / 'run')
    assert float(rows[-1]['val_top1']) > 30
    assert all(
        value.dtype == torch.float32 for value in load_checkpoint(tmp_path / 'run' / LAST)['state_dict'].values()
    )


def test_the_best_weights_may_be_the_average(tiny, run, tmp_path, monkeypatch):
    """The first of equals stays the best."""
    scores = iter([(10.0, 20.0), (20.0, 15.0), (30.0, 30.0)])

    def evaluate(models, *_):
        pair = zip(models, next(scores), strict=True)
        return {name: {'top1': top1, 'top5': 100.0, 'loss': 1.0, 'images': 18} for name, top1 in pair}

    monkeypatch.setattr(engine, 'evaluate', evaluate)
    for epochs, best in ((1, (20.0, 'EMA', 1)), (2, (20.0, 'EMA', 1)), (3, (30.0, 'raw', 3))):
        resume = ('--resume', 'auto') if epochs > 1 else ('--set', 'schedule.warmup_epochs=0')
        assert run(*tiny, '--epochs', epochs, '--output', 'run', *resume)[0] == 0
        found = load_checkpoint(tmp_path / 'run' / LAST)['best']
        assert (found['top1'], found['weights'], found['epoch']) == best


def test_validation_may_be_rarer_than_epochs(tiny, run, tmp_path):
    assert run(*tiny, '--set', 'run.validate_every=2', '--output', 'run')[0] == 0
    assert [row['val_top1'] != '' for row in summary(tmp_path / 'run')] == [False, True, True]


@pytest.mark.parametrize('stopped', [False, True])
def test_a_run_that_ended_leaves_no_loader_process_behind(tiny, run, monkeypatch, stopped):
    """Without waiting for Python to look for cycles: others may train next in this process."""
    update = engine.Trainer._optimizer_step

    def note(self, *arguments):
        self.signals.received = signal.SIGTERM if stopped else 0
        update(self, *arguments)

    monkeypatch.setattr(engine.Trainer, '_optimizer_step', note)
    gc.collect()
    gc.disable()
    try:
        assert run(*tiny, '--epochs', 2, '--workers', 1, '--output', 'run')[0] == (143 if stopped else 0)
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


def test_the_curve_is_a_picture(tiny, run, tmp_path):
    assert run(*tiny, '--output', 'run')[0] == 0
    with Image.open(tmp_path / 'run' / 'curve.png') as image:
        assert image.width >= 1000
        assert len(np.unique(np.asarray(image.convert('RGB')).reshape(-1, 3), axis=0)) > 20


@pytest.mark.gpu
@pytest.mark.parametrize('amp', ['bf16', 'fp16'])
def test_half_precision_learns_and_resumes(tiny, run, tmp_path, amp):
    arguments = [word for word in tiny if word != 'cpu']
    command = (*arguments, '--device', 'cuda', '--amp', amp, '--epochs', '3')
    assert run(*command, '--output', 'run')[0] == 0
    state = load_checkpoint(tmp_path / 'run' / LAST)
    assert state['history'][-1]['train_loss'] < state['history'][0]['train_loss']
    assert bool(state['scaler']) == (amp == 'fp16')
    assert run('--resume', 'run', '--epochs', '4')[0] == 0
    if amp == 'fp16':
        assert load_checkpoint(tmp_path / 'run' / LAST)['scaler']['scale'] == state['scaler']['scale']

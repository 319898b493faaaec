import csv
import math

import pytest
import torch

from hydra_vision.errors import NonFiniteError
from hydra_vision.train import engine, tasks
from hydra_vision.train.checkpoint import LAST, load_checkpoint
from hydra_vision.train.config import Config
from hydra_vision.train.distributed import World
from hydra_vision.train.guard import NonFiniteGuard


def spoil_gradients(monkeypatch, updates: set[int], value: float = math.nan) -> None:
    """Makes one gradient bad before the given optimizer steps."""
    before = engine.Learner.update

    def step(self, measure=False):
        if self.updates + 1 in updates:
            next(self.model.parameters()).grad.view(-1)[0] = value
        before(self, measure)

    monkeypatch.setattr(engine.Learner, 'update', step)


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_bad_steps_are_skipped_up_to_a_limit(tiny, run, fails, tmp_path, monkeypatch, value):
    spoil_gradients(monkeypatch, {3, 9}, value)
    assert run(*tiny, '--set', 'optim.skip_nonfinite=2', '--set', 'log.every=6', '--output', 'run')[0] == 0
    state = load_checkpoint(tmp_path / 'run' / LAST)
    assert (state['updates'], state['skipped']) == (18, 2)
    assert all(value.isfinite().all() for value in state['state_dict'].values())
    with open(tmp_path / 'run' / 'steps.csv', newline='') as file:
        assert [row['skipped'] for row in csv.DictReader(file)] == ['1', '2', '2']
    error = fails(*tiny, '--set', 'optim.skip_nonfinite=1', '--output', 'other', code=1)
    assert '2 steps had a loss or a gradient that is NaN or infinite, the latest at step 9' in error
    assert 'optim.skip_nonfinite=1' in error
    assert 'the last good checkpoint is other/last.pt (epoch 1)' in error


def test_without_a_limit_a_bad_step_stops_the_run(tiny, fails, monkeypatch):
    spoil_gradients(monkeypatch, {9})
    assert 'became nan at step 10 (epoch 2, batch 4)' in fails(*tiny, '--output', 'run', code=1)


def test_a_skipped_step_changes_neither_weights_nor_averages(tiny, run, tmp_path, monkeypatch):
    seen = []
    update = engine.Learner.update

    def spy(self, measure=False):
        before = [tensor.clone() for tensor in (*self.model.parameters(), *self.ema.parameters())]
        update(self, measure)
        after = (*self.model.parameters(), *self.ema.parameters())
        seen.append(all(torch.equal(first, second) for first, second in zip(before, after, strict=True)))

    monkeypatch.setattr(engine.Learner, 'update', spy)
    spoil_gradients(monkeypatch, {4})
    assert run(*tiny, '--epochs', '2', '--set', 'optim.skip_nonfinite=1', '--output', 'run')[0] == 0
    assert [number for number, unchanged in enumerate(seen, start=1) if unchanged] == [4]


def test_a_loss_that_is_nan_is_left_out_of_the_mean_where_steps_may_be_skipped(tiny, run, tmp_path, monkeypatch):
    create = tasks.create_loss

    def create_loss(config):
        loss, calls = create(config), iter(range(10**6))

        class Breaking(torch.nn.Module):
            def forward(self, logits, targets):
                return loss(logits, targets) * (math.nan if next(calls) == 8 else 1)

        return Breaking()

    monkeypatch.setattr(tasks, 'create_loss', create_loss)
    assert run(*tiny, '--set', 'optim.skip_nonfinite=1', '--output', 'run')[0] == 0
    state = load_checkpoint(tmp_path / 'run' / LAST)
    assert state['skipped'] == 1
    assert all(math.isfinite(row['train_loss']) for row in state['history'])


@pytest.mark.parametrize('mode', ['norm', 'value', 'agc'])
def test_gradients_are_clipped_as_timm_does(tiny, run, tmp_path, monkeypatch, mode):
    largest = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group['params']]
        largest.append(
            (max(float(g.abs().max()) for g in grads), math.sqrt(sum(float(g.square().sum()) for g in grads)))
        )
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, 'step', spy)
    clip = ('--set', 'optim.clip_grad=0.001', '--set', f'optim.clip_mode={mode}')
    assert run(*tiny, *clip, '--epochs', '2', '--output', 'run')[0] == 0
    if mode == 'norm':
        assert max(norm for _, norm in largest) <= 0.001 * 1.001
    elif mode == 'value':
        assert max(value for value, _ in largest) <= 0.001 * 1.001
    assert len(largest) == 12


def test_z_loss_adds_the_mean_squared_logsumexp():
    config = Config.from_dict({'optim': {'z_loss': 0.5}})
    logits, targets = torch.randn(4, 7), torch.tensor([0, 6, 2, 2])
    plain = tasks.create_loss(Config.from_dict({}))(logits, targets)
    expected = plain + 0.5 * logits.exp().sum(dim=1).log().square().mean()
    torch.testing.assert_close(tasks.create_loss(config)(logits, targets), expected)


def test_a_vanishing_scale_of_fp16_stops_the_run():
    """What the guard looks at: the scale, when it has been halved again and again."""
    config = Config.from_dict({'run': {'device': 'cpu'}})
    model = torch.nn.Linear(2, 2)
    learner = engine.Learner(config, model, torch.device('cpu'), None, 1)
    learner.scaler = torch.amp.GradScaler('cpu', init_scale=0.5)
    learner.updates = 50
    with pytest.raises(NonFiniteError, match='the loss scale of fp16 fell below 1 at step 50'):
        NonFiniteGuard(config.optim, learner, World()).check_steps()


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

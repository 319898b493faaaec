"""One update after another, without a loader: precision, clipping, averages, schedules, and going on."""

import copy
import math

import pytest
import torch
from torch import nn

from hydra_vision.errors import ConfigError, NonFiniteError
from hydra_vision.train import build, tasks
from hydra_vision.train.config import Config
from hydra_vision.train.distributed import World
from hydra_vision.train.guard import EpochProgress, NonFiniteGuard
from hydra_vision.train.learner import Learner

CPU = torch.device('cpu')
IMAGES, TARGETS = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 4))


def learner(*, amp: torch.dtype | None = None, state: dict | None = None, epochs_done: int = 0, **sections) -> Learner:
    config = Config.from_dict({'run': {'device': 'cpu'}, **sections})
    one = Learner(config, network(), CPU, amp, 5)
    if state is not None:
        one.load_state_dict(state, epochs_done)
    return one


def train(learner: Learner, updates: int, factor: float = 1.0, group: int = 1) -> None:
    learner.train()
    for _ in range(updates):
        for batch in range(group):
            learner.backward(IMAGES * factor, TARGETS, group, batch + 1 == group)
        learner.update()


def weights(learner: Learner) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in learner.model.parameters()])


def spy_on_gradients(learner: Learner) -> list[float]:
    """Norms of the gradients that the optimizer gets."""
    norms: list[float] = []

    def note(optimizer, *_):
        grads = [p.grad for group in optimizer.param_groups for p in group['params']]
        norms.append(math.sqrt(sum(float(grad.square().sum()) for grad in grads)))

    learner.optimizer.register_step_pre_hook(note)
    return norms


@pytest.mark.parametrize('clip', [None, 0.01])
def test_fp16_gives_the_optimizer_gradients_without_the_scale(clip):
    """Clipped after the scale is taken away, over all accumulated batches."""
    norms = {}
    for amp in (None, torch.float16):
        one = learner(amp=amp, optim={'name': 'sgd', 'lr': 0.1, 'clip_grad': clip})
        norms[amp] = spy_on_gradients(one)
        train(one, 2, group=2)
        assert one.scaler.is_enabled() == (amp is not None)
    assert norms[torch.float16] == pytest.approx(norms[None], rel=2e-2)
    if clip is not None:
        assert norms[None] == pytest.approx([clip] * 2, rel=1e-3)


def test_fp16_leaves_out_steps_that_overflow_and_goes_on_with_its_scale():
    one = learner(amp=torch.float16)
    train(one, 1, factor=1e30)
    before = weights(learner())
    assert torch.equal(weights(one), before)
    assert one.scaler.get_scale() == 2.0**15  # halved
    train(one, 1)
    assert not torch.equal(weights(one), before)
    again = learner(amp=torch.float16, state=copy.deepcopy(one.state_dict()))
    assert again.scaler.get_scale() == 2.0**15


def test_bad_batches_of_one_update_count_as_one_skipped_step():
    one = learner(amp=torch.float16, optim={'accum_steps': 2, 'skip_nonfinite': 2})
    guard = NonFiniteGuard(one.config.optim, one, World())
    progress = EpochProgress(batches=4, losses=[torch.tensor(value) for value in (math.nan, math.nan, 1.0, math.inf)])
    guard.check_losses(progress, epoch=0, batches=4)
    assert one.skipped == 2
    assert (progress.checked, progress.last_loss) == (1, 1.0)


def test_the_step_of_a_bad_loss_is_named():
    """6 batches an epoch in groups of 4: the fifth batch of the second epoch belongs to update 2 + 2."""
    one = learner(optim={'accum_steps': 4})
    progress = EpochProgress(batches=5, losses=[torch.tensor(1.0), torch.tensor(math.nan)])
    with pytest.raises(NonFiniteError, match=r'became nan at step 4 \(epoch 2, batch 5\)'):
        NonFiniteGuard(one.config.optim, one, World()).check_losses(progress, epoch=1, batches=6)


def test_statistics_of_a_norm_that_broke_are_noticed():
    """A batch with a NaN whose update is left out has passed through the norms all the same."""
    one = learner(optim={'skip_nonfinite': 1})
    train(one, 1, factor=math.nan)
    assert one.skipped == 1
    assert all(parameter.isfinite().all() for parameter in one.model.parameters())
    with pytest.raises(NonFiniteError, match='a weight or a running statistic is no longer finite after step 1'):
        NonFiniteGuard(one.config.optim, one, World()).check_weights(epoch=0)


def test_a_probe_trains_in_evaluation_mode():
    one = learner(model={'freeze_backbone': True})
    one.model[:3].requires_grad_(False)
    before = copy.deepcopy(one.model[:3].state_dict())
    train(one, 2)
    assert [module.training for module in one.model] == [False, False, False, True]
    assert all(torch.equal(value, before[key]) for key, value in one.model[:3].state_dict().items())


def test_adaptive_clipping_leaves_the_head_alone():
    """As timm's training script and the paper (Brock et al., arXiv 2102.06171) do."""
    one = learner(optim={'name': 'sgd', 'clip_grad': 1e-6, 'clip_mode': 'agc'})
    one.train()
    one.backward(IMAGES, TARGETS, 1)
    before = [parameter.grad.clone() for parameter in one.model.parameters()]
    after = []
    one.optimizer.register_step_pre_hook(lambda *_: after.extend(p.grad.clone() for p in one.model.parameters()))
    one.update()
    assert [bool(torch.equal(*pair)) for pair in zip(before[-2:], after[-2:], strict=True)] == [True, True]
    assert float(after[0].norm()) < 1e-2 * float(before[0].norm())


@pytest.mark.parametrize('name', ['adamw', 'lamb', 'lookahead_adamw', 'nadamw', 'lion', 'adafactor', 'muon'])
def test_every_kind_of_optimizer_goes_on_where_it_was(name):
    """Also those that keep counters in other places than PyTorch's own."""
    sections = {'optim': {'name': name, 'lr': 1e-2}, 'ema': {'decay': 0.9, 'warmup': True}}
    whole = learner(**sections)
    train(whole, 7)
    parts = learner(**sections, state=copy.deepcopy(whole.state_dict()))
    assert (parts.lr, parts.updates) == (whole.lr, 7)
    for one in (whole, parts):
        train(one, 6)  # Lookahead looks back at its 6th and 12th step
    assert torch.equal(weights(whole), weights(parts))
    for first, second in zip(whole.ema.state_dict().values(), parts.ema.state_dict().values()):
        assert torch.equal(first, second)


@pytest.mark.parametrize('per_update', [True, False])
def test_the_learning_rate_of_every_update(per_update):
    """5 updates an epoch, 2 epochs of warm-up, then a cosine, by the update or the epoch; a resume changes nothing."""
    schedule = {'epochs': 4, 'warmup_epochs': 2, 'warmup_lr': 0.1, 'min_lr': 0.2, 'per_update': per_update}
    sections = {'optim': {'name': 'sgd', 'lr': 1.0, 'lr_batch_size': 64}, 'schedule': schedule}
    one, rates = learner(**sections), []  # 128 images an update: everything twice
    for epoch in range(4):
        for step in range(5):
            train(one, 1)
            rates.append(one.lr)
            if (epoch, step) == (1, 2):
                one = learner(**sections, state=copy.deepcopy(one.state_dict()), epochs_done=1)
                assert one.lr == rates[-1]
        one.end_epoch(epoch + 1)

    def expected(update: int) -> float:
        at, warm, end = (update, 10, 20) if per_update else (update // 5, 2, 4)
        if at < warm:
            return 0.2 + (2.0 - 0.2) * at / warm
        return 0.4 + (2.0 - 0.4) * (1 + math.cos(math.pi * at / end)) / 2

    assert rates == pytest.approx([expected(update) for update in range(20)])


def test_the_average_warms_up_only_where_it_is_asked_to():
    for warmup, decay in ((True, 1 - 3 ** -(2 / 3)), (False, 0.99)):
        one = learner(ema={'decay': 0.99, 'warmup': warmup})
        train(one, 2)
        before = one.ema[3].weight.clone()
        train(one, 1)
        expected = decay * before + (1 - decay) * one.model[3].weight
        torch.testing.assert_close(one.ema[3].weight, expected)


def test_optimizers_get_their_settings_or_are_refused():
    config = Config.from_dict({'optim': {'betas': [0.5, 0.6], 'eps': 1e-3, 'kwargs': {'amsgrad': True}}})
    group = build.create_optimizer(config, network()).param_groups[0]
    assert (tuple(group['betas']), group['eps'], group['amsgrad']) == ((0.5, 0.6), 1e-3, True)
    with pytest.raises(ConfigError, match=r"optim.name='adahessian' needs gradients of gradients"):
        build.create_optimizer(Config.from_dict({'optim': {'name': 'adahessian'}}), network())


def test_gradients_travel_once_an_update(monkeypatch):
    one = learner(optim={'accum_steps': 3})
    quiet = []

    class NoSync:
        def __enter__(self):
            quiet.append(True)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(type(one.task), 'no_sync', lambda self: NoSync())
    train(one, 2, group=3)
    assert len(quiet) == 4  # of 6 batches, all but the last of each update


def test_z_loss_adds_the_mean_squared_logsumexp():
    config = Config.from_dict({'optim': {'z_loss': 0.5}})
    logits, targets = torch.randn(4, 7), torch.tensor([0, 6, 2, 2])
    plain = tasks.create_loss(Config.from_dict({}))(logits, targets)
    expected = plain + 0.5 * logits.exp().sum(dim=1).log().square().mean()
    torch.testing.assert_close(tasks.create_loss(config)(logits, targets), expected)


def test_a_vanishing_scale_of_fp16_stops_the_run():
    """What the guard looks at: the scale, when it has been halved again and again."""
    one = learner()
    one.scaler, one.updates = torch.amp.GradScaler('cpu', init_scale=0.5), 50
    with pytest.raises(NonFiniteError, match='the loss scale of fp16 fell below 1 at step 50'):
        NonFiniteGuard(one.config.optim, one, World()).check_steps()

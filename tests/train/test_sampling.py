import itertools

import pytest

from hydra_vision.train.sampling import EvalSampler, TrainSampler


def steps(world: int, length: int = 53, batch: int = 12, epoch: int = 1, start: int = 0, **kwargs) -> list[list]:
    """Draws of every step of an epoch, over all processes, in the order of the shared permutation."""
    parts = []
    for rank in range(world):
        sampler = TrainSampler(length, batch_size=batch // world, rank=rank, world=world, seed=7, **kwargs)
        sampler.set_epoch(epoch, start)
        parts.append(list(sampler))
    local = batch // world
    count = len(parts[0]) // local
    return [sorted(d for part in parts for d in part[k * local : (k + 1) * local]) for k in range(count)]


@pytest.mark.parametrize('world', [2, 3, 4])
@pytest.mark.parametrize('repeats', [1, 3])
def test_every_step_has_the_same_images_and_augmentations_on_any_number_of_processes(world, repeats):
    assert steps(world, repeats=repeats) == steps(1, repeats=repeats)


def test_an_epoch_takes_no_image_twice_and_leaves_out_less_than_a_batch():
    drawn = [draw.index for step in steps(2) for draw in step]
    assert len(drawn) == len(set(drawn)) == 48
    assert set(drawn) <= set(range(53))


def test_a_pass_can_begin_anywhere_and_epochs_differ():
    assert steps(2, start=3) == steps(2)[3:]
    assert steps(2, start=4) == []
    assert steps(2, epoch=2) != steps(2, epoch=1)
    sampler = TrainSampler(53, batch_size=6, rank=0, world=2, seed=7)
    sampler.set_epoch(0, 3)
    assert len(sampler) == 24  # of a whole epoch: what schedules count by


def test_repeated_augmentation_gives_each_image_several_times_with_other_random_numbers():
    drawn = [draw for step in steps(1, length=60, repeats=3) for draw in step]
    counts = {index: len(list(group)) for index, group in itertools.groupby(sorted(d.index for d in drawn))}
    assert set(counts.values()) == {3}
    assert len(counts) == 20
    assert len({draw.entropy for draw in drawn}) == 60


def test_a_set_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match='a batch of 64 images is more than the 53'):
        TrainSampler(53, batch_size=32, rank=0, world=2, seed=0)


@pytest.mark.parametrize('length', [1, 3, 4, 7, 8])
@pytest.mark.parametrize('world', [1, 2, 3, 5])
def test_evaluation_counts_every_image_once_and_all_processes_run_equally_long(length, world):
    parts = [list(EvalSampler(length, rank=rank, world=world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(draw.index for part in parts for draw in part if draw.counted) == list(range(length))

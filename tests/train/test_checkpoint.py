import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal

import numpy as np
import pytest
import torch

from hydra_vision.errors import CheckpointError, WriteError
from hydra_vision.train.checkpoint import (
    BEST,
    KEPT,
    LAST,
    checkpoint_to_resume,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from hydra_vision.train.randomness import random_state, set_random_state


def listing(folder) -> list[str]:
    """Files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


def save_beyond_the_limit(folder, messages) -> None:
    """In a process that may not write files of more than 100 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save_checkpoint(folder, {'updates': 2, 'weights': torch.zeros(1_000_000)}, is_best=True)
    except WriteError as error:
        messages.send(str(error))


def test_a_full_disk_keeps_both_checkpoints(tmp_path):
    """A real write error."""
    save_checkpoint(tmp_path, {'epoch': 1, 'updates': 1, 'weights': torch.zeros(10)}, is_best=True)
    fork = multiprocessing.get_context('fork')
    received, sent = fork.Pipe(duplex=False)
    process = fork.Process(target=save_beyond_the_limit, args=(tmp_path, sent))
    process.start()
    process.join(60)
    message = received.recv()
    assert message.startswith('could not write')
    assert 'the previous last.pt is intact' in message
    assert listing(tmp_path) == [BEST, 'checkpoints/step-000000001.pt', LAST]
    assert load_checkpoint(tmp_path / LAST)['epoch'] == load_checkpoint(tmp_path / BEST)['epoch'] == 1


def test_best_stays_when_last_moves_on(tmp_path):
    save_checkpoint(tmp_path, {'epoch': 1, 'updates': 1}, is_best=True)
    save_checkpoint(tmp_path, {'epoch': 2, 'updates': 2}, is_best=False, keep_last=1)
    assert load_checkpoint(tmp_path / BEST)['epoch'] == 1
    assert load_checkpoint(tmp_path / LAST)['epoch'] == 2
    save_checkpoint(tmp_path, {'epoch': 3, 'updates': 3}, is_best=True, keep_last=1)
    assert load_checkpoint(tmp_path / BEST)['epoch'] == 3
    assert listing(tmp_path) == [BEST, 'checkpoints/step-000000003.pt', LAST]


@pytest.mark.parametrize(('keep_last', 'keep_steps', 'kept'), [(1, (), [6]), (2, {2}, [2, 5, 6]), (3, {6}, [4, 5, 6])])
def test_the_newest_and_chosen_older_checkpoints_are_kept(tmp_path, keep_last, keep_steps, kept):
    for step in range(1, 7):
        save_checkpoint(tmp_path, {'updates': step}, is_best=False, keep_last=keep_last, keep_steps=keep_steps)
    names = [f'checkpoints/step-{step:09d}.pt' for step in kept]
    assert listing(tmp_path) == [*names, LAST]
    assert os.path.samefile(tmp_path / LAST, tmp_path / names[-1])


def flip_a_weight(path) -> None:
    """One wrong bit where the weights lie: the file stays readable."""
    content = bytearray(path.read_bytes())
    place = content.find(torch.full((100,), 7.0).numpy().tobytes())
    content[place + 50] ^= 1
    path.write_bytes(content)


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize('spoil', [flip_a_weight, cut, lambda path: path.write_bytes(b'')])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, spoil):
    for step in (1, 2):
        save_checkpoint(tmp_path, {'updates': step, 'weights': torch.full((100,), 7.0)}, is_best=False)
    spoil(tmp_path / KEPT / 'step-000000002.pt')
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / LAST)
    path, state, problems = newest_checkpoint(tmp_path)
    assert state['updates'] == 1
    assert path.name == 'step-000000001.pt'
    assert len(problems) == 1
    assert 'step-000000002.pt' in problems[0]
    spoil(path)
    with pytest.raises(CheckpointError, match=r'no checkpoint of .* is intact: .*000002.pt.*000001.pt'):
        newest_checkpoint(tmp_path)


def test_a_newer_file_of_something_else_is_named_and_the_run_goes_on_before_it(tmp_path):
    run = {'arch': 'test_hydra_vit', 'config': {}, 'num_classes': 1, 'state_dict': {}}
    save_checkpoint(tmp_path, {'updates': 1, **run}, is_best=False)
    save_checkpoint(tmp_path, {'updates': 2}, is_best=False)
    path, state, problems = checkpoint_to_resume(str(tmp_path), None, 'name')
    assert state['updates'] == 1
    assert path.name == 'step-000000001.pt'
    assert 'step-000000002.pt is not the checkpoint of a training run: it has no arch' in problems[0]


def test_a_folder_with_last_alone_and_one_with_nothing(tmp_path):
    assert newest_checkpoint(tmp_path) == (None, None, [])
    save_checkpoint(tmp_path, {'updates': 1}, is_best=False)
    shutil.rmtree(tmp_path / KEPT)  # somebody copied last.pt only
    assert newest_checkpoint(tmp_path)[0] == tmp_path / LAST


def test_best_is_written_where_links_are_not_possible(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, 'no links here')

    monkeypatch.setattr('os.link', refuse)
    save_checkpoint(tmp_path, {'epoch': 1}, is_best=True)
    assert load_checkpoint(tmp_path / BEST)['epoch'] == 1


def test_random_state_survives_a_checkpoint(tmp_path):
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))]

    random.gauss(0, 1)  # leaves a second number waiting in the generator
    np.random.randn()
    save_checkpoint(tmp_path, {'random': random_state(torch.device('cpu'))}, is_best=False)
    expected = draw()
    set_random_state(load_checkpoint(tmp_path / LAST)['random'], torch.device('cpu'))
    assert draw() == expected


def test_files_that_are_no_checkpoint_or_not_ours(tmp_path):
    path = tmp_path / 'model.pt'
    with pytest.raises(CheckpointError, match='no checkpoint'):
        load_checkpoint(path)
    for content, message in ((b'', 'is empty'), (b'hello', 'is a text file; expected a checkpoint')):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)
    for state, message in (({'state_dict': {}}, 'was not written by this trainer'), ({'format': 99}, 'has format 99')):
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)
    torch.save({'format': 2, 'checksum': '', 'epoch': 1}, path)
    assert load_checkpoint(path)['epoch'] == 1

import errno
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from hydra_vision.train.checkpoint import (
    BEST,
    LAST,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)
from hydra_vision.train.errors import CheckpointError
from hydra_vision.train.randomness import random_state, set_random_state


class Interrupted(BaseException):
    """Stands for Ctrl-C and the like."""


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_a_write_that_fails_half_way_keeps_the_old_file(tmp_path, failure):
    path = tmp_path / "file"
    path.write_text("old")

    def write(file):
        file.write(b"half of the n")
        raise failure

    with pytest.raises(CheckpointError, match=r"could not write .*the previous file is intact"):
        write_atomically(path, write)
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_an_interrupt_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(file):
        file.write(b"half")
        raise Interrupted

    with pytest.raises(Interrupted):
        write_atomically(path, write)
    assert [item.read_text() for item in tmp_path.iterdir()] == ["old"]


def test_a_full_disk_keeps_both_checkpoints(tmp_path):
    """A real write error: the process may not write files beyond a size."""
    save_checkpoint(tmp_path, {"epoch": 1, "weights": torch.zeros(10)}, is_best=True)
    script = """
        import resource, signal, sys, torch
        from pathlib import Path
        from hydra_vision.train.checkpoint import save_checkpoint
        from hydra_vision.train.errors import CheckpointError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_checkpoint(Path(sys.argv[1]), {"epoch": 2, "weights": torch.zeros(1_000_000)}, is_best=True)
        except CheckpointError as error:
            print("refused:", error)
    """
    pytest.importorskip("resource")
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "refused: could not write" in result.stdout
    assert "the previous last.pt is intact" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [BEST, LAST]
    assert load_checkpoint(tmp_path / LAST)["epoch"] == load_checkpoint(tmp_path / BEST)["epoch"] == 1


def test_best_stays_when_last_moves_on(tmp_path):
    save_checkpoint(tmp_path, {"epoch": 1}, is_best=True)
    save_checkpoint(tmp_path, {"epoch": 2}, is_best=False)
    assert load_checkpoint(tmp_path / BEST)["epoch"] == 1
    assert load_checkpoint(tmp_path / LAST)["epoch"] == 2
    save_checkpoint(tmp_path, {"epoch": 3}, is_best=True)
    assert load_checkpoint(tmp_path / BEST)["epoch"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [BEST, LAST]


def test_best_is_written_where_links_are_not_possible(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr("os.link", refuse)
    save_checkpoint(tmp_path, {"epoch": 1}, is_best=True)
    assert load_checkpoint(tmp_path / BEST)["epoch"] == 1


def test_random_state_survives_a_checkpoint(tmp_path):
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))]

    random.gauss(0, 1)  # leaves a second number waiting in the generator
    np.random.randn()
    save_checkpoint(tmp_path, {"random": random_state(torch.device("cpu"))}, is_best=False)
    expected = draw()
    set_random_state(load_checkpoint(tmp_path / LAST)["random"], torch.device("cpu"))
    assert draw() == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no checkpoint"), (b"", "cannot read"), (b"hello", "cannot read .*: damaged, or not a checkpoint")],
)
def test_files_that_are_no_checkpoint(tmp_path, content, message):
    path = tmp_path / "model.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_checkpoints_of_others(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"was not written by this trainer"):
        load_checkpoint(tmp_path / "weights.pt")
    torch.save({"format": 99}, tmp_path / "future.pt")
    with pytest.raises(CheckpointError, match=r"has format 99"):
        load_checkpoint(tmp_path / "future.pt")


def test_a_truncated_checkpoint(tmp_path):
    save_checkpoint(tmp_path, {"weights": torch.zeros(1000)}, is_best=False)
    content = (tmp_path / LAST).read_bytes()
    (tmp_path / LAST).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"cannot read"):
        load_checkpoint(tmp_path / LAST)

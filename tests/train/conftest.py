import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hydra_vision.train.main import main

COLORS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}

# A recipe small enough for many runs: 4 tokens, one block, 6 batches an epoch.
TINY = """
model: {name: hydra_vit_nano, drop_path_rate: 0.1, kwargs: {patch_size: 4, depth: 1, embed_dim: 64}}
data: {img_size: 8, batch_size: 8, workers: 0}
optim: {lr: 2e-3}
schedule: {epochs: 3, warmup_epochs: 1}
ema: {decay: 0.9}
run: {device: cpu, threads: 1}
"""


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path, monkeypatch):
    """Runs write to output/ in the current folder, and set the number of threads of the process."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def save_images(folder: Path, count: int, color: Sequence[int], size: int = 24, suffix: str = ".png") -> None:
    """Noisy images around one colour."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(sum(color))
    for index in range(count):
        noise = generator.normal(color, 20, (size, size, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{index:03}{suffix}")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> tuple[str, ...]:
    """Arguments of a run on 48 training and 18 validation images that takes about a second."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.yaml").write_text(TINY)
    for label, color in COLORS.items():
        save_images(folder / "train" / label, 16, color, size=12)
        save_images(folder / "val" / label, 6, color, size=12)
    return ("--config", str(folder / "tiny.yaml"), "--data-dir", str(folder))


@pytest.fixture
def image_folder(tmp_path) -> Callable[..., Path]:
    """Builds an ImageNet-style folder of three classes that differ in colour."""

    def build(name: str = "images", train: int = 8, val: int = 3, suffix: str = ".png") -> Path:
        for split, count in (("train", train), ("val", val)):
            for label, color in COLORS.items():
                save_images(tmp_path / name / split / label, count, color, suffix=suffix)
        return tmp_path / name

    return build


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str, str]]:
    """Calls the training command; gives its exit code, output and error text."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def fails(run) -> Callable[..., str]:
    """Calls the training command, expects it to end with a message (not a traceback), and gives the message."""

    def call(*arguments: object, code: int) -> str:
        got, _, error = run(*arguments)
        assert got == code, error
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        return error

    return call


@pytest.fixture
def validated(run) -> Callable[..., dict]:
    """Results of `--validate --json`."""

    def call(*arguments: object) -> dict:
        code, out, error = run("--validate", *arguments, "--json")
        assert code == 0, error
        return json.loads(out)["results"]

    return call

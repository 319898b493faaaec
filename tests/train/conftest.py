import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hydra_vision.train.main import main

# A model and a recipe small enough for many runs: 4 tokens, one block, four epochs.
TINY = (
    *("--config", "hydra_vit_nano_digits", "--epochs", "3", "--device", "cpu"),
    *("--set", "model.kwargs={patch_size: 4, depth: 1, embed_dim: 64}", "--set", "schedule.warmup_epochs=1"),
)


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path, monkeypatch):
    """Runs write to output/ in the current folder."""
    monkeypatch.chdir(tmp_path)


def save_images(folder: Path, count: int, color: Sequence[int], size: int = 24, suffix: str = ".png") -> None:
    """Noisy images around one colour."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(sum(color))
    for index in range(count):
        noise = generator.normal(color, 20, (size, size, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{index:03}{suffix}")


@pytest.fixture
def image_folder(tmp_path) -> Callable[..., Path]:
    """Builds an ImageNet-style folder of three classes that differ in colour."""

    def build(name: str = "images", train: int = 8, val: int = 3, suffix: str = ".png") -> Path:
        colors = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}
        for split, count in (("train", train), ("val", val)):
            for label, color in colors.items():
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

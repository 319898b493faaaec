"""Shared by all tests."""

import os
from collections.abc import Callable

import pytest

# Tests compute on small tensors: a pool of threads costs them more than it gives, and two pools fight over the cores.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)


@pytest.fixture
def largest_numel() -> Callable[[Callable[[], object]], int]:
    """Elements of the largest tensor that any operation of a function returns."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (list, tuple)) else (out,):
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

    def run(function: Callable[[], object]) -> int:
        with Largest() as mode:
            function()
        return mode.numel

    return run


@pytest.fixture
def fails(capsys) -> Callable[..., str]:
    """Runs a command that must end with exit code 2 and one line on stderr alone; gives the line."""
    from hydra_vision.cli import main

    def run(*argv: object) -> str:
        capsys.readouterr()
        try:
            code = main([str(word) for word in argv])
        except SystemExit as stop:  # argparse
            code = stop.code
        captured = capsys.readouterr()
        assert (code, captured.out) == (2, ''), argv
        assert captured.err.count('\n') == 1, captured.err
        return captured.err

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason='needs a CUDA device')
    for item in items:
        if 'gpu' in item.keywords:
            item.add_marker(skip)

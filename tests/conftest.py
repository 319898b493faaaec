"""Shared by all tests."""

import os

import pytest

# Tests compute on small tensors: a pool of threads costs them more than it gives, and two pools fight over the cores.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason='needs a CUDA device')
    for item in items:
        if 'gpu' in item.keywords:
            item.add_marker(skip)

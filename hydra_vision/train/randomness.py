"""Random generators: their state in checkpoints, and draws that follow from numbers instead of from history.

A resumed run must draw what an uninterrupted one would have drawn. Loaders read ahead and loader processes are
restarted, so what they draw comes from generators that are seeded per image or batch and restored afterwards.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch


def seed_from(*numbers: int) -> int:
    """A 32-bit seed that follows from integers >= 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_generators(numbers: Sequence[int], device: torch.device | None = None) -> None:
    """Seed the global generators of Python, NumPy, PyTorch on the CPU and on a CUDA `device`, if one is given."""
    state = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.default_generator.manual_seed(int(state[2]))
    if device is not None and device.type == 'cuda':
        with torch.cuda.device(device):
            torch.cuda.manual_seed(int(state[2]))


@contextlib.contextmanager
def seeded(numbers: Sequence[int], device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators for the length of a block, and restore them afterwards.

    Args:
        numbers: Integers that the seeds follow from.
        device: A CUDA device whose generator is covered as well.
    """
    python, numpy = random.getstate(), np.random.get_state()
    cuda = device is not None and device.type == 'cuda'
    with torch.random.fork_rng(devices=[device] if cuda else []):
        seed_generators(numbers, device)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def random_state(device: torch.device) -> dict[str, Any]:
    """State of every random generator that training on `device` draws from, as plain types and tensors."""
    version, internal, gauss = random.getstate()
    name, words, position, has_gauss, cached = np.random.get_state()
    return {
        'python': [version, list(internal), gauss],
        'numpy': [name, words.tolist(), int(position), int(has_gauss), float(cached)],
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state(device) if device.type == 'cuda' else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_state` returned; the CUDA generator only where the run was and is on CUDA."""
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    name, words, position, has_gauss, cached = state['numpy']
    np.random.set_state((name, np.asarray(words, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state['torch'])
    if device.type == 'cuda' and state['cuda'] is not None:
        torch.cuda.set_rng_state(state['cuda'], device)

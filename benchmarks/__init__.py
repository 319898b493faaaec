"""What this project measures about itself: speed goals, kernels, operator, ablation. Users install none of it.

Each module is a command, started from the root of a checkout: ``python -m benchmarks.goals --help``.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from hydra_vision.cli import guarded

GOALS = Path(__file__).with_name('goals.yaml')


def read_goals(path: Path = GOALS) -> dict[str, Any]:
    """The sections of goals.yaml."""
    return yaml.safe_load(path.read_text(encoding='utf-8'))


def run(main: Callable[[], int], name: str) -> None:
    """Run a command and exit as `hydra-vision` does: what goes wrong is one line on stderr."""
    sys.exit(guarded(main, lambda: name))

"""What this project measures about itself: speed goals, kernels, operator, ablation. Users install none of it.

Each module is a command, started from the root of a checkout: ``python -m benchmarks.goals --help``.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from hydra_vision.errors import UserError, user_text

GOALS = Path(__file__).with_name('goals.yaml')


def read_goals(path: Path = GOALS) -> dict[str, Any]:
    """The sections of goals.yaml."""
    return yaml.safe_load(path.read_text(encoding='utf-8'))


def run(main: Callable[[], int], name: str) -> None:
    """Run a command and exit as `hydra-vision` does: bad input is one line on stderr."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f'{name}: error: {user_text(error)}', file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)

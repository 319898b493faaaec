"""Where a run comes from: run.json beside its results."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hydra_vision.environment import device_name, versions
from hydra_vision.io import write_text

RUN = 'run.json'


def write_run(folder: Path, facts: dict[str, Any], device: torch.device) -> None:
    """Writes run.json: command, git commit, versions, device and what is given.

    A run that is continued gets one more entry in `sessions`; what earlier ones said stays.

    Args:
        folder: of the run.
        facts: of the model and the data, plain JSON values.
        device: where it is trained.
    """
    path = folder / RUN
    sessions = []
    if path.is_file():
        try:
            sessions = json.loads(path.read_text())['sessions']
        except (ValueError, KeyError, TypeError, OSError):  # damaged: the run matters more than its history
            sessions = []
    session = {
        'started': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
        'command': shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        'git_commit': git_commit(),
        'versions': versions(),
        'device': device_name(device),
    }
    write_text(path, json.dumps({**facts, 'sessions': [*sessions, session]}, indent=2) + '\n')


def git_commit() -> str | None:
    """Commit of the checkout that this package was imported from, with '+changes' where files differ from it.

    None where the package is installed without its repository.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / '.git').exists():
        return None
    try:
        commit = _git(root, 'rev-parse', 'HEAD')
        changes = _git(root, 'status', '--porcelain', '--untracked-files=no')
    except (OSError, subprocess.SubprocessError):  # no git, or a repository of somebody else
        return None
    return commit + ('+changes' if changes else '')


def _git(root: Path, *arguments: str) -> str:
    command = ['git', '-C', str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

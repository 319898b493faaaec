"""`python -m hydra_vision.run SCRIPT ...`: a script that knows timm, run with our models registered.

timm finds models of other packages only after those were imported. Its train.py has a flag for that
(`--device-modules hydra_vision`); validate.py, benchmark.py and most scripts of others have none.
"""

import os
import runpy
import sys
from collections.abc import Sequence

import hydra_vision  # noqa: F401  registers the models

__all__ = ['main']

_USAGE = """usage: python -m hydra_vision.run SCRIPT.py [ARGUMENTS ...]
       python -m hydra_vision.run -m MODULE [ARGUMENTS ...]

Runs the script or module as `python SCRIPT.py ...` or `python -m MODULE ...` does, after `import hydra_vision`: its
models are then known to timm. Under torchrun: torchrun --nproc-per-node 8 -m hydra_vision.run SCRIPT.py ..."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the arguments name; returns, or exits as the script does.

    Args:
        argv: Arguments without the program's name; None takes them from the command line.

    Raises:
        SystemExit: 2 for wrong arguments, 0 after --help, otherwise the script's own.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (['-h'], ['--help']):
        print(_USAGE)
        return
    as_module = argv[:1] == ['-m']
    if as_module:
        argv = argv[1:]
    if not argv or argv[0].startswith('-'):
        _fail(f'unknown option {argv[0]}' if argv else 'nothing to run')
    target = argv[0]
    if as_module:
        sys.argv = argv  # run_module puts the module's file in front
        _look_first_in(os.getcwd())
        runpy.run_module(target, run_name='__main__', alter_sys=True)
        return
    if not os.path.isfile(target):
        _fail(f'no script {target!r}')
    sys.argv = argv
    _look_first_in(os.path.dirname(os.path.abspath(target)))
    runpy.run_path(target, run_name='__main__')


def _look_first_in(folder: str) -> None:
    """As Python does: in place of the working directory, which `-m hydra_vision.run` put there; not under -P."""
    if not getattr(sys.flags, 'safe_path', False):
        sys.path[0] = folder


def _fail(message: str) -> None:
    print(f'python -m hydra_vision.run: error: {message}\n{_USAGE}', file=sys.stderr)
    raise SystemExit(2)


if __name__ == '__main__':
    main()

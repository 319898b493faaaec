"""Optional dependencies: imported where they are used, with an error that names the extra to install."""

import importlib
from types import ModuleType

from .command_line import UserError

__all__ = ['MissingExtraError', 'require']


class MissingExtraError(UserError, ImportError):
    """An optional package that is not installed, or does not work."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: its import name.
        extra: the extra of this package that installs it.

    Raises:
        MissingExtraError: it is not installed, or one of its own dependencies is not.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        text = f"{module} cannot be imported ({error}): pip install 'hydra-vision[{extra}]'"
        raise MissingExtraError(text) from error

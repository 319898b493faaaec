"""Optional dependencies: imported where they are used, with an error that names the extra to install."""

import importlib
from types import ModuleType

__all__ = ['require']


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: its import name.
        extra: the extra of this package that installs it.

    Raises:
        ImportError: it is not installed, or one of its own dependencies is not.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported ({error}): pip install 'hydra-vision[{extra}]'") from error

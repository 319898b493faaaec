"""Can a folder be written to?"""

import tempfile
from pathlib import Path

__all__ = ['why_unwritable']


def why_unwritable(folder: Path) -> str:
    """Why no file can be made in a folder, found by making one that has no name; '' where it can."""
    if not folder.is_dir():
        return f'there is no folder {str(folder)!r}'
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ''
    except OSError as error:  # no permission, a read-only disk, a full one
        return f'no file can be made in {str(folder)!r} ({error.strerror})'

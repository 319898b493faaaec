"""The error of feature work; on the command line its text is the whole message."""

from ..errors import UserError

__all__ = ['FeatureError']


class FeatureError(UserError, ValueError):
    """An argument, a file or a model that does not fit."""

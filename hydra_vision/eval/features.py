"""Two sets of labelled features that belong together: what a probe learns from, and what it is judged on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from timm.utils.misc import natural_key

from ..errors import FeatureError
from ..features import Features
from ..features.files import brief_values

__all__ = ['Split', 'check_same', 'class_names', 'paired_splits', 'top_accuracy']

# What has to be the same on both sides for features to be comparable.
_SAME = ('model', 'fingerprint', 'arguments', 'pool', 'layers', 'data', 'rules')


@dataclass(frozen=True)
class Split:
    """Features as arrays.

    Args:
        x: (rows, D) float32.
        y: (rows,) class indices.
        name: What they were made from.
    """

    x: np.ndarray
    y: np.ndarray
    name: str


def paired_splits(train: Features, test: Features) -> tuple[Split, Split, list[str]]:
    """Both sets as arrays, and the names of the classes that the indices count, those of the training set.

    Raises:
        FeatureError: Features of different models or settings, more than a vector an image, no classes, a test class
            that the training set does not have, a single class.
    """
    check_same(train.path.name, train.card, test.path.name, test.card)
    for features in (train, test):
        if len(features.card['shape']) != 1:
            raise FeatureError(
                f'{features.path.name} has {features.card["shape"]} values an image; a probe takes one vector: pool '
                'avg, max or cls'
            )
    names = class_names(train.classes, test.classes)
    index = {name: i for i, name in enumerate(names)}

    def split(features: Features) -> Split:
        y = np.array([index[name] for name in features.classes])
        return Split(np.array(features.array, np.float32), y, features.card['images'])

    return split(train), split(test), names


def check_same(one: str, card: Mapping[str, Any], other: str, other_card: Mapping[str, Any]) -> None:
    """Let two cards pass whose features can be compared.

    Raises:
        FeatureError: Different models or settings.
    """
    for key in _SAME:
        if card.get(key) != other_card.get(key):
            first, second = brief_values(card.get(key), other_card.get(key))
            raise FeatureError(
                f'{one} and {other} are features of different models or settings: {key} {first} and {second}'
            )


def class_names(train: Sequence[str] | None, test: Sequence[str] | None) -> list[str]:
    """Classes to train on, in natural order.

    Raises:
        FeatureError: Images without classes, a test class that is not trained on, a single class.
    """
    for part, classes in (('train on', train), ('test on', test)):
        if classes is None:
            raise FeatureError(f'the images to {part} have no classes (a folder a class, or a tab and a class a line)')
    names = sorted(set(train), key=natural_key)
    unknown = sorted(set(test) - set(names), key=natural_key)
    if unknown:
        shown = ', '.join(unknown[:5]) + (f' and {len(unknown) - 5} more' if len(unknown) > 5 else '')
        raise FeatureError(f'{len(unknown)} classes to test on are not among the {len(names)} to train on: {shown}')
    if len(names) < 2:
        raise FeatureError(f'the images to train on have one class, {names[0]}; a probe needs two')
    return names


def top_accuracy(scores: np.ndarray, y: np.ndarray, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Top-k accuracies in percent of scores (rows, classes); k is at most the number of classes."""
    order = np.argsort(-scores, axis=1, kind='stable')
    return {f'top{k}': 100 * float((order[:, :k] == y[:, None]).any(1).mean()) for k in ks}

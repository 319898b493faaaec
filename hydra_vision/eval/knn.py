"""Nearest neighbours on frozen features: nothing is trained.

The protocol is that of DINO (Caron et al., https://arxiv.org/abs/2104.14294, appendix F.1, after Wu et al.,
https://arxiv.org/abs/1805.01978): features are normalised to length 1; each of the k nearest training images votes for
its class with the weight exp(cosine similarity / T), T = 0.07; k = 20 is what is usually reported.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import FeatureError
from .features import Split, top_accuracy

__all__ = ['PROTOCOL', 'knn_probe', 'knn_scores']

PROTOCOL = 'weighted k nearest neighbours (DINO): cosine similarity, votes exp(similarity / T), nothing trained'


def knn_probe(
    train: Split,
    test: Split,
    *,
    num_classes: int,
    k: Sequence[int] = (20,),
    temperature: float = 0.07,
    device: str = 'cpu',
) -> list[dict[str, Any]]:
    """Accuracies of `knn_scores` for several k.

    Returns:
        For each k: `k`, `top1` and `top5` in percent.

    Raises:
        FeatureError: k below 1 or above the number of training images; a temperature that is not a positive number.
    """
    for each in k:
        if not 1 <= each <= len(train.x):
            raise FeatureError(f'k={each}; allowed: 1 to {len(train.x)}, the number of training images')
    if not 0 < temperature < math.inf:
        raise FeatureError(f'temperature={temperature}; it must be positive')
    rows = []
    for each in k:
        scores = knn_scores(
            *(torch.from_numpy(array).to(device) for array in (train.x, train.y, test.x)),
            k=each,
            num_classes=num_classes,
            temperature=temperature,
        )
        rows.append({'k': each, **top_accuracy(scores.cpu().numpy(), test.y)})
    return rows


def knn_scores(
    train: torch.Tensor,
    labels: torch.Tensor,
    test: torch.Tensor,
    *,
    k: int,
    num_classes: int,
    temperature: float = 0.07,
    chunk: int | None = None,
) -> torch.Tensor:
    """Votes of the k nearest training features.

    Args:
        train: (n, D) features.
        labels: (n,) class indices.
        test: (m, D) features.
        k: Neighbours.
        num_classes: Classes.
        temperature: T of exp(similarity / T).
        chunk: Test features at a time, for which chunk * n similarities are held; None for 256 MiB of them.

    Returns:
        (m, num_classes) sums of votes, up to a factor that differs between rows.
    """
    train, votes = F.normalize(train, dim=1), []
    chunk = chunk or max(1, 2**26 // len(train))
    for part in F.normalize(test, dim=1).split(chunk):
        similarity, index = (part @ train.T).topk(k, dim=1)  # (chunk, k)
        # relative to the nearest one: exp(1 / T) alone overflows float32 for small T
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes.append(torch.zeros(len(part), num_classes, device=part.device).scatter_add_(1, labels[index], weight))
    return torch.cat(votes)

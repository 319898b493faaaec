"""Linear probes on frozen features: how much of the classes a linear classifier finds in them.

Both heads standardise the features by the training set's mean and deviation, choose their one hyperparameter on a part
of the *training* set that is held out for it, and are then trained once on all of it. The test set is looked at once.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from ..errors import FeatureError
from .features import Split, top_accuracy

__all__ = ['CS', 'HEADS', 'LRS', 'linear_probe', 'logistic_probe', 'protocol']

CS = tuple(10.0**n for n in range(-4, 4))  # inverse strengths of the L2 penalty
LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_PROTOCOLS = {
    'logistic': (
        'scikit-learn logistic regression (L-BFGS, at most {max_iter} iterations) on standardised features; {value}'
    ),
    'linear': (
        'linear head of timm on standardised features without augmentation: SGD, Nesterov momentum 0.9, no weight '
        'decay, batches of {batch_size}, cosine over {epochs} epochs, seed {seed}; {value}'
    ),
}
HEADS = tuple(_PROTOCOLS)


def protocol(head: str, values: Sequence[float] | None = None, *, holdout: float, seed: int, **options: int) -> str:
    """What is done, in words for the one who reads the numbers.

    Args:
        head: One of `HEADS`.
        values: That are tried; None for the default ones.
        holdout: As in the function of that head, like the other options.
        seed: Likewise.
        **options: Likewise.
    """
    name = {'logistic': 'C', 'linear': 'lr'}[head]
    value = f'{name} chosen on {holdout:.0%} of the training images (stratified, seed {seed}), then fit to all of them'
    if values is not None and len(values) == 1:
        value = f'{name} {values[0]:g} was given, none chosen'
    return _PROTOCOLS[head].format(value=value, seed=seed, **options)


def logistic_probe(
    train: Split,
    test: Split,
    *,
    num_classes: int,
    values: Sequence[float] = CS,
    holdout: float = 0.2,
    seed: int = 0,
    max_iter: int = 1000,
) -> dict[str, Any]:
    """Logistic regression of scikit-learn.

    Args:
        train: Features to learn from.
        test: Features to be judged on.
        num_classes: Classes that the indices count.
        values: C that are tried.
        holdout: Share of the training set on which they are compared.
        seed: Seed of that split.
        max_iter: Of L-BFGS.

    Returns:
        `top1` and `top5` in percent, the chosen `C`, the `sweep` (top-1 on the held-out part for each C) and whether
        the last fit `converged`.

    Raises:
        FeatureError: An empty or non-positive list of values; a share that leaves a class without images.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fit(x: np.ndarray, y: np.ndarray, C: float) -> Callable[[np.ndarray], np.ndarray]:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=max_iter))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', ConvergenceWarning)  # reported as `converged`
            model.fit(x, y)
        fit.converged = bool((model[-1].n_iter_ < max_iter).all())
        return lambda features: _logits(model, features, num_classes)

    return _sweep(fit, 'C', train, test, values, holdout, seed) | {'converged': fit.converged}


def linear_probe(
    train: Split,
    test: Split,
    *,
    num_classes: int,
    values: Sequence[float] = LRS,
    holdout: float = 0.2,
    seed: int = 0,
    epochs: int = 100,
    batch_size: int = 256,
    device: str = 'cpu',
) -> dict[str, Any]:
    """timm's linear head, optimizer and schedule; for training sets too large for L-BFGS.

    Args:
        train: Features to learn from.
        test: Features to be judged on.
        num_classes: Classes that the indices count.
        values: Learning rates that are tried.
        holdout: Share of the training set on which they are compared.
        seed: Seed of that split, of the head and of the order.
        epochs: Passes over the features.
        batch_size: Features an update.
        device: Where the head is trained; all features are moved there.

    Returns:
        `top1` and `top5` in percent, the chosen `lr` and the `sweep`.

    Raises:
        FeatureError: As `logistic_probe`; epochs or batch_size below 1.
    """
    from sklearn.preprocessing import StandardScaler

    if epochs < 1 or batch_size < 1:
        raise FeatureError(f'epochs={epochs}, batch_size={batch_size}; both must be at least 1')

    def fit(x: np.ndarray, y: np.ndarray, lr: float) -> Callable[[np.ndarray], np.ndarray]:
        scaler = StandardScaler().fit(x)  # leaves features that never change as they are, sums in float64

        def scaled(features: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(scaler.transform(features)).to(device)

        head = _train_head(
            scaled(x),
            torch.from_numpy(y).to(device),
            num_classes=num_classes,
            lr=lr,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
        )
        return lambda features: head(scaled(features)).cpu().numpy()

    return _sweep(fit, 'lr', train, test, values, holdout, seed)


def _train_head(
    x: torch.Tensor, y: torch.Tensor, *, num_classes: int, lr: float, epochs: int, batch_size: int, seed: int
) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, head = create_classifier(x.shape[1], num_classes, pool_type='')
    head.to(x.device)
    optimizer = create_optimizer_v2(head, opt='sgd', lr=lr, weight_decay=0.0, momentum=0.9)
    updates = -(-len(x) // batch_size)
    schedule, _ = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=epochs, min_lr=0.0, step_on_epochs=False, updates_per_epoch=updates
    )
    for update in range(epochs * updates):
        if update % updates == 0:
            order = torch.randperm(len(x), generator=generator).to(x.device)
        index = order[update % updates * batch_size :][:batch_size]
        loss = F.cross_entropy(head(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step_update(update + 1)
    return head.requires_grad_(False)


def _sweep(
    fit: Callable[[np.ndarray, np.ndarray, float], Callable[[np.ndarray], np.ndarray]],
    name: str,
    train: Split,
    test: Split,
    values: Sequence[float],
    holdout: float,
    seed: int,
) -> dict[str, Any]:
    """Choose the value that is best on the held-out part (the smaller one of equals), fit on all, judge."""
    from sklearn.model_selection import train_test_split

    if not values or min(values) <= 0:
        raise FeatureError(f'{name}={list(values)}; give at least one, all positive')
    best, sweep = values[0], []
    if len(values) > 1:
        try:
            parts = train_test_split(train.x, train.y, test_size=holdout, stratify=train.y, random_state=seed)
        except ValueError as error:
            raise FeatureError(
                f'holdout={holdout} of {len(train.y)} training images is not possible: {error}'
            ) from error
        x, x_held, y, y_held = parts
        if set(y) != set(train.y):
            raise FeatureError(f'holdout={holdout} leaves a class without an image to train on')
        for value in sorted(values):
            sweep.append({name: value, **top_accuracy(fit(x, y, value)(x_held), y_held, ks=(1,))})
        best = max(sweep, key=lambda row: row['top1'])[name]
    scores = fit(train.x, train.y, best)(test.x)
    return {name: best, **top_accuracy(scores, test.y), 'sweep': sweep}


def _logits(model: Any, x: np.ndarray, num_classes: int) -> np.ndarray:
    """Scores (rows, num_classes), -inf for classes that scikit-learn has not seen: it leaves out their columns."""
    scores = model.decision_function(x)
    scores = np.stack([-scores, scores], 1) if scores.ndim == 1 else scores  # two classes: one score
    columns = np.full((len(scores), num_classes), -np.inf)
    columns[:, model.classes_] = scores
    return columns

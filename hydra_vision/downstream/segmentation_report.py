"""What a segmentation run leaves behind: curve, table, and predictions beside the truth."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from rich.table import Table

from ..console import make_table

__all__ = ['iou_table', 'plot_predictions', 'summary_table', 'write_curve']


def write_curve(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row an epoch."""
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=['epoch', 'loss', 'val_miou', 'val_accuracy', 'seconds'])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f'{v:.5g}' if isinstance(v, float) else v for k, v in row.items()})


def _percent(value: float) -> str:
    return '-' if math.isnan(value) else f'{100 * value:.1f}'


def iou_table(summary: Mapping[str, Any]) -> Table:
    """IoU a class."""
    rows = [[name, _percent(value)] for name, value in zip(summary['classes'], summary['test']['iou'])]
    return make_table('IoU on the test images (%)', ['class', summary['model']], rows, right=(1,))


def summary_table(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """One row a run."""
    rows = [
        [
            s['model'],
            s['decoder'],
            f'{s["parameters"] / 1e6:.1f}',
            str(s['recipe']['epochs']),
            _percent(s['val']['miou']),
            _percent(s['test']['miou']),
            _percent(s['test']['accuracy']),
            f'{s["seconds"]:.0f}',
        ]
        for s in summaries
    ]
    columns = ['model', 'decoder', 'params (M)', 'epochs', 'val mIoU', 'test mIoU', 'test accuracy', 'seconds']
    return make_table('segmentation', columns, rows, right=range(2, 8))


def colours(num_classes: int) -> np.ndarray:
    """(num_classes, 3), 0 to 1."""
    palette = colormaps['tab20'].colors
    return np.array([palette[i % len(palette)] for i in range(num_classes)])


def _paint(mask: np.ndarray, num_classes: int) -> np.ndarray:
    """Class numbers to colours; everything else is black."""
    palette = np.concatenate([colours(num_classes), np.zeros((1, 3))])
    return palette[np.where((mask >= 0) & (mask < num_classes), mask, num_classes)]


def plot_predictions(
    path: Path,
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    predictions: Mapping[str, Sequence[np.ndarray]],
    classes: Sequence[str],
) -> None:
    """One row an image: the image, the truth, then each model's prediction; unlabelled pixels are black throughout.

    Args:
        path: of the PNG.
        images: uint8 (H, W, 3).
        truths: class numbers (H, W).
        predictions: by model, class numbers (H, W) an image.
        classes: their names.
    """
    titles = ['image', 'ground truth', *predictions]
    height, width = images[0].shape[:2]
    figure = Figure(figsize=(2.6 * len(titles), 2.6 * height / width * len(images) + 0.7), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(images), len(titles), squeeze=False)
    for row, (image, truth) in enumerate(zip(images, truths)):
        labelled = (truth >= 0) & (truth < len(classes))
        cells = [image, _paint(truth, len(classes))]
        cells += [_paint(np.where(labelled, p[row], -1), len(classes)) for p in predictions.values()]
        for axis, cell in zip(axes[row], cells):
            axis.imshow(cell, interpolation='nearest')
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    handles = [Patch(color=c, label=name) for c, name in zip(colours(len(classes)), classes)]
    figure.legend(handles=handles, loc='outside lower center', ncols=6, fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)


def save_mask(path: Path, mask: torch.Tensor) -> None:
    """Class numbers (H, W) as a PNG."""
    numbers = mask.cpu().numpy()
    Image.fromarray(numbers.astype(np.uint8 if numbers.max() < 256 else np.uint16)).save(path)

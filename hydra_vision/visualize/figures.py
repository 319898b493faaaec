"""What all pictures share: figures without a display, panels with axes, images as the model sees them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import FeatureError, first_line
from ..features import Backbone, Images
from ..images import READ_ERRORS
from ..io import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['caption', 'frame_patch', 'load_pictures', 'new_figure', 'save_figure', 'show']


def new_figure(rows: int, columns: int, title: str) -> tuple['Figure', Any]:
    """A figure that needs no display, and its axes (rows, columns); the more columns, the smaller they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = 3.6 if columns < 3 else 3.0 if columns < 6 else 2.2
    lines = title.count('\n') + 1
    figure = Figure(figsize=(0.8 + (side + 0.5) * columns, 0.3 * lines + (side + 0.7) * rows), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(rows, columns, squeeze=False)


def show(axes: 'Axes', picture: Any, title: str, unit: str, **kwargs: Any) -> Any:
    """Draw a picture (H, W) or (H, W, 3) with integer ticks; `unit` is 'px' or 'patch'."""
    from matplotlib.ticker import MaxNLocator

    shown = axes.imshow(torch.as_tensor(picture).numpy(), **{'interpolation': 'nearest', **kwargs})
    labels = ('x (px)', 'y (px)') if unit == 'px' else ('patch column', 'patch row')
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.set_title(title, fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return shown


def frame_patch(axes: 'Axes', patch: tuple[int, int], size: tuple[float, float] = (1, 1), color: str = 'lime') -> None:
    """Frame the patch (row, column), `size` (height, width) axis units large."""
    from matplotlib.patches import Rectangle

    corner = (patch[1] * size[1] - 0.5, patch[0] * size[0] - 0.5)
    axes.add_patch(Rectangle(corner, size[1], size[0], fill=False, edgecolor=color, linewidth=1.5))


def caption(images: Images, index: int) -> str:
    """'image 3', with its class where it has one."""
    return f'image {index}' + ('' if images.classes is None else f': {images.classes[index]}')


def load_pictures(backbone: Backbone, images: Images, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Whole images as the model's input, and as pictures.

    Args:
        backbone: Gives size, mean and deviation.
        images: The source.
        indices: Which images.

    Returns:
        Input (n, C, H, W) on the model's device, and the same pixels in 0..1 as (n, H, W, 3) on the CPU.

    Raises:
        FeatureError: An index that the source does not have, an image that cannot be read.
    """
    transform, tensors = backbone.transform(whole=True), []
    for index in indices:
        if not 0 <= index < len(images):
            raise FeatureError(f'image {index} is out of range; {images.name} has images 0 to {len(images) - 1}')
        try:
            with images.load(index) as image:
                tensors.append(transform(backbone.rules.apply(image)))
        except READ_ERRORS as error:
            raise FeatureError(f'{images.paths[index]} cannot be read: {first_line(error)}') from error
    x = torch.stack(tensors)
    mean, std = (torch.tensor(backbone.data[key]).reshape(-1, 1, 1) for key in ('mean', 'std'))
    pictures = (x * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    return x.to(next(backbone.model.parameters()).device), pictures.expand(*pictures.shape[:3], 3)


def save_figure(figure: 'Figure', path: Path, dpi: int = 100) -> None:
    """Write a PNG, whole or not at all.

    Raises:
        WriteError: It cannot be written.
    """
    write_atomically(path, lambda file: figure.savefig(file, dpi=dpi, format='png'))

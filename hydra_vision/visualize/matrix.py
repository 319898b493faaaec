"""Mixing matrices of a model on an image, and where in the image one patch looks.

Every mixer of the family says with `matrix(u)` which matrix M (B, H, L, L) it applies, y_i = sum_j M[i, j] x_j. Row i
of M, laid out on the patch grid, shows which patches the output of patch i is made of. M acts on the mixer's own
convolved and projected tokens: what happens before and after it is not in the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .figures import frame_patch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['BlockMatrix', 'draw_matrix', 'draw_row', 'find_mixers', 'mixing_matrices', 'plot_block']

_COLUMNS = 7  # panels next to each other
_MOST_HEADS = 27  # of one figure, with the image four rows of panels; a mixer may have a head a channel
_QUANTILE = 0.995  # of |M| off the diagonal is full colour: a few large entries would leave the rest white


@dataclass(frozen=True)
class BlockMatrix:
    """The matrices that one mixer applies to one image.

    Attributes:
        name: Name of the mixer's module.
        block: Its index among the model's mixers.
        matrix: (H, L, L), on the CPU, in the order in which the mixer sees the tokens.
        order: (L,) Position in that order of each prefix token, then of each patch in raster order.
        grid: Rows and columns of the patch grid.
    """

    name: str
    block: int
    matrix: Tensor
    order: Tensor
    grid: tuple[int, int]

    @property
    def num_prefix_tokens(self) -> int:
        return self.matrix.shape[-1] - self.grid[0] * self.grid[1]

    def position(self, row: int, column: int) -> int:
        """The token that holds the patch at (row, column).

        Raises:
            ValueError: Outside of the grid.
        """
        height, width = self.grid
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(
                f'patch = ({row}, {column}) is outside of the grid; allowed: rows 0 to {height - 1}, columns 0 to '
                f'{width - 1}'
            )
        return int(self.order[self.num_prefix_tokens + row * width + column])

    def row(self, row: int, column: int) -> Tensor:
        """What the patch at (row, column) takes from each patch: its row of M on the patch grid, (H, height, width)."""
        values = self.matrix[:, self.position(row, column)]
        return values[:, self.order[self.num_prefix_tokens :]].reshape(-1, *self.grid)


def find_mixers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of a model's mixers, in its order: the outermost modules that have `matrix(u)`."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f'{outer}.') for outer, _ in found)
        if not inside and callable(getattr(module, 'matrix', None)):
            found.append((name, module))
    return found


@torch.no_grad()
def mixing_matrices(
    model: nn.Module, image: Tensor, *, blocks: Sequence[int] | None = None, heads: Sequence[int] | None = None
) -> list[BlockMatrix]:
    """The matrices that a model's mixers apply to one image.

    Args:
        model: A Hydra-ViT, or a ViT-like timm model whose attention was swapped for a mixer. Left as it is; run in
            eval mode for meaningful pictures.
        image: (1, C, height, width), normalised as the model expects.
        blocks: Indices of the mixers, negative from the end; None for all.
        heads: Indices of the heads that are kept; None for all.

    Returns:
        One entry a mixer, in the order of `blocks`; O(heads * L^2) memory each.

    Raises:
        ValueError: No mixer with a matrix, an index outside of the model, an image that is not one image.
    """
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(f'image has shape {tuple(image.shape)}; needed is one image, (1, C, height, width)')
    mixers = find_mixers(model)
    if not mixers:
        raise ValueError(f'{type(model).__name__} has no mixer with a matrix(u) method')
    wanted = [_index('block', block, len(mixers)) for block in (range(len(mixers)) if blocks is None else blocks)]
    inputs: dict[int, tuple] = {}  # tokens, and the grid where the mixer needs it

    def keep(index: int):
        def hook(module: nn.Module, args: tuple) -> None:
            inputs[index] = args

        return hook

    hooks = [mixers[index][1].register_forward_pre_hook(keep(index)) for index in set(wanted)]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    grid = _patch_grid(model, image)
    results = {}
    for index in set(wanted):
        name, mixer = mixers[index]
        matrix = mixer.matrix(*inputs.pop(index))[0]
        if heads is not None:
            matrix = matrix[[_index('head', head, matrix.shape[0]) for head in heads]]
        order = _token_order(model, index, matrix.shape[-1], grid)
        results[index] = BlockMatrix(name, index, matrix.float().cpu(), order, grid)
    return [results[index] for index in wanted]


def _index(name: str, index: int, count: int) -> int:
    if not -count <= index < count:
        raise ValueError(f'{name}={index}; there are {count}: allowed are {-count} to {count - 1}')
    return index % count


def _patch_grid(model: nn.Module, image: Tensor) -> tuple[int, int]:
    embed = getattr(model, 'patch_embed', None)
    if embed is None or not hasattr(embed, 'dynamic_feat_size'):
        raise ValueError(f'{type(model).__name__} has no patch_embed of timm; its tokens have no known place')
    height, width = embed.dynamic_feat_size(tuple(image.shape[-2:]))
    return int(height), int(width)


def _token_order(model: nn.Module, block: int, length: int, grid: tuple[int, int]) -> Tensor:
    """(L,) Where prefix tokens and raster-ordered patches stand in the sequence that the mixers see."""
    prefix = length - grid[0] * grid[1]
    if prefix != getattr(model, 'num_prefix_tokens', 0):
        raise ValueError(f'the mixer sees {length} tokens, which are not {grid[0]} x {grid[1]} patches and its prefix')
    own = getattr(model, 'token_order', None)
    return torch.arange(length) if own is None else own(*grid, block)


def draw_matrix(axes: 'Axes', matrix: Tensor, title: str) -> None:
    """Draw one matrix (L, L): red adds, blue subtracts, white is zero. The scale leaves the diagonal out."""
    limit = _limit(matrix[~torch.eye(len(matrix), dtype=torch.bool)])
    picture = axes.imshow(matrix.numpy(), cmap='RdBu_r', vmin=-limit, vmax=limit, interpolation='nearest')
    axes.set(title=title, xlabel='input token j', ylabel='output token i')
    axes.figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.03)


def draw_row(axes: 'Axes', values: Tensor, patch: tuple[int, int], title: str) -> None:
    """Draw one row of M on the patch grid (height, width); a black frame marks the patch whose row it is.

    The scale leaves out what the patch takes from itself.
    """
    limit = _limit(_others(values, patch))
    picture = axes.imshow(values.numpy(), cmap='RdBu_r', vmin=-limit, vmax=limit, interpolation='nearest')
    frame_patch(axes, patch, color='black')
    axes.set(title=title, xlabel='patch column', ylabel='patch row')
    axes.figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.03)


def plot_block(
    block: BlockMatrix, picture: Tensor, patch: tuple[int, int], *, heads: Sequence[int] | None = None, title: str
) -> 'Figure':
    """One figure of one block: for every head its matrix, and below it the row of one patch on the patch grid.

    The first column shows the image with the patch framed, and the row's absolute values averaged over the heads. Of
    more than 27 heads the first 27 get their panels, and the title says so.

    Args:
        block: From `mixing_matrices`.
        picture: (height, width, 3) The image as the model sees it, values in 0..1.
        patch: Row and column of the patch on the grid.
        heads: The heads' numbers for the titles, where `mixing_matrices` kept only some.
        title: Of the figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = block.row(*patch)
    names = list(range(len(rows))) if heads is None else list(heads)
    shown_heads = min(len(rows), _MOST_HEADS)
    if shown_heads < len(rows):
        title = f'{title}\nthe first {shown_heads} of {len(rows)} heads'
    columns = min(_COLUMNS, shown_heads + 1)
    bands = -(-(shown_heads + 1) // columns)
    figure = Figure(figsize=(0.3 + 3.3 * columns, 0.6 + 6.0 * bands), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(2 * bands, columns, squeeze=False)

    height, width = picture.shape[0] / block.grid[0], picture.shape[1] / block.grid[1]
    axes[0][0].imshow(picture.numpy())
    frame_patch(axes[0][0], patch, (height, width))
    axes[0][0].set(title=f'patch at row {patch[0]}, column {patch[1]}', xlabel='x (px)', ylabel='y (px)')
    mean = rows.abs().mean(0)
    shown = axes[1][0].imshow(
        mean.numpy(), cmap='magma', vmin=0, vmax=_limit(_others(mean, patch)), interpolation='nearest'
    )
    frame_patch(axes[1][0], patch, color='white')
    axes[1][0].set(title='|row of M|, mean of the heads', xlabel='patch column', ylabel='patch row')
    figure.colorbar(shown, ax=axes[1][0], fraction=0.046, pad=0.03)
    for place in range(1, bands * columns):
        band, column = divmod(place, columns)
        upper, lower = axes[2 * band][column], axes[2 * band + 1][column]
        if place > shown_heads:
            upper.set_axis_off()
            lower.set_axis_off()
            continue
        head = place - 1
        draw_matrix(upper, block.matrix[head], f'head {names[head]}: M')
        draw_row(lower, rows[head], patch, f'head {names[head]}: row of the patch')
    for panel in axes.flat:
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure


def _others(values: Tensor, patch: tuple[int, int]) -> Tensor:
    """All of a map but the value at the patch itself."""
    keep = torch.ones_like(values, dtype=torch.bool)
    keep[patch] = False
    return values[keep]


def _limit(values: Tensor) -> float:
    """The largest value of a colour scale, above 0."""
    size = values.abs().flatten()
    if size.numel() == 0:  # a single patch has no others
        return 1.0
    rank = max(1, min(size.numel(), round(_QUANTILE * size.numel())))
    return float(size.kthvalue(rank).values) or float(size.max()) or 1.0

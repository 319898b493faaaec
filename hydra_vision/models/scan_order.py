"""Orders in which the patches of an image become a sequence. The paper scans by rows.

Each order follows from the size of the grid alone, so that a model with one of them takes any image size.
"""

from functools import lru_cache
from typing import Iterator, List, Tuple

import torch
from torch import Tensor

from ..ops.dispatch import is_exporting

__all__ = ['SCAN_ORDERS', 'block_order', 'raster_index', 'reorder']

# 'alternate' is 'row' in even blocks and 'column' in odd ones
SCAN_ORDERS = ('row', 'column', 'alternate', 'snake', 'hilbert')


def block_order(scan_order: str, block: int) -> str:
    """The order in which block number ``block`` of a model sees the patches."""
    if scan_order == 'alternate':
        return 'column' if block % 2 else 'row'
    return scan_order


def raster_index(order: str, height: int, width: int) -> List[int]:
    """Raster index (row * width + column) of the first, second, ... patch of an order.

    Args:
        order: 'row', 'column', 'snake' (rows, every second one from right to left) or 'hilbert' (a Hilbert curve
            generalised to any rectangle: neighbours in the sequence touch; one step is diagonal where no curve of
            edges exists).
        height: Rows of the grid.
        width: Columns of the grid.

    Raises:
        ValueError: another order.
    """
    if order == 'row':
        return list(range(height * width))
    if order == 'column':
        return [y * width + x for x in range(width) for y in range(height)]
    if order == 'snake':
        return [y * width + (x if y % 2 == 0 else width - 1 - x) for y in range(height) for x in range(width)]
    if order == 'hilbert':
        if width >= height:
            cells = _hilbert(0, 0, width, 0, 0, height)
        else:
            cells = _hilbert(0, 0, 0, height, width, 0)
        return [y * width + x for x, y in cells]
    raise ValueError(f'order={order!r}; allowed: row, column, snake, hilbert')


def _hilbert(x: int, y: int, ax: int, ay: int, bx: int, by: int) -> Iterator[Tuple[int, int]]:
    """Cells of the rectangle that starts in the corner (x, y) and is spanned by the axes a (major) and b.

    The recursion is that of Cerveny's generalised Hilbert curve, https://github.com/jakubcerveny/gilbert: a long
    rectangle is cut in two along a, another one into three, and every half is kept even where it can be.
    """
    w, h = abs(ax + ay), abs(bx + by)
    sax, say, sbx, sby = _sign(ax), _sign(ay), _sign(bx), _sign(by)
    if h == 1:
        for k in range(w):
            yield x + k * sax, y + k * say
        return
    if w == 1:
        for k in range(h):
            yield x + k * sbx, y + k * sby
        return
    ax2, ay2, bx2, by2 = ax // 2, ay // 2, bx // 2, by // 2
    if 2 * w > 3 * h:
        if abs(ax2 + ay2) % 2 and w > 2:
            ax2, ay2 = ax2 + sax, ay2 + say
        yield from _hilbert(x, y, ax2, ay2, bx, by)
        yield from _hilbert(x + ax2, y + ay2, ax - ax2, ay - ay2, bx, by)
        return
    if abs(bx2 + by2) % 2 and h > 2:
        bx2, by2 = bx2 + sbx, by2 + sby
    yield from _hilbert(x, y, bx2, by2, ax2, ay2)
    yield from _hilbert(x + bx2, y + by2, ax, ay, bx - bx2, by - by2)
    yield from _hilbert(
        x + (ax - sax) + (bx2 - sbx), y + (ay - say) + (by2 - sby), -bx2, -by2, -(ax - ax2), -(ay - ay2)
    )


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


def reorder(x: Tensor, height: int, width: int, source: str, target: str, class_index: int) -> Tensor:
    """Bring a sequence from one order to another.

    Args:
        x: (B, L, C) The patches of a height x width grid and, where there is one, a class token.
        height: Rows of the grid.
        width: Columns of the grid.
        source: Order of ``x``.
        target: Order of the result.
        class_index: Where the class token stands before and after; -1 without one.
    """
    if torch.jit.is_scripting():  # an operator, which can be saved
        y: Tensor = torch.ops.hydra_vision.reorder_scripted(x, height, width, source, target, class_index)
        return y
    else:
        return _reorder(x, height, width, source, target, class_index)


@torch.jit.ignore
def _reorder(x: Tensor, height: int, width: int, source: str, target: str, class_index: int) -> Tensor:
    if source == target:
        return x
    if torch.jit.is_tracing():  # sizes are tensors there, and a trace with a Python function cannot be saved
        index, _ = _indices(int(height), int(width), source, target, int(class_index), x.device)
        return x.index_select(1, index)
    symbols = isinstance(height, torch.SymInt) or isinstance(width, torch.SymInt)
    if symbols and is_exporting() and 'hilbert' not in (source, target):
        tokens = torch.arange(x.shape[1], device=x.device)
        return x.index_select(1, _computed(tokens, height, width, source, target, class_index))
    if symbols or torch.compiler.is_dynamo_compiling():  # sizes that may change: one operator in the graph
        index, inverse = _scan_indices(x, height, width, source, target, class_index)
    else:
        index, inverse = _indices(height, width, source, target, class_index, x.device)
    return _Permute.apply(x, index, inverse)


if not hasattr(torch.ops.hydra_vision, 'reorder_scripted'):  # a second import keeps the operator of the first
    _LIBRARY = torch.library.Library('hydra_vision', 'FRAGMENT')
    _LIBRARY.define(
        'reorder_scripted(Tensor x, int height, int width, str source, str target, int class_index) -> Tensor'
    )
    _LIBRARY.impl('reorder_scripted', _reorder, 'CompositeImplicitAutograd')


class _Permute(torch.autograd.Function):
    """Gather forward, gather backward: autograd would add into zeros at random places."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(1, index)

    @staticmethod
    def setup_context(ctx, inputs: Tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(1, inverse), None, None


def _computed(tokens: Tensor, height: int, width: int, source: str, target: str, class_index: int) -> Tensor:
    """``_positions`` of tokens 0, 1, ... as arithmetic: a graph for every grid, without a custom operator."""

    def snake(t: Tensor) -> Tensor:  # from place to cell, and from cell to place
        y = t // width
        return torch.where(y % 2 == 0, t, (2 * y + 1) * width - 1 - t)

    def transposed(t: Tensor, height: int, width: int) -> Tensor:
        x = t // height
        return (t - x * height) * width + x  # t % height, which the ONNX exporter takes of constants only

    t = tokens if class_index == -1 else tokens - (tokens > class_index).long()
    if target != 'row':
        t = snake(t) if target == 'snake' else transposed(t, height, width)
    if source != 'row':
        t = snake(t) if source == 'snake' else transposed(t, width, height)
    if class_index == -1:
        return t
    return torch.where(tokens == class_index, tokens, t + (t >= class_index).long())


@lru_cache(maxsize=256)
def _positions(height: int, width: int, source: str, target: str, class_index: int) -> List[int]:
    """Where in the source order each token of the target order stands."""
    place = {cell: t for t, cell in enumerate(raster_index(source, height, width))}
    patches = [place[cell] for cell in raster_index(target, height, width)]
    if class_index < 0:
        return patches
    shifted = [t + (t >= class_index) for t in patches]
    return [*shifted[:class_index], class_index, *shifted[class_index:]]


_CACHE: dict = {}  # on a device, a copy for each forward pass would wait for the device


def _indices(
    height: int, width: int, source: str, target: str, class_index: int, device: torch.device
) -> Tuple[Tensor, Tensor]:
    key = (height, width, source, target, class_index, device)
    tracing = torch.jit.is_tracing()  # a trace is checked against a second one: both must make their own
    found = None if tracing else _CACHE.get(key)
    if found is None:
        with torch.inference_mode(False):  # kept for training passes too
            found = tuple(
                torch.tensor(_positions(height, width, *orders, class_index), device=device)
                for orders in ((source, target), (target, source))
            )
        if tracing or type(found[0]) is not Tensor:  # a tracer's stand-in
            return found
        if len(_CACHE) >= 256:
            _CACHE.clear()
        _CACHE[key] = found
    return found


@torch.library.custom_op('hydra_vision::scan_indices', mutates_args=())
def _scan_indices(
    x: Tensor, height: int, width: int, source: str, target: str, class_index: int
) -> Tuple[Tensor, Tensor]:
    index, inverse = _indices(height, width, source, target, class_index, x.device)
    return index.clone(), inverse.clone()


@_scan_indices.register_fake
def _(x: Tensor, height: int, width: int, source: str, target: str, class_index: int) -> Tuple[Tensor, Tensor]:
    length = x.shape[1]
    return x.new_empty(length, dtype=torch.long), x.new_empty(length, dtype=torch.long)

"""Sparse attention without training: trained timm ViTs that keep every weight and attend to fewer keys.

HiP: Lee et al., "A Training-free Sub-quadratic Cost Transformer Model Serving Framework With Hierarchically Pruned
Attention", ICLR 2025, https://arxiv.org/abs/2406.09827, written for language models, whose attention is causal.
Neighbouring keys have similar scores, so that one block of keys speaks for a range of them: a beam search over a binary
tree of key blocks finds, for each block of queries, the blocks with about the largest scores, and exact attention runs
on them.

Ours, not the paper's, is what images need: no causal mask; class and register tokens attend to everything and
everything attends to them; a block of queries attends to its own patches; and patches are taken along a Hilbert curve,
which keeps neighbours in the image neighbours in the sequence. Rotary embeddings and norms of q and k come before the
product and stay.

The attention over the chosen keys is plain PyTorch on any device, or FlexAttention with a block mask, whose blocks are
far larger than the paper's. No speed is promised at the numbers of tokens that images have. What a model loses
by it depends on how peaked its attention is: `agreement` measures it.

MonarchAttention, the second method, keeps every key and gives the weights a structure instead: see
``hydra_vision.ops.monarch_attention``.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Callable, Iterator, Optional, Sequence, Union

import timm.layers
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .errors import nearest
from .models.scan_order import raster_index
from .ops.monarch_attention import monarch_attention

__all__ = ['HipSettings', 'MonarchSettings', 'SparseAttention', 'agreement', 'select_key_blocks', 'sparsify_attention']

_ATTENTIONS = (timm.layers.Attention, timm.layers.AttentionRope, BeitAttention, EvaAttention)
_GATHERED = 1 << 24  # numbers gathered at once: query blocks are taken a few at a time


@dataclass(frozen=True)
class HipSettings:
    """How HiP chooses keys; the paper's defaults where it has them.

    Attributes:
        keys: Keys that each block of queries attends to, found by the tree; a multiple of ``key_block``.
        query_block: Queries that share their keys.
        query_stride: Every which query of a block scores the keys.
        key_block: Keys that are taken or left together.
        key_stride: Every which key of a block is scored.
        window: Whether a block of queries also attends to its own patches (ours).
        order: Order of the patches before the search, 'hilbert' (ours) or 'row'.
        kernel: 'gather' (PyTorch on gathered keys) or 'flex' (FlexAttention, compiled on CUDA; ``key_block`` a multiple
            of 128 and ``query_block`` one of ``key_block``).

    Raises:
        ValueError: A number below 1, ``keys`` that are no multiple of ``key_block``, a stride above its block, an
            unknown order or kernel, blocks that the kernel does not take.
    """

    keys: int = 512
    query_block: int = 64
    query_stride: int = 2
    key_block: int = 2
    key_stride: int = 1
    window: bool = True
    order: str = 'hilbert'
    kernel: str = 'gather'

    def __post_init__(self) -> None:
        for name in ('keys', 'query_block', 'query_stride', 'key_block', 'key_stride'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}; it must be at least 1')
        if self.keys % self.key_block:
            raise ValueError(f'keys={self.keys}; it must be a multiple of key_block={self.key_block}')
        for kind in ('query', 'key'):
            stride, block = getattr(self, f'{kind}_stride'), getattr(self, f'{kind}_block')
            if stride > block:
                raise ValueError(f'{kind}_stride={stride}; it must be at most {kind}_block={block}')
        if self.order not in ('hilbert', 'row'):
            raise ValueError(f"order={self.order!r}; allowed: 'hilbert', 'row'")
        if self.kernel not in ('gather', 'flex'):
            raise ValueError(f"kernel={self.kernel!r}; allowed: 'gather', 'flex'")
        if self.kernel == 'flex' and (self.key_block % 128 or self.query_block % self.key_block):
            raise ValueError(
                f"key_block={self.key_block}, query_block={self.query_block}: kernel='flex' takes a key_block that is "
                'a multiple of 128 and a query_block that is one of key_block'
            )


@dataclass(frozen=True)
class MonarchSettings:
    """The structure of MonarchAttention.

    Attributes:
        block: Patches of a block; None for the columns of the model's grid, so that a block is a row of patches.
        steps: Updates of the two factors (the paper: 1 to 3 for ViTs).

    Raises:
        ValueError: A number below 1.
    """

    block: Optional[int] = None
    steps: int = 1

    def __post_init__(self) -> None:
        for name in ('block', 'steps'):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f'{name}={value}; it must be at least 1')


Settings = Union[HipSettings, MonarchSettings]


class SparseAttention:
    """Handle of a model whose attention is sparse. A context manager: leaving it restores the model.

    Attributes:
        model: The model.
        settings: Those of the method.
        names: Names of the sparse attention modules.
    """

    def __init__(self, model: nn.Module, settings: Settings, modules: dict[str, nn.Module]) -> None:
        self.model, self.settings, self.names = model, settings, tuple(modules)
        self._modules = modules

    def restore(self) -> nn.Module:
        """The model with its dense attention."""
        for module in self._modules.values():
            if isinstance(module, _OwnProduct):
                _uninstall(module)
        return self.model

    def __enter__(self) -> 'SparseAttention':
        return self

    def __exit__(self, *error: Any) -> None:
        self.restore()


def sparsify_attention(
    model: nn.Module, method: str = 'hip', blocks: Optional[Sequence[int]] = None, **settings: Any
) -> SparseAttention:
    """Replace the product softmax(q k^T) v in a trained timm ViT by sparse attention, keeping every weight.

    Works on the token attentions of timm's vit, deit3, dinov2, dinov3 and eva models. Class and register tokens, first
    in the sequence, stay dense. Inference only. The state dict keeps its names.

    Args:
        model: The model; changed in place.
        method: 'hip', or 'monarch' for MonarchAttention.
        blocks: Which of the attention modules, in the model's order, negative from the end; None for all. The authors
            keep the first three or four dense.
        **settings: Fields of ``HipSettings`` or ``MonarchSettings``.

    Returns:
        A handle, with ``restore()``.

    Raises:
        ValueError: An unknown method, no attention that can be sparse, an index that does not exist, relative position
            biases, a setting that is not allowed.
        TypeError: A setting that does not exist.
    """
    if method not in _METHODS:
        raise ValueError(f'method={method!r}; allowed: {", ".join(map(repr, _METHODS))}')
    kind, product = _METHODS[method]
    fields = kind.__dataclass_fields__
    for name in settings:
        if name not in fields:
            raise TypeError(f'no setting {name!r}{nearest(name, fields)}; there are: {", ".join(fields)}')
    chosen = kind(**settings)
    found = [(name, module) for name, module in model.named_modules() if type(module) in _ATTENTIONS]
    if not found:
        raise ValueError(
            f"model={type(model).__name__}: no attention that can be sparse; supported are timm's Attention, "
            'AttentionRope, EvaAttention and BeitAttention'
        )
    wanted = range(len(found)) if blocks is None else blocks
    for block in wanted:
        if not -len(found) <= block < len(found):
            raise ValueError(f'blocks={list(wanted)}: there are {len(found)} attention modules')
    modules = dict(found[block] for block in wanted)
    tables = ('relative_position_bias_table', 'rel_pos')
    biased = any(getattr(module, table, None) is not None for module in modules.values() for table in tables)
    if biased or any(getattr(model, name, None) is not None for name in ('rel_pos_bias', 'shared_rel_pos')):
        raise ValueError(f'model={type(model).__name__}: its attention has relative position biases')
    for module in modules.values():
        _install(module, product(model, chosen))
    return SparseAttention(model, chosen, modules)


class _OwnProduct:
    """In front of an attention's class: a product of our own instead of ``scaled_dot_product_attention``."""

    def forward(self, *args, **kwargs) -> Tensor:
        with self._product:
            return super().forward(*args, **kwargs)


def _install(module: nn.Module, product: '_Product') -> None:
    """The module's parameters, names and hooks stay: only its class gets a forward in front."""
    module._was_fused, module.fused_attn = module.fused_attn, True
    module._product = product
    cls = type(module)
    module.__class__ = type(f'Sparse{cls.__name__}', (_OwnProduct, cls), {})


def _uninstall(module: nn.Module) -> None:
    module.__class__ = type(module).__mro__[2]
    module.fused_attn = module.__dict__.pop('_was_fused')
    del module._product


class _Product(TorchFunctionMode):
    """Gives q, k and v of every ``scaled_dot_product_attention`` to ``compute``."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ('query', 'key', 'value', 'attn_mask', 'dropout_p', 'is_causal')
        given = {**dict(zip(names, args)), **kwargs}
        return self.compute(**given)

    def compute(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        raise NotImplementedError


class _SparseProduct(_Product):
    """Sparse attention instead of the dense one."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def compute(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if options.get('attn_mask') is not None or options.get('is_causal') or options.get('dropout_p'):
            raise ValueError('attn_mask, is_causal and dropout: sparse attention has none of them')
        if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
            raise RuntimeError('sparse attention is for inference: call the model under torch.no_grad()')
        scale = options.get('scale')
        if scale is not None:
            query = query * (scale * query.shape[-1] ** 0.5)
        return self.attend(query, key, value, getattr(self.model, 'num_prefix_tokens', 0))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, prefix: int) -> Tensor:
        raise NotImplementedError


class _HipProduct(_SparseProduct):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, prefix: int) -> Tensor:
        order = patch_order(self.model, q.shape[2] - prefix, self.settings, q.device)
        return hip_attention(q, k, v, self.settings, prefix, order)


class _MonarchProduct(_SparseProduct):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, prefix: int) -> Tensor:
        block = self.settings.block or _grid(self.model, q.shape[2] - prefix, 'set block')[1]
        return monarch_attention(q, k, v, block, self.settings.steps, prefix)


_METHODS = {'hip': (HipSettings, _HipProduct), 'monarch': (MonarchSettings, _MonarchProduct)}


def _grid(model: nn.Module, patches: int, remedy: str) -> tuple[int, int]:
    """Rows and columns of the patches: the model's, or a square.

    Raises:
        ValueError: Patches of no known grid.
    """
    grid = tuple(getattr(getattr(model, 'patch_embed', None), 'grid_size', None) or (0, 0))
    if grid[0] * grid[1] != patches:
        side = round(patches**0.5)
        grid = (side, side)
    if grid[0] * grid[1] != patches:
        raise ValueError(f"{patches} patches are not the model's grid and no square; {remedy}")
    return grid


def patch_order(model: nn.Module, patches: int, settings: HipSettings, device: torch.device) -> Optional[Tensor]:
    """(patches,) Index of the first, second, ... patch of the order; None for rows.

    Raises:
        ValueError: Patches of no known grid.
    """
    if settings.order == 'row':
        return None
    grid = _grid(model, patches, "order='hilbert' needs one: set order='row'")
    return torch.tensor(raster_index('hilbert', *grid), device=device)


def hip_attention(
    q: Tensor, k: Tensor, v: Tensor, settings: HipSettings, num_prefix_tokens: int = 0, order: Optional[Tensor] = None
) -> Tensor:
    """Attention of each block of queries to prefix tokens, its own patches and the keys that the tree finds.

    Args:
        q: (B, H, L, P).
        k: (B, H, L, P).
        v: (B, H, L, P).
        settings: How keys are chosen.
        num_prefix_tokens: Tokens at the start that are dense.
        order: (patches,) Patches in the order of the search, or None.

    Returns:
        (B, H, L, P).
    """
    n = num_prefix_tokens
    patches = q.shape[2] - n
    if patches <= settings.keys:
        return F.scaled_dot_product_attention(q, k, v)
    dense = F.scaled_dot_product_attention(q[:, :, :n], k, v)
    qs, ks, vs = (t[:, :, n:] if order is None else t[:, :, n:].index_select(2, order) for t in (q, k, v))
    y = (_flex if settings.kernel == 'flex' else _gathered)(qs, ks, vs, k[:, :, :n], v[:, :, :n], settings)
    if order is not None:
        y = torch.empty_like(y).index_copy_(2, order, y)
    return torch.cat([dense, y], 2)


def _gathered(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, settings: HipSettings) -> Tensor:
    """(B, H, L, P) of the patches, in the order of the search."""
    parts, n, patches = [], k_prefix.shape[2], q.shape[2]
    for part, chosen in _selected(q, k, settings):
        index, valid = _key_index(chosen, part, patches, settings)
        rows = _query_rows(q, part, settings)  # (B, H, blocks, b_q, P)
        size = rows.shape[:3]
        keys, values = (
            torch.cat([first.unsqueeze(2).expand(*size, -1, -1), _gather(t, index)], 3)
            for first, t in ((k_prefix, k), (v_prefix, v))
        )
        mask = F.pad(valid, (n, 0), value=True).unsqueeze(-2)
        rows, keys, values, mask = (t.flatten(0, 2) for t in (rows, keys, values, mask))
        y = F.scaled_dot_product_attention(rows, keys, values, mask)
        parts.append(y.unflatten(0, size).flatten(2, 3))
    return torch.cat(parts, 2)[:, :, :patches]


@cache
def _flex_attention(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


def _flex(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, settings: HipSettings) -> Tensor:
    """As ``_gathered``: the patches' keys in whole blocks, behind them a block of the prefix tokens that all see."""
    from torch.nn.attention.flex_attention import BlockMask

    b_q, b_k = settings.query_block, settings.key_block
    L, n = q.shape[2], k_prefix.shape[2]
    blocks, padded = -(-L // b_k), -(-L // b_k) * b_k
    chosen = select_key_blocks(q, k, settings)  # (B, H, blocks of queries, m)
    seen = torch.zeros(*chosen.shape[:3], blocks + -(-n // b_k), dtype=torch.bool, device=q.device)
    seen.scatter_(-1, chosen, True)
    seen[..., blocks:] = True
    if settings.window:
        column, row = (torch.arange(size, device=q.device) for size in (blocks, seen.shape[2]))
        seen[..., :blocks] |= column // (b_q // b_k) == row.unsqueeze(-1)
    there = torch.arange(seen.shape[-1] * b_k, device=q.device)
    there = (there < L) | ((there >= padded) & (there < padded + n))
    whole = there.unflatten(0, (-1, b_k)).all(-1)  # blocks without padding, for which the mask is not asked

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Number of blocks, and their indices in front."""
        return blocks.sum(-1, dtype=torch.int32), blocks.byte().argsort(dim=-1, descending=True, stable=True).int()

    mask = BlockMask.from_kv_blocks(
        *listed(seen & ~whole),
        *listed(seen & whole),
        BLOCK_SIZE=(b_q, b_k),
        mask_mod=lambda b, h, i, j: seen[b, h, i // b_q, j // b_k] & there[j],
        seq_lengths=(seen.shape[2] * b_q, seen.shape[3] * b_k),
    )
    keys, values = (
        torch.cat([F.pad(t, (0, 0, 0, padded - L)), F.pad(first, (0, 0, 0, -n % b_k))], 2)
        for t, first in ((k, k_prefix), (v, v_prefix))
    )
    queries = F.pad(q, (0, 0, 0, -L % b_q))
    return _flex_attention(q.device.type == 'cuda')(queries, keys, values, block_mask=mask)[:, :, :L]


def select_key_blocks(q: Tensor, k: Tensor, settings: HipSettings) -> Tensor:
    """The key blocks that the tree search finds for each block of queries.

    With n key blocks and m = keys / key_block of them to keep: m ranges of blocks, edges i n // m. Until every range is
    one block, split each in the middle and keep the m children whose representative, their middle block, has the
    largest product of a sampled query and a sampled key.

    Args:
        q: (B, H, L, P) Queries, in the order of the search.
        k: (B, H, L, P) Keys likewise.
        settings: How keys are chosen.

    Returns:
        (B, H, blocks of queries, m) indices of key blocks, or all of them where there are at most m.
    """
    return torch.cat([chosen for _, chosen in _selected(q, k, settings)], 2)


def _selected(q: Tensor, k: Tensor, settings: HipSettings) -> Iterator[tuple[slice, Tensor]]:
    """Some blocks of queries and the key blocks that the tree finds for them, until all have been."""
    B, H, L, P = q.shape
    b_k = settings.key_block
    blocks, n, m = -(-q.shape[2] // settings.query_block), -(-k.shape[2] // b_k), settings.keys // b_k
    scored = -(-b_k // settings.key_stride)
    step = max(1, _GATHERED // (B * H * P * max(2 * m * scored, settings.keys + settings.query_block)))
    offsets = torch.arange(0, b_k, settings.key_stride, device=q.device)
    for first in range(0, blocks, step):
        part = slice(first, min(first + step, blocks))
        shape = (B, H, part.stop - part.start, -1)
        if n <= m:
            yield part, torch.arange(n, device=q.device).expand(*shape[:3], n)
            continue
        rows = _query_rows(q, part, settings)[..., settings.query_stride - 1 :: settings.query_stride, :]
        edges = torch.arange(m + 1, device=q.device) * n // m
        low, high = (t.expand(*shape[:3], m) for t in (edges[:-1], edges[1:]))
        size = -(-n // m)
        while size > 1:
            middle = low + (high - low) // 2
            low, high = torch.cat([low, middle], -1), torch.cat([middle, high], -1)
            index = (low + (high - low) // 2).unsqueeze(-1) * b_k + offsets  # (B, H, blocks, 2 m, keys of a block)
            there = index < k.shape[2]
            keys = _gather(k, index.clamp(max=k.shape[2] - 1).flatten(-2))
            score = (rows @ keys.mT).amax(-2).unflatten(-1, index.shape[-2:])
            score = score.masked_fill(~there, float('-inf')).amax(-1).masked_fill(low == high, float('-inf'))
            best = score.topk(m, dim=-1).indices
            low, high = low.gather(-1, best), high.gather(-1, best)
            size = -(-size // 2)
        yield part, low


def _query_rows(q: Tensor, part: slice, settings: HipSettings) -> Tensor:
    """(B, H, blocks, b_q, P) of some blocks of queries; behind the last query it is repeated."""
    b_q = settings.query_block
    index = torch.arange(part.start * b_q, part.stop * b_q, device=q.device).clamp(max=q.shape[2] - 1)
    return q.index_select(2, index).unflatten(2, (-1, b_q))


def _key_index(chosen: Tensor, part: slice, L: int, settings: HipSettings) -> tuple[Tensor, Tensor]:
    """Keys (B, H, blocks, keys) of the chosen blocks and of the queries' own patches, and which of them count.

    A chosen key that is one of the own patches counts once.
    """
    b_q, b_k = settings.query_block, settings.key_block
    index = (chosen.unsqueeze(-1) * b_k + torch.arange(b_k, device=chosen.device)).flatten(-2)
    valid = index < L
    if settings.window:
        blocks = torch.arange(part.start, part.stop, device=chosen.device).unsqueeze(-1)
        valid = valid & (index // b_q != blocks)
        own = (blocks * b_q + torch.arange(b_q, device=chosen.device)).expand(*chosen.shape[:3], b_q)
        index, valid = torch.cat([own, index], -1), torch.cat([own < L, valid], -1)
    return index.clamp(max=L - 1), valid


def _gather(t: Tensor, index: Tensor) -> Tensor:
    """Rows (B, H, blocks, n, P) of t (B, H, L, P) at index (B, H, blocks, n)."""
    rows = t.gather(2, index.flatten(2).unsqueeze(-1).expand(-1, -1, -1, t.shape[-1]))
    return rows.unflatten(2, index.shape[2:])


@torch.no_grad()
def agreement(
    model: nn.Module,
    images: Tensor,
    labels: Optional[Tensor] = None,
    method: str = 'hip',
    blocks: Optional[Sequence[int]] = None,
    **settings: Any,
) -> dict[str, Any]:
    """What sparse attention changes in a dense model, on images.

    Per attention module, on the inputs that the dense model has there: `error`, |y_sparse - y| / |y|; of HiP also
    `recall`, the mean over patch queries of the dense weights on the keys that are attended to; `oracle`, the same of
    as many blocks with the largest weights of a block of queries; `random`, of as many random blocks (both with the
    same prefix tokens and own patches). Of the whole model: `top1_agreement`, `logit_difference` (mean absolute), `kl`
    (of the sparse from the dense prediction, nats), `cosine` of the logits; with labels `top1_dense` and `top1_sparse`.

    Args:
        model: A dense model with a classifier, in eval mode.
        images: (B, C, H, W).
        labels: (B,) Classes, or None.
        method: As in ``sparsify_attention``.
        blocks: As in ``sparsify_attention``.
        **settings: As in ``sparsify_attention``.

    Returns:
        `layers`, a list of dicts with `name` and the numbers above, and the model's numbers.

    Raises:
        ValueError: As ``sparsify_attention``.
        TypeError: As ``sparsify_attention``.
    """
    with sparsify_attention(model, method, blocks, **settings) as handle:
        sparse = model(images).float()
    meters = {name: _Meter(_METHODS[method][1](model, handle.settings)) for name in handle.names}
    for name, meter in meters.items():
        _install(model.get_submodule(name), meter)
    try:
        dense = model(images).float()
    finally:
        for name in meters:
            _uninstall(model.get_submodule(name))
    kl = F.kl_div(sparse.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction='batchmean')
    found = {
        'layers': [{'name': name, **meter.found} for name, meter in meters.items()],
        'top1_agreement': (dense.argmax(-1) == sparse.argmax(-1)).float().mean().item(),
        'logit_difference': (dense - sparse).abs().mean().item(),
        'kl': kl.item(),
        'cosine': F.cosine_similarity(dense, sparse, dim=-1).mean().item(),
    }
    if labels is not None:
        for name, logits in (('top1_dense', dense), ('top1_sparse', sparse)):
            found[name] = (logits.argmax(-1) == labels).float().mean().item()
    return found


class _Meter(_Product):
    """Dense attention, and what a sparse one would have found in its place."""

    def __init__(self, sparse: _SparseProduct) -> None:
        super().__init__()
        self.sparse = sparse
        self.found: dict[str, float] = {}

    def compute(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        dense = F.scaled_dot_product_attention(query, key, value, **options)
        sparse = self.sparse.compute(query, key, value, **options)
        self.found = {'error': ((sparse - dense).norm() / dense.norm()).item()}
        settings, model = self.sparse.settings, self.sparse.model
        if isinstance(settings, HipSettings):
            n = getattr(model, 'num_prefix_tokens', 0)
            order = patch_order(model, query.shape[2] - n, settings, query.device)
            self.found.update(_recall(query, key, settings, n, order))
        return dense


def _recall(q: Tensor, k: Tensor, settings: HipSettings, n: int, order: Optional[Tensor]) -> dict[str, float]:
    """Mean dense weight of patch queries on the keys that are attended to: found, best and random blocks."""
    qs, ks = (t[:, :, n:] if order is None else t[:, :, n:].index_select(2, order) for t in (q, k))
    L, b_q, b_k = qs.shape[2], settings.query_block, settings.key_block
    if settings.keys >= L:
        return {'recall': 1.0, 'oracle': 1.0, 'random': 1.0}
    chosen, m = select_key_blocks(qs, ks, settings), settings.keys // b_k
    generator = torch.Generator().manual_seed(0)
    sums = {'recall': 0.0, 'oracle': 0.0, 'random': 0.0}
    for block in range(chosen.shape[2]):
        rows = qs[:, :, block * b_q : (block + 1) * b_q]
        scores = rows.float() @ torch.cat([k[:, :, :n], ks], 2).float().mT * q.shape[-1] ** -0.5
        weights = scores.softmax(-1).sum(2)  # (B, H, n + L), of all queries of the block
        always, free = weights[..., :n].sum(-1), weights[..., n:].clone()
        if settings.window:
            own = slice(block * b_q, (block + 1) * b_q)
            always = always + free[..., own].sum(-1)
            free[..., own] = 0
        per_block = F.pad(free, (0, -L % b_k)).unflatten(-1, (-1, b_k)).sum(-1)
        guess = torch.rand(per_block.shape, generator=generator).topk(m, dim=-1).indices.to(q.device)
        for name, index in (('recall', chosen[:, :, block]), ('oracle', per_block.topk(m).indices), ('random', guess)):
            sums[name] += (always + per_block.gather(-1, index).sum(-1)).sum().item()
    queries = qs.shape[0] * qs.shape[1] * L
    return {name: total / queries for name, total in sums.items()}

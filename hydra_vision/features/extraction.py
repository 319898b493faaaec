"""Extraction: images through a model into a file, in constant memory, resumable."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from ..device import AMP_NAMES, amp_dtype, pick_device, worker_count
from ..errors import DataError, FeatureError, WriteError, first_line, require
from ..images import READ_ERRORS
from ..io import check_output
from .backbone import Backbone, Size, load_backbone
from .files import FORMATS, Features, FeatureWriter, load_features, only_writer
from .pooling import POOLS, check_layers, image_features
from .sources import Images, open_images, sample_digest

__all__ = ['extract', 'feature_batches']

_DTYPES = ('float32', 'float16')
_AMP = {None: 'none', torch.bfloat16: 'bf16', torch.float16: 'fp16'}


def extract(
    images: Any,
    out: str | Path,
    *,
    model: str | nn.Module | Backbone | None = None,
    checkpoint: str | Path | None = None,
    random_init: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    img_size: Size | None = None,
    pool: str = 'avg',
    layers: Sequence[int] | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = 'auto',
    amp: str = 'auto',
    dtype: str = 'float32',
    max_unreadable: int = 10,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Write the features of images to a file, and open it.

    Next to `out` appear `out.csv`, a line per image with its row or the reason why it has none, and `out.json`, the
    metadata: how the features were made. Meanwhile, rows are in shards in the folder `out.partial`: the
    same call continues an interrupted one after the last shard (at most ten seconds of work), and no second process may
    write the same file (`out.lock`). Memory holds a batch of images, a shard of rows and the list of names; the disk
    holds the rows twice while the shards are joined.

    Args:
        images: As in `open_images`: a folder, .tar, .txt list, data set.
        out: File that ends in .npy, .safetensors or .parquet.
        model: Name of a timm model; or a model in eval mode, where it is. The following six are for the name.
        checkpoint: Run or file of weights.
        random_init: Untrained weights.
        model_kwargs: Further arguments of `timm.create_model`.
        data: Replaces entries of the data config.
        img_size: Side or (H, W).
        pool: A key of `POOLS`.
        layers: Indices of layers, joined along D in ascending order (`Features.layer` takes them apart); None for the
            final features.
        batch_size: Images at a time.
        workers: Loader processes; None for one per core, at most 16.
        device: 'auto', 'cpu', 'cuda', ...
        amp: Autocast: 'auto' (bf16 on CUDA, else none), 'none', 'bf16', 'fp16'.
        dtype: Of the rows: 'float32' or 'float16'.
        max_unreadable: Images that may be skipped; one more ends the work (what is done is kept).
        overwrite: Replace `out` where it was made in another way, instead of raising.
        on_progress: Called with (images done, of how many).

    Raises:
        UserError: Anything that does not fit, before the first image is read; `out` made from another model, other
            settings or other images (`FeatureError`); too many unreadable images (`DataError`); a full disk
            (`WriteError`).
        MissingExtraError: .parquet without pyarrow.
    """
    target = check_output(out, FORMATS, overwrite=True, name='out')  # what is there is compared below
    if target.suffix == '.parquet':
        require('pyarrow', 'eval')
    for name, value, allowed in (('pool', pool, POOLS), ('dtype', dtype, _DTYPES), ('amp', amp, AMP_NAMES)):
        if value not in allowed:
            raise FeatureError(f'{name}={value!r}; allowed: {", ".join(allowed)}')
    workers = worker_count(workers)
    for name, value, low in (('batch_size', batch_size, 1), ('max_unreadable', max_unreadable, 0)):
        if value < low:
            raise FeatureError(f'{name}={value}; it must be at least {low}')
    source = open_images(images)
    if isinstance(model, nn.Module):
        model = Backbone.of(model)
    if isinstance(model, Backbone):
        given = dict(checkpoint=checkpoint, model_kwargs=model_kwargs, data=data, img_size=img_size)
        given = [key for key, value in given.items() if value is not None] + ['random_init'] * random_init
        if given:
            raise FeatureError(f'{", ".join(given)}: a loaded model is taken as it is')
        here = next(model.model.parameters()).device
        if device != 'auto' and pick_device(device).type != here.type:
            raise FeatureError(f'device={device!r}, but the model is on {here}: a loaded model is taken as it is')
        backbone = model
    else:
        backbone = load_backbone(
            model,
            checkpoint=checkpoint,
            random_init=random_init,
            model_kwargs=model_kwargs,
            data=data,
            img_size=img_size,
            device=device,
        )
    layers = check_layers(backbone.model, layers)
    shape, widths = _row_shape(backbone, pool, layers)
    card = {
        **backbone.card(),
        'pool': pool,
        'layers': None if layers is None else list(layers),
        'widths': widths,
        'shape': list(shape),
        'dtype': dtype,
        'amp': _AMP[amp_dtype(amp, next(backbone.model.parameters()).device)],
        'images': source.name,
        'count': len(source),
        'sample': sample_digest(source),
        'labelled': source.classes is not None,
    }
    with only_writer(target):
        writer = FeatureWriter(target, source, card)
        try:
            if writer.open(overwrite):
                _write(writer, backbone, batch_size, workers, max_unreadable, on_progress)
        except (WriteError, OSError) as error:  # images that cannot be read never come this far
            why = first_line(error) if isinstance(error, WriteError) else error.strerror or error
            text = (
                f'{target} could not be written ({why}); finished shards are kept, the same call continues from there'
            )
            raise WriteError(text) from error
    return load_features(target)


def _write(
    writer: FeatureWriter,
    backbone: Backbone,
    batch_size: int,
    workers: int,
    max_unreadable: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    source, card = writer.source, writer.card
    if on_progress is not None:
        on_progress(writer.done, len(source))
    loader = feature_batches(
        backbone,
        source,
        pool=card['pool'],
        layers=card['layers'],
        start=writer.done,
        batch_size=batch_size,
        workers=workers,
        amp=card['amp'],
    )
    with writer:
        for features, errors in loader:
            features = features.to(getattr(torch, card['dtype']))
            if not features.isfinite().all():
                where = f'{source.paths[writer.done]} or one of the {len(errors) - 1} after it'
                raise DataError(f'the features of {where} are not finite in {card["dtype"]} with amp={card["amp"]}')
            writer.add(features.numpy(), errors)
            if len(writer.skipped) > max_unreadable:
                raise DataError(_too_many(writer.skipped, max_unreadable))
            if on_progress is not None:
                on_progress(writer.done, len(source))
    writer.finish()


def feature_batches(
    backbone: Backbone,
    source: Images,
    *,
    pool: str,
    layers: Sequence[int] | None = None,
    start: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    amp: str = 'none',
) -> Iterator[tuple[Tensor, list[str]]]:
    """Features of images from `start` on, in order, with float32 rows only for those that could be read.

    Yields:
        Features (readable images, ...) on the CPU, and for every image of the batch its error, '' for none.

    Raises:
        FeatureError: A batch that does not fit into memory.
    """
    device = next(backbone.model.parameters()).device
    dataset = Subset(_Tensors(source, backbone), range(start, len(source)))
    loader = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=_collate, pin_memory=device.type == 'cuda')
    autocast = amp_dtype(amp, device)
    for x, errors in loader:
        if not len(x):
            yield torch.empty(0), errors
            continue
        try:
            with torch.inference_mode(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                y = image_features(backbone.model, x.to(device, non_blocking=True), pool=pool, layers=layers)
            yield y.float().cpu(), errors
        except torch.OutOfMemoryError as error:
            raise FeatureError(f'{len(x)} images do not fit into the memory of {device}: lower batch_size') from error


_ADDRESS = re.compile(r' <\S+ object at 0x[0-9a-f]+>')  # Pillow names a file in memory so: noise, and never the same


class _Tensors(Dataset):
    """Images as tensors; one that cannot be read is None with the reason."""

    def __init__(self, source: Images, backbone: Backbone) -> None:
        self.source, self.rules, self.transform = source, backbone.rules, backbone.transform()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        try:
            with self.source.load(index) as image:
                image = self.rules.apply(image)
        except READ_ERRORS as error:
            text = _ADDRESS.sub('', ' '.join(str(error).split())) or 'no reason given'
            return None, f'{type(error).__name__}: {text}'
        return self.transform(image), ''


def _collate(samples: list[tuple[Tensor | None, str]]) -> tuple[Tensor, list[str]]:
    good = [x for x, _ in samples if x is not None]
    return torch.stack(good) if good else torch.empty(0), [error for _, error in samples]


def _row_shape(backbone: Backbone, pool: str, layers: Sequence[int] | None) -> tuple[tuple[int, ...], list[int]]:
    """Shape of a row and the width of each layer, from one empty image: what cannot run fails here."""
    device = next(backbone.model.parameters()).device
    x = torch.zeros(1, *backbone.data['input_size'], device=device)
    try:
        with torch.inference_mode():
            shape = tuple(image_features(backbone.model, x, pool=pool, layers=layers).shape[1:])
            axis = -1 if pool == 'tokens' else 0
            if layers is None or len(layers) == 1:
                return shape, [shape[axis]]
            each = [image_features(backbone.model, x, pool=pool, layers=[layer]).shape[1:] for layer in layers]
            return shape, [one[axis] for one in each]
    except (AssertionError, RuntimeError) as error:
        raise FeatureError(f'{backbone.name} cannot run on {tuple(x.shape)}: {first_line(error)}') from error


def _too_many(skipped: Sequence[str], limit: int) -> str:
    shown = '; '.join(itertools.islice(skipped, 5)) + (f' and {len(skipped) - 5} more' if len(skipped) > 5 else '')
    return f'{len(skipped)} unreadable images, max_unreadable={limit}: {shown}'

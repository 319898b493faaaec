"""The commands `hydra-vision segment train`, `time` and `compare`, and the files of a run."""

import argparse
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from rich.progress import Progress
from rich.table import Table
from torch.utils.data import DataLoader

from ..console import image_size, make_table, non_empty, non_negative, path, positive, stdout_console
from ..device import amp_dtype, pick_device
from ..environment import device_name, environment
from ..errors import UserError, first_line, require
from ..hub import WEIGHTS
from ..io import make_output, write_atomically, write_csv, write_text
from ..train.checkpoint import KEPT, LAST, newest_checkpoint, save_checkpoint
from ..weights import write_tensors
from .segmentation import (
    DIVISOR,
    Recipe,
    SegmentationFolder,
    build_segmenter,
    eval_transform,
    evaluate,
    measure_speed,
    predict,
    read_classes,
    train_segmenter,
    train_transform,
)

__all__ = [
    'add_compare_arguments',
    'add_time_arguments',
    'add_train_arguments',
    'compare_main',
    'time_main',
    'train_main',
]

_CURVE = ('epoch', 'loss', 'val_miou', 'val_accuracy', 'seconds')


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `segment train`."""
    recipe = Recipe()
    parser.add_argument('data', type=path, metavar='DATA', help='the data set')
    _add_model_arguments(parser, recipe.batch_size)
    parser.add_argument('--resume', action='store_true', help='continue the interrupted run in --output')
    parser.add_argument('--num-classes', type=int, help='where there is no classes.txt')
    parser.add_argument('--ignore-index', type=int, default=255, help='class number without a class (%(default)s)')
    parser.add_argument('--epochs', type=positive, default=recipe.epochs, help='(%(default)s)')
    parser.add_argument('--lr', type=float, default=recipe.lr, help='peak, AdamW, cosine (%(default)s)')
    parser.add_argument('--weight-decay', type=float, default=recipe.weight_decay, help='(%(default)s)')
    parser.add_argument('--eval-every', type=positive, default=recipe.eval_every, help='epochs (%(default)s)')
    parser.add_argument('--workers', type=non_negative, default=4, help='processes that read images (%(default)s)')
    parser.add_argument(
        '--max-unreadable', type=non_negative, default=10, metavar='N', help='images skipped per split (10)'
    )
    parser.add_argument('--seed', type=int, default=0, help='(%(default)s)')
    parser.add_argument('--save-every', type=positive, default=1, help='epochs that a kill may cost (%(default)s)')
    parser.add_argument('--pictures', type=non_negative, default=4, help='test images in predictions.png (%(default)s)')


def add_time_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `segment time`."""
    _add_model_arguments(parser, Recipe().batch_size)
    parser.add_argument('--num-classes', type=int, default=11, help='(%(default)s)')


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `segment compare`."""
    parser.add_argument('runs', nargs='+', type=path, metavar='RUN', help='folders of finished runs')
    parser.add_argument('--output', type=path, required=True, metavar='DIR', help='new or empty folder')


def _add_model_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    parser.add_argument('--output', type=path, required=True, metavar='DIR', help='new or empty folder of the run')
    parser.add_argument(
        '--model', type=non_empty, default='hydra_vit_small', help='isotropic timm backbone (%(default)s)'
    )
    parser.add_argument('--decoder', default='DPT', help='smp architecture (%(default)s)')
    parser.add_argument('--pretrained', action='store_true', help='start from the weights of that name')
    parser.add_argument('--drop-path', type=float, default=0.1, help='stochastic depth (%(default)s)')
    parser.add_argument('--crop', type=image_size, default=(352, 480), metavar='N|HxW', help='(352x480)')
    parser.add_argument('--batch-size', type=positive, default=batch_size, help='(%(default)s)')
    parser.add_argument('--device', type=non_empty, default='auto', help='auto, cpu, cuda, ... (%(default)s)')
    parser.add_argument('--amp', choices=('auto', 'none', 'bf16'), default='auto', help='auto: bf16 on CUDA')


def _new_folder(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f'--output {folder} exists and is not an empty folder')
    return make_output(folder)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.num_classes is not None and arguments.num_classes < 2:
        raise UserError(f'--num-classes {arguments.num_classes}; it must be at least 2')
    if not 0 <= arguments.drop_path < 1:
        raise UserError(f'--drop-path {arguments.drop_path}; it must be at least 0 and below 1')
    if any(side % DIVISOR for side in arguments.crop):
        raise UserError(f'--crop {arguments.crop[0]}x{arguments.crop[1]}; both must be multiples of {DIVISOR}')
    if not 0 < getattr(arguments, 'lr', 1.0) < math.inf:
        raise UserError(f'--lr {arguments.lr}; it must be a number above 0')
    if not 0 <= getattr(arguments, 'weight_decay', 0.0) < math.inf:
        raise UserError(f'--weight-decay {arguments.weight_decay}; it must be a number of at least 0')
    require('segmentation_models_pytorch', 'seg')


def _build(
    arguments: argparse.Namespace, num_classes: int, device: torch.device, dynamic_img_size: bool
) -> torch.nn.Module:
    kwargs: dict[str, Any] = {'dynamic_img_size': dynamic_img_size}
    if arguments.drop_path:
        kwargs['drop_path_rate'] = arguments.drop_path
    model = build_segmenter(
        arguments.model,
        arguments.decoder,
        num_classes,
        img_size=arguments.crop,
        pretrained=arguments.pretrained,
        **kwargs,
    )
    return model.to(device)


# The files of a run: checkpoints while it trains; then curve, scores, weights and predictions


def _write_weights(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Replace the weights of a run in one step: a kill leaves the old ones or the new ones."""
    temporary = folder / f'.{WEIGHTS}.tmp'
    write_tensors(tensors, temporary)
    temporary.replace(folder / WEIGHTS)


def _load_state(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The newest intact state of a run.

    Raises:
        UserError: There is none, or the run was another one.
    """
    checkpoint, state, _ = newest_checkpoint(folder)
    if state is None:
        done = ': it is finished' if (folder / 'summary.json').is_file() else ''
        raise UserError(f'--resume: {folder} holds no interrupted run{done}')
    before = state.pop('facts', None)
    if before is None:
        raise UserError(f'--resume: {checkpoint} is not of a segmentation run')
    for key, value in facts.items():
        if before.get(key) != value:
            raise UserError(f'--resume: the run in {folder} has {key} {before.get(key)}, not {value}')
    return state


def _prediction(run: Path, name: str) -> Path:
    """The file of the predicted mask of an image."""
    return run / 'predictions' / f'{Path(name).with_suffix("").as_posix().replace("/", "__")}.png'


def _write_json(path: Path, facts: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(facts, indent=2) + '\n')


def _write_curve(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row per epoch."""
    cells = [{k: f'{v:.5g}' if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    write_csv(path, cells, _CURVE)


def train_main(arguments: argparse.Namespace) -> int:
    """Train a segmenter."""
    _check(arguments)
    device = pick_device(arguments.device)
    amp = amp_dtype(arguments.amp, device)
    classes = read_classes(arguments.data, arguments.num_classes)
    if len(classes) < 2:
        raise UserError(f'{arguments.data} has {len(classes)} class; a segmenter tells at least two apart')
    if 0 <= arguments.ignore_index < len(classes):
        raise UserError(
            f'--ignore-index {arguments.ignore_index} is one of the {len(classes)} classes, numbered from 0'
        )
    labels = dict(num_classes=len(classes), ignore_index=arguments.ignore_index)
    options = dict(max_unreadable=arguments.max_unreadable, **labels)
    train_set = SegmentationFolder(
        arguments.data,
        'train',
        transform=train_transform(arguments.crop, arguments.ignore_index),
        mask_replaced=False,
        **options,
    )
    val_set, test_set = (
        SegmentationFolder(arguments.data, split, transform=eval_transform(), **options) for split in ('val', 'test')
    )
    for dataset in (train_set, val_set, test_set):
        dataset.check_classes()
    torch.manual_seed(arguments.seed)
    model = _build(arguments, len(classes), device, dynamic_img_size=True)
    recipe = Recipe(
        **{name: getattr(arguments, name) for name in ('epochs', 'batch_size', 'lr', 'weight_decay', 'eval_every')}
    )
    images = {'train': len(train_set), 'val': len(val_set), 'test': len(test_set)}
    facts = {
        **{name: getattr(arguments, name) for name in ('model', 'decoder', 'pretrained', 'drop_path', 'seed')},
        'crop': list(arguments.crop),
        **asdict(recipe),
        'ignore_index': arguments.ignore_index,
        'classes': classes,
        'images': images,
        'amp': str(amp),
    }
    state = _load_state(arguments.output, facts) if arguments.resume else None
    output = arguments.output if arguments.resume else _new_folder(arguments.output)

    def loader(dataset: SegmentationFolder, train: bool) -> DataLoader:
        return DataLoader(
            dataset,
            # whole images can share a batch where they have one size
            batch_size=arguments.batch_size if train or len(dataset.sizes) == 1 else 1,
            shuffle=train,
            drop_last=train and len(dataset) >= arguments.batch_size,
            num_workers=arguments.workers,
            persistent_workers=arguments.workers > 0,
            pin_memory=device.type == 'cuda',
        )

    train, val, test = loader(train_set, True), loader(val_set, False), loader(test_set, False)
    console = stdout_console()
    console.print(
        f'{arguments.model} + {arguments.decoder} on {arguments.data}: {len(train_set)} / {len(val_set)} / '
        f'{len(test_set)} images, {len(classes)} classes, {device_name(device)}'
    )
    if state is not None:
        console.print(f'continuing after epoch {len(state["curve"])} of {recipe.epochs}')
        _write_curve(output / 'curve.csv', state['curve'])
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task('epochs', total=recipe.epochs, completed=len(state['curve']) if state else 0)

        def on_epoch(row: dict[str, Any], now: Callable[[], dict[str, Any]]) -> None:
            state = now()
            if row['epoch'] % arguments.save_every == 0:
                # First: what follows from it can be written again. The one before is kept in case it is damaged.
                save_checkpoint(output, {**state, 'facts': facts}, is_best=False)
            if row['val_miou'] is not None and row['val_miou'] == state['best']:
                _write_weights(state['best_weights'], output)  # an interrupted run leaves its best weights
            _write_curve(output / 'curve.csv', state['curve'])
            progress.advance(task)
            if row['val_miou'] is not None:
                console.print(
                    f'epoch {row["epoch"]}: loss {row["loss"]:.3f}, val mIoU {100 * row["val_miou"]:.1f} %, '
                    f'{row["seconds"]:.0f} s'
                )

        curve = train_segmenter(
            model, train, val, recipe, device=device, amp=amp, state=state, on_epoch=on_epoch, **labels
        )
    val_scores, test_scores = (evaluate(model, split, device=device, amp=amp, **labels) for split in (val, test))
    summary = {
        'model': arguments.model,
        'decoder': arguments.decoder,
        'pretrained': arguments.pretrained,
        'parameters': sum(p.numel() for p in model.parameters()),
        'classes': classes,
        'crop': list(arguments.crop),
        'drop_path': arguments.drop_path,
        'images': images,
        'recipe': asdict(recipe),
        'seed': arguments.seed,
        'amp': str(amp).removeprefix('torch.') if amp else None,
        'device': device_name(device),
        'versions': environment()['versions'],
        'val': asdict(val_scores),
        'test': asdict(test_scores),
        'seconds': curve[-1]['seconds'],
    }
    _write_json(output / 'summary.json', summary)
    _write_weights(model.state_dict(), output)

    # images spread over the test set, for the picture
    indices = np.linspace(0, len(test_set) - 1, min(arguments.pictures, len(test_set))).round().astype(int)
    make_output(output / 'predictions')
    plain_set = SegmentationFolder(arguments.data, 'test', **options)
    pictures, truths, predictions = [], [], []
    for i in indices:
        x, mask = test_set[i]
        picture, _ = plain_set[i]
        with torch.inference_mode(), torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            predicted = predict(model, x[None].to(device)).argmax(1)[0]
        save_mask(_prediction(output, test_set.names[i]), predicted)
        pictures.append(picture.permute(1, 2, 0).numpy())
        truths.append(mask.numpy())
        predictions.append(predicted.cpu().numpy())
    if pictures:
        plot_predictions(output / 'predictions.png', pictures, truths, {arguments.model: predictions}, classes)
    data = {'root': str(arguments.data.resolve()), 'ignore_index': arguments.ignore_index}
    data['images'] = [test_set.names[i] for i in indices]
    _write_json(output / 'pictures.json', data)
    (output / LAST).unlink(missing_ok=True)  # what only a resumed run needs
    shutil.rmtree(output / KEPT, ignore_errors=True)
    for dataset in (train_set, val_set, test_set):
        if dataset.report():
            console.print(f'warning: skipped {dataset.report()}', soft_wrap=True)
    console.print(iou_table(summary))
    console.print(summary_table([summary]))
    console.print(f'wrote {output}')
    return 0


def time_main(arguments: argparse.Namespace) -> int:
    """Time a model."""
    _check(arguments)
    device = pick_device(arguments.device)
    amp = amp_dtype(arguments.amp, device)
    # One known size: a ViT resamples its position embedding on every call otherwise.
    model = _build(arguments, arguments.num_classes, device, dynamic_img_size=False)
    output = _new_folder(arguments.output)
    speed = measure_speed(
        model,
        size=arguments.crop,
        batch_size=arguments.batch_size,
        num_classes=arguments.num_classes,
        device=device,
        amp=amp,
    )
    facts = {
        'model': arguments.model,
        'decoder': arguments.decoder,
        'crop': list(arguments.crop),
        'batch_size': arguments.batch_size,
        'amp': str(amp).removeprefix('torch.') if amp else None,
        'device': device_name(device),
        'versions': environment()['versions'],
        **speed,
    }
    _write_json(output / 'speed.json', facts)
    stdout_console().print(f'{arguments.model}: ' + ', '.join(f'{key} {value:.4g}' for key, value in speed.items()))
    return 0


def _titles(runs: list[Path], summaries: list[dict[str, Any]]) -> list[str]:
    """A name for each run: its model's, with the folder's where one model ran more than once."""
    models = [summary['model'] for summary in summaries]
    return [
        model if models.count(model) == 1 else f'{model} ({run.resolve().name})' for run, model in zip(runs, models)
    ]


def compare_main(arguments: argparse.Namespace) -> int:
    """Compare finished runs."""
    runs = arguments.runs
    try:
        summaries = [json.loads((run / 'summary.json').read_text()) for run in runs]
        data = json.loads((runs[0] / 'pictures.json').read_text())
        predictions = {
            title: [np.asarray(Image.open(_prediction(run, name))) for name in data['images']]
            for run, title in zip(runs, _titles(runs, summaries))
        }
    except FileNotFoundError as error:
        raise UserError(f'{error.filename} is missing: not a finished run, or one with other pictures') from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'a file of {", ".join(map(str, runs))} is damaged: {first_line(error)}') from error
    if len(predictions) < len(runs):
        raise UserError(f'two of the runs are {max(predictions)}; name different ones')
    for run, summary in zip(runs, summaries):
        if summary['classes'] != summaries[0]['classes']:
            raise UserError(f'{run} has other classes than {runs[0]}')
    classes = summaries[0]['classes']
    test = SegmentationFolder(Path(data['root']), 'test', num_classes=len(classes), ignore_index=data['ignore_index'])
    output = _new_folder(arguments.output)
    chosen = [test[i] for i, name in enumerate(test.names) if name in data['images']]
    plot_predictions(
        output / 'predictions.png',
        [image.permute(1, 2, 0).numpy() for image, _ in chosen],
        [mask.numpy() for _, mask in chosen],
        predictions,
        classes,
    )
    stdout_console().print(summary_table(summaries))
    return 0


# Tables and pictures


def _percent(value: float) -> str:
    return '-' if math.isnan(value) else f'{100 * value:.1f}'


def iou_table(summary: Mapping[str, Any]) -> Table:
    """IoU per class."""
    rows = [[name, _percent(value)] for name, value in zip(summary['classes'], summary['test']['iou'])]
    return make_table('IoU on the test images (%)', ['class', summary['model']], rows, right=(1,))


def summary_table(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """One row per run."""
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
    """One row per image: the image, the truth, then each model's prediction; unlabelled pixels are black throughout.

    Args:
        path: Of the PNG.
        images: Uint8 (H, W, 3).
        truths: Class numbers (H, W).
        predictions: By model, class numbers (H, W) per image.
        classes: Their names.
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
    write_atomically(path, lambda file: figure.savefig(file, dpi=110, format='png'))


def save_mask(path: Path, mask: torch.Tensor) -> None:
    """Class numbers (H, W) as a PNG."""
    numbers = mask.cpu().numpy()
    Image.fromarray(numbers.astype(np.uint8 if numbers.max() < 256 else np.uint16)).save(path)

"""The command `hydra-vision segment`: train a segmenter on a folder, compare runs, time a model."""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from torch.utils.data import DataLoader

from ..console import Parser, stdout_console
from ..device import pick_device
from ..environment import device_name, environment
from ..errors import UserError, require
from ..hub import WEIGHTS
from ..weights import write_tensors

__all__ = ['main']

_DESCRIPTION = """Train a semantic segmenter: an smp decoder on a timm backbone, on a folder with
train/, val/ and test/, each with images/NAME.jpg and masks/NAME.png, and classes.txt beside them."""


# What the two modes without training take.
_COMPARED = ('output',)
_MEASURED = (
    *('output', 'model', 'decoder', 'pretrained', 'drop_path', 'crop', 'num_classes', 'batch_size', 'device', 'amp'),
)


def main(argv: Optional[Sequence[str]] = None, prog: str = 'hydra-vision segment') -> int:
    """Run the command.

    Returns:
        Exit code 0.

    Raises:
        UserError: arguments or data that do not fit.
    """
    parser = _parser(prog)
    arguments = parser.parse_args(argv)
    for mode, used in (('compare', _COMPARED), ('measure', _MEASURED)):
        if getattr(arguments, mode):
            given = [key for key, value in vars(arguments).items() if value != parser.get_default(key)]
            unused = [key for key in given if key not in (mode, *used)]
            if unused:
                raise UserError(f'--{unused[0].replace("_", "-")} has no meaning with --{mode}')
    if arguments.compare:
        return _compare([Path(run) for run in arguments.compare], arguments.output)
    require('segmentation_models_pytorch', 'seg')
    if arguments.measure:
        return _measure(arguments)
    if arguments.data_dir is None:
        raise UserError('--data-dir is missing')
    return _train(arguments)


def _parser(prog: str) -> argparse.ArgumentParser:
    from .segmentation import Recipe

    recipe = Recipe()
    parser = Parser(prog=prog, description=_DESCRIPTION)
    parser.add_argument('--data-dir', type=Path, help='the data set')
    parser.add_argument('--output', type=Path, default=Path('output/segment'), help='folder of the run (%(default)s)')
    parser.add_argument('--model', default='hydra_vit_small', help='isotropic timm backbone (%(default)s)')
    parser.add_argument('--decoder', default='DPT', help='smp architecture (%(default)s)')
    parser.add_argument('--pretrained', action='store_true', help='start from the weights of that name')
    parser.add_argument('--drop-path', type=float, default=0.1, help='stochastic depth (%(default)s)')
    parser.add_argument('--crop', type=int, nargs=2, default=[352, 480], metavar=('H', 'W'), help='(352 480)')
    parser.add_argument('--num-classes', type=int, help='where there is no classes.txt')
    parser.add_argument('--ignore-index', type=int, default=255, help='class number without a class (%(default)s)')
    parser.add_argument('--epochs', type=int, default=recipe.epochs, help='(%(default)s)')
    parser.add_argument('--batch-size', type=int, default=recipe.batch_size, help='(%(default)s)')
    parser.add_argument('--lr', type=float, default=recipe.lr, help='peak, AdamW, cosine (%(default)s)')
    parser.add_argument('--weight-decay', type=float, default=recipe.weight_decay, help='(%(default)s)')
    parser.add_argument('--eval-every', type=int, default=recipe.eval_every, help='epochs (%(default)s)')
    parser.add_argument('--workers', type=int, default=4, help='processes that read images (%(default)s)')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, ... (%(default)s)')
    parser.add_argument('--amp', choices=('auto', 'bf16', 'none'), default='auto', help='auto: bf16 on CUDA')
    parser.add_argument('--seed', type=int, default=0, help='(%(default)s)')
    parser.add_argument('--save-every', type=int, default=1, help='epochs that a kill may cost (%(default)s)')
    parser.add_argument('--resume', action='store_true', help='go on with the interrupted run in --output')
    parser.add_argument('--pictures', type=int, default=4, help='test images in predictions.png (%(default)s)')
    parser.add_argument('--measure', action='store_true', help='no training: time the model on random images')
    parser.add_argument(
        '--compare', nargs='+', metavar='RUN', help='no training: a table and a picture of finished runs'
    )
    return parser


def _amp(choice: str, device: torch.device) -> Optional[torch.dtype]:
    bf16 = choice == 'bf16' or (choice == 'auto' and device.type == 'cuda' and torch.cuda.is_bf16_supported())
    return torch.bfloat16 if bf16 else None


def _folder(path: Path) -> Path:
    path = path.expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f'--output {path} exists and is not an empty folder')
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--output {path} cannot be made: {error.strerror}') from error
    return path


def _check(arguments: argparse.Namespace) -> None:
    from .segmentation import DIVISOR

    lowest = {
        'epochs': 1,
        'batch_size': 1,
        'eval_every': 1,
        'save_every': 1,
        'num_classes': 2,
        'workers': 0,
        'pictures': 0,
        'weight_decay': 0,
    }
    for name, low in lowest.items():
        value = getattr(arguments, name)
        if value is not None and value < low:
            raise UserError(f'--{name.replace("_", "-")} {value}; it must be at least {low}')
    if not 0 < arguments.lr < math.inf:
        raise UserError(f'--lr {arguments.lr}; it must be a number above 0')
    if min(arguments.crop) < 1 or any(side % DIVISOR for side in arguments.crop):
        raise UserError(f'--crop {arguments.crop[0]} {arguments.crop[1]}; both must be multiples of {DIVISOR}')


def _build(arguments: argparse.Namespace, num_classes: int, device: torch.device) -> torch.nn.Module:
    from .segmentation import build_segmenter

    # One known size where the model is timed: a ViT resamples its position embedding on every call otherwise.
    kwargs: dict[str, Any] = {'dynamic_img_size': not arguments.measure}
    if arguments.drop_path:
        kwargs['drop_path_rate'] = arguments.drop_path
    model = build_segmenter(
        arguments.model,
        arguments.decoder,
        num_classes,
        img_size=tuple(arguments.crop),
        pretrained=arguments.pretrained,
        **kwargs,
    )
    return model.to(device)


def _write_weights(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Replace the weights of a run in one step: a kill leaves the old ones or the new ones."""
    with tempfile.TemporaryDirectory(dir=folder, prefix='.saving_') as temporary:
        write_tensors(tensors, Path(temporary) / WEIGHTS)
        (Path(temporary) / WEIGHTS).replace(folder / WEIGHTS)


def _train(arguments: argparse.Namespace) -> int:
    from .segmentation import Recipe, evaluate, predict, train_segmenter
    from .segmentation_data import SegmentationFolder, eval_transform, read_classes, train_transform
    from .segmentation_report import iou_table, plot_predictions, save_mask, summary_table, write_curve
    from .segmentation_resume import load_state, remove_states, save_state

    _check(arguments)
    device = pick_device(arguments.device)
    amp = _amp(arguments.amp, device)
    classes = read_classes(arguments.data_dir, arguments.num_classes)
    if len(classes) < 2:
        raise UserError(f'{arguments.data_dir} has {len(classes)} class; a segmenter tells at least two apart')
    if 0 <= arguments.ignore_index < len(classes):
        raise UserError(
            f'--ignore-index {arguments.ignore_index} is one of the {len(classes)} classes, numbered from 0'
        )
    labels = dict(num_classes=len(classes), ignore_index=arguments.ignore_index)
    train_set = SegmentationFolder(
        arguments.data_dir, 'train', transform=train_transform(arguments.crop, arguments.ignore_index), **labels
    )
    val_set, test_set = (
        SegmentationFolder(arguments.data_dir, split, transform=eval_transform(), **labels) for split in ('val', 'test')
    )
    for dataset in (train_set, val_set, test_set):
        dataset.check_classes()
    torch.manual_seed(arguments.seed)
    model = _build(arguments, len(classes), device)
    recipe = Recipe(
        **{name: getattr(arguments, name) for name in ('epochs', 'batch_size', 'lr', 'weight_decay', 'eval_every')}
    )
    images = {'train': len(train_set), 'val': len(val_set), 'test': len(test_set)}
    facts = {
        **{name: getattr(arguments, name) for name in ('model', 'decoder', 'pretrained', 'drop_path', 'crop', 'seed')},
        **asdict(recipe),
        'ignore_index': arguments.ignore_index,
        'classes': classes,
        'images': images,
        'amp': str(amp),
    }
    state = load_state(arguments.output.expanduser(), facts) if arguments.resume else None
    output = arguments.output.expanduser() if arguments.resume else _folder(arguments.output)

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
        f'{arguments.model} + {arguments.decoder} on {arguments.data_dir}: {len(train_set)} / {len(val_set)} / '
        f'{len(test_set)} images, {len(classes)} classes, {device_name(device)}'
    )
    if state is not None:
        console.print(f'going on after epoch {len(state["curve"])} of {recipe.epochs}')
        write_curve(output / 'curve.csv', state['curve'])
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task('epochs', total=recipe.epochs, completed=len(state['curve']) if state else 0)

        def on_epoch(row: dict[str, Any], now: Callable[[], dict[str, Any]]) -> None:
            state = now()
            if row['epoch'] % arguments.save_every == 0:
                save_state(output, state, facts)  # first: what follows from it can be written again
            if row['val_miou'] is not None and row['val_miou'] == state['best']:
                _write_weights(state['best_weights'], output)  # an interrupted run leaves its best weights
            write_curve(output / 'curve.csv', state['curve'])
            progress.advance(task)
            if row['val_miou'] is not None:
                console.print(
                    f'epoch {row["epoch"]}: loss {row["loss"]:.3f}, val mIoU {100 * row["val_miou"]:.1f} %, '
                    f'{row["seconds"]:.0f} s'
                )

        try:
            curve = train_segmenter(
                model, train, val, recipe, device=device, amp=amp, state=state, on_epoch=on_epoch, **labels
            )
        except FloatingPointError as error:
            raise UserError(str(error)) from error
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
    (output / 'summary.json').write_text(json.dumps(summary, indent=2) + '\n')
    _write_weights(model.state_dict(), output)

    # images spread over the test set, for the picture
    indices = np.linspace(0, len(test_set) - 1, min(arguments.pictures, len(test_set))).round().astype(int)
    (output / 'predictions').mkdir(exist_ok=True)
    pictures, truths, predictions = [], [], []
    for i in indices:
        x, mask = test_set[i]
        with torch.inference_mode(), torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            predicted = predict(model, x[None].to(device)).argmax(1)[0]
        save_mask(output / 'predictions' / f'{test_set.images[i].stem}.png', predicted)
        pictures.append(np.asarray(Image.open(test_set.images[i]).convert('RGB')))
        truths.append(mask.numpy())
        predictions.append(predicted.cpu().numpy())
    if pictures:
        plot_predictions(output / 'predictions.png', pictures, truths, {arguments.model: predictions}, classes)
    data = {'root': str(arguments.data_dir.resolve()), 'ignore_index': arguments.ignore_index}
    data['images'] = [test_set.images[i].name for i in indices]
    (output / 'pictures.json').write_text(json.dumps(data, indent=2) + '\n')
    remove_states(output)
    console.print(iou_table(summary))
    console.print(summary_table([summary]))
    console.print(f'wrote {output}')
    return 0


def _measure(arguments: argparse.Namespace) -> int:
    from .segmentation import measure_speed

    _check(arguments)
    device = pick_device(arguments.device)
    amp = _amp(arguments.amp, device)
    num_classes = arguments.num_classes or 11
    model = _build(arguments, num_classes, device)
    output = _folder(arguments.output)
    speed = measure_speed(
        model,
        size=tuple(arguments.crop),
        batch_size=arguments.batch_size,
        num_classes=num_classes,
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
    (output / 'speed.json').write_text(json.dumps(facts, indent=2) + '\n')
    stdout_console().print(f'{arguments.model}: ' + ', '.join(f'{key} {value:.4g}' for key, value in speed.items()))
    return 0


def _titles(runs: list[Path], summaries: list[dict[str, Any]]) -> list[str]:
    """A name for each run: its model's, with the folder's where one model ran more than once."""
    models = [summary['model'] for summary in summaries]
    return [
        model if models.count(model) == 1 else f'{model} ({run.resolve().name})' for run, model in zip(runs, models)
    ]


def _compare(runs: list[Path], folder: Path) -> int:
    from .segmentation_data import SegmentationFolder
    from .segmentation_report import plot_predictions, summary_table

    try:
        summaries = [json.loads((run / 'summary.json').read_text()) for run in runs]
        data = json.loads((runs[0] / 'pictures.json').read_text())
        predictions = {
            title: [np.asarray(Image.open(run / 'predictions' / f'{Path(name).stem}.png')) for name in data['images']]
            for run, title in zip(runs, _titles(runs, summaries))
        }
    except FileNotFoundError as error:
        raise UserError(f'{error.filename} is missing: not a finished run, or one with other pictures') from error
    if len(predictions) < len(runs):
        raise UserError(f'--compare: two of the runs are {max(predictions)}; name different ones')
    for run, summary in zip(runs, summaries):
        if summary['classes'] != summaries[0]['classes']:
            raise UserError(f'--compare: {run} has other classes than {runs[0]}')
    classes = summaries[0]['classes']
    test = SegmentationFolder(Path(data['root']), 'test', num_classes=len(classes), ignore_index=data['ignore_index'])
    output = _folder(folder)
    chosen = [test[i] for i, path in enumerate(test.images) if path.name in data['images']]
    plot_predictions(
        output / 'predictions.png',
        [image.permute(1, 2, 0).numpy() for image, _ in chosen],
        [mask.numpy() for _, mask in chosen],
        predictions,
        classes,
    )
    stdout_console().print(summary_table(summaries))
    return 0

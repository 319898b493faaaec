"""The commands `hydra-vision probe knn` and `hydra-vision probe linear`."""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..console import (
    integer_list,
    make_table,
    non_empty,
    number_list,
    positive,
    positive_list,
    progress,
    stdout_console,
)
from ..device import pick_device
from ..errors import FeatureError, UserError
from ..features import Backbone, Features, extract, load_features, open_images
from ..features.files import FORMATS
from ..features.options import add_image_options, add_model_options, add_run_options, backbone_from, run_arguments
from ..features.pooling import check_layers
from . import knn, probe
from .features import Split, check_same, class_names, paired_splits

__all__ = ['add_knn_arguments', 'add_linear_arguments', 'knn_main', 'linear_main']

# How features are made of images; features that are there already take none of them.
_IMAGE_OPTIONS = (
    *('model', 'checkpoint', 'random_init', 'model_kwargs', 'img_size', 'mean', 'std', 'crop_pct', 'layers', 'pool'),
    *('batch_size', 'workers', 'amp', 'max_unreadable'),
)
_SOLVERS = {'lbfgs': 'logistic', 'sgd': 'linear'}
_POOLS = ('avg', 'max', 'cls')  # a probe takes one vector per image


def add_knn_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `probe knn`."""
    parser.add_argument(
        '--k', type=positive_list, default=[20], metavar='K,...', help='neighbours, e.g. 10,20,100 (default: 20)'
    )
    parser.add_argument('--temperature', type=float, default=0.07, metavar='T', help='default: %(default)s')
    _add_arguments(parser)


def knn_main(arguments: argparse.Namespace) -> int:
    """Classify by nearest neighbours."""
    if not 0 < arguments.temperature < math.inf:
        raise UserError(f'--temperature {arguments.temperature}; it must be a number above 0')

    def run(train: Split, test: Split, classes: int, device: str) -> list[dict[str, Any]]:
        return knn.knn_probe(
            train, test, num_classes=classes, k=arguments.k, temperature=arguments.temperature, device=device
        )

    return _evaluate(arguments, run, f'{knn.PROTOCOL}; T = {arguments.temperature}', neighbours=max(arguments.k))


def add_linear_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `probe linear`."""
    parser.add_argument(
        '--solver',
        choices=tuple(_SOLVERS),
        default='lbfgs',
        help="lbfgs: scikit-learn's logistic regression; sgd: timm's linear head (default: %(default)s)",
    )
    parser.add_argument(
        '--sweep', type=number_list, metavar='X,...', help='C of lbfgs, learning rates of sgd; one: no sweep'
    )
    parser.add_argument('--holdout', type=float, metavar='X', help='share of the training set for the sweep (0.2)')
    parser.add_argument('--seed', type=int, metavar='N', help='of the held-out part, and of sgd (default: 0)')
    parser.add_argument('--max-iter', type=positive, metavar='N', help='of lbfgs (default: 1000)')
    parser.add_argument('--epochs', type=positive, metavar='N', help='of sgd (default: 100)')
    parser.add_argument('--head-batch-size', type=positive, metavar='N', help='of sgd (default: 256)')
    _add_arguments(parser)


def linear_main(arguments: argparse.Namespace) -> int:
    """Train and judge a linear probe."""
    own = {'lbfgs': {'max_iter': 1000}, 'sgd': {'epochs': 100, 'head_batch_size': 256}}
    for solver, options in own.items():
        for name, default in options.items():
            value = getattr(arguments, name)
            if value is not None and solver != arguments.solver:
                raise UserError(f'--{name.replace("_", "-")} is for --solver {solver}')
            options[name] = default if value is None else value
    sweeps = len(arguments.sweep or (0, 0)) > 1
    if arguments.solver == 'lbfgs' and not sweeps and arguments.seed is not None:
        raise UserError('--seed is for choosing among several values; --sweep gives one')
    if arguments.holdout is not None and not 0 < arguments.holdout < 1:
        raise UserError(f'--holdout {arguments.holdout}; it must be between 0 and 1')
    if arguments.holdout is not None and not sweeps:
        raise UserError('--holdout is for choosing among several values; --sweep gives one')
    options = {key.removeprefix('head_'): value for key, value in own[arguments.solver].items()}
    options |= {'holdout': 0.2 if arguments.holdout is None else arguments.holdout, 'seed': arguments.seed or 0}

    def run(train: Split, test: Split, classes: int, device: str) -> list[dict[str, Any]]:
        kwargs = {**options, **({'values': arguments.sweep} if arguments.sweep else {})}
        if arguments.solver == 'lbfgs':
            return [probe.logistic_probe(train, test, num_classes=classes, **kwargs)]
        return [probe.linear_probe(train, test, num_classes=classes, device=device, **kwargs)]

    text = probe.protocol(_SOLVERS[arguments.solver], arguments.sweep, **options)
    return _evaluate(arguments, run, text, on_device=arguments.solver == 'sgd')


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    files = f'{", ".join(FORMATS)} of hydra-vision extract'
    parser.add_argument(
        'train', type=non_empty, help=f'what is learned from: features ({files}) or images, one folder per class'
    )
    parser.add_argument('test', type=non_empty, help='what is judged; the same kinds')
    parser.add_argument('--pool', choices=_POOLS, help='of images (default: avg)')
    parser.add_argument('--layers', type=integer_list, metavar='I,J', help='of images: layers, joined, as --layers=-2')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    add_model_options(parser)
    add_image_options(parser)
    add_run_options(parser)


def _evaluate(
    arguments: argparse.Namespace,
    run: Callable[..., list[dict[str, Any]]],
    protocol: str,
    on_device: bool = True,
    neighbours: int = 1,
) -> int:
    """Features of both sets, then `run` on them; `on_device` says whether that takes a device, too."""
    sources = [_open(arguments.train), _open(arguments.test)]
    class_names(*(source.classes for source in sources))
    if neighbours > len(sources[0].paths):
        raise UserError(f'--k {neighbours}: there are {len(sources[0].paths)} images to train on')
    files_alone = all(isinstance(source, Features) for source in sources)
    if files_alone and not on_device and arguments.device != 'auto':
        raise UserError(
            f'--device {arguments.device}: scikit-learn works on the CPU, and both sets are features already'
        )
    device = pick_device(arguments.device)
    backbone = _backbone(arguments, sources)
    with tempfile.TemporaryDirectory(prefix='hydra-vision-') as scratch:
        features = [
            source
            if isinstance(source, Features)
            else _extract(source, Path(scratch) / f'{i}.npy', backbone, arguments)
            for i, source in enumerate(sources)
        ]
        train, test, names = paired_splits(*features)
    rows = run(train, test, len(names), str(device))
    card = features[0].card
    result = {
        'protocol': protocol,
        'model': card['model'],
        'weights': card['weights'],
        'fingerprint': card['fingerprint'],
        'input_size': card['data']['input_size'],
        'pool': card['pool'],
        'layers': card['layers'],
        'features': card['shape'][0],
        'classes': len(names),
        'train': {'images': train.name, 'rows': len(train.y), 'skipped': len(features[0].skipped)},
        'test': {'images': test.name, 'rows': len(test.y), 'skipped': len(features[1].skipped)},
        'results': rows,
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)
    return 0


def _open(text: str) -> Any:
    """Features, or images to extract them from."""
    if Path(text).suffix in FORMATS:
        return load_features(text)
    return open_images(text)


def _backbone(arguments: argparse.Namespace, sources: Sequence[Any]) -> Backbone | None:
    """The model, where there are images; what its options say must then fit features that are there already."""
    given = [name for name in _IMAGE_OPTIONS if getattr(arguments, name) not in (None, False, [])]
    if all(isinstance(source, Features) for source in sources):
        if given:
            raise UserError(f'--{given[0].replace("_", "-")}: both sets are features already')
        return None
    backbone = backbone_from(arguments)
    layers = check_layers(backbone.model, arguments.layers)
    card = {**backbone.card(), 'pool': arguments.pool or 'avg', 'layers': None if layers is None else list(layers)}
    for source in sources:
        if isinstance(source, Features):
            if source.card['fingerprint'] != card['fingerprint']:
                raise FeatureError(
                    f'{source.path} holds features of another model ({source.card["model"]}, other weights)'
                )
            check_same(source.path.name, source.card, 'the images', card)
    return backbone


def _extract(source: Any, out: Path, backbone: Backbone, arguments: argparse.Namespace) -> Features:
    with progress(f'features of {source.name}') as meter:
        return extract(
            source,
            out,
            model=backbone,
            pool=arguments.pool or 'avg',
            layers=arguments.layers,
            on_progress=meter,
            **run_arguments(arguments),
        )


def _print(result: dict[str, Any]) -> None:
    console = stdout_console()
    columns = [key for key in result['results'][0] if key != 'sweep']
    rows = [[_cell(row[key]) for key in columns] for row in result['results']]
    title = f'{result["model"]}, weights {result["weights"]}, {result["features"]} features ({result["pool"]})'
    console.print(title, soft_wrap=True)
    console.print(make_table('', columns, rows, right=range(len(columns))))
    for part in ('train', 'test'):
        data = result[part]
        skipped = f', {data["skipped"]} unreadable' if data['skipped'] else ''
        console.print(f'{part}: {data["rows"]} images of {data["images"]}{skipped}', soft_wrap=True)
    for row in result['results']:
        for step in row.get('sweep', []):
            (name, value), (_, top1) = step.items()
            console.print(f'held out: {name} {value:g}: top1 {top1:.2f}')
    console.print(f'protocol: {result["protocol"]}', soft_wrap=True)


def _cell(value: Any) -> str:
    return f'{value:.2f}' if isinstance(value, float) and value >= 0.01 else f'{value}'

"""Top-1 under the corruptions of ImageNet-C (Hendrycks & Dietterich, arXiv 1903.12261) at five strengths.

The functions are those of `imagecorruptions` in its maintained form (`pip install imagecorruptions-imaug`), applied to
the uint8 image after resizing and cropping, as ImageNet-C was made.
"""

import statistics
from collections.abc import Sequence

import numpy as np
import torch
from timm.data import create_transform
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader, Dataset

from hydra_vision.console import Parser, make_table, non_empty, path, positive, stdout_console
from hydra_vision.device import amp_dtype, worker_count
from hydra_vision.errors import UserError
from hydra_vision.features import Backbone, open_images
from hydra_vision.features.options import add_image_options, add_model_options, add_run_options, backbone_from
from hydra_vision.io import make_output, write_csv

from . import run

STRENGTHS = (1, 2, 3, 4, 5)
COLUMNS = ('corruption', *(f'strength_{s}' for s in STRENGTHS), 'mean')


class Corrupted(Dataset):
    """Images (C, H, W) in float32 as the model takes them, and class indices; corruption None: as they are."""

    def __init__(self, samples: Sequence[tuple], backbone: Backbone, corruption: str | None, strength: int = 0):
        self.samples, self.rules, self.data = samples, backbone.rules, backbone.data
        self.corruption, self.strength = corruption, strength
        self.transform = create_transform(**backbone.data, use_prefetcher=True)  # uint8, not normalized

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        load, number, label = self.samples[index]
        with load(number) as image:
            pixels = torch.as_tensor(self.transform(self.rules.apply(image)))
        if self.corruption is not None:
            from imagecorruptions import corrupt

            np.random.seed(index)  # the functions draw from the global generator
            changed = corrupt(pixels.permute(1, 2, 0).numpy(), corruption_name=self.corruption, severity=self.strength)
            pixels = torch.from_numpy(changed).permute(2, 0, 1)
        mean, std = (torch.tensor(self.data[key]).view(-1, 1, 1) for key in ('mean', 'std'))
        return (pixels.float() / 255 - mean) / std, label


@torch.inference_mode()
def top1(dataset: Dataset, backbone: Backbone, batch_size: int, workers: int, amp: torch.dtype | None) -> float:
    """Top-1 in percent."""
    device = next(backbone.model.parameters()).device
    right = 0
    for images, labels in DataLoader(dataset, batch_size, num_workers=workers):
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            logits = backbone.model(images.to(device))
        right += int((logits.argmax(1).cpu() == labels).sum())
    return 100 * right / len(dataset)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write corruptions.csv.

    Returns:
        Exit code 0.

    Raises:
        UserError: The package is missing; images without classes, below 32 px, or of other classes than the head.
    """
    arguments = _parser().parse_args(argv)
    try:
        from imagecorruptions import get_corruption_names
    except ImportError as error:
        raise UserError(f'imagecorruptions cannot be imported ({error}): pip install imagecorruptions-imaug') from error
    known = get_corruption_names('all')
    chosen = arguments.corruptions or get_corruption_names('common')
    if unknown := sorted(set(chosen) - set(known)):
        raise UserError(f'--corruptions {unknown[0]!r}; allowed: {", ".join(known)}')
    images = open_images(arguments.images)
    if images.classes is None:
        raise UserError(f'{arguments.images} has no classes: a folder for each is needed')
    backbone = backbone_from(arguments)
    channels, *size = backbone.data['input_size']
    if channels != 3 or min(size) < 32:
        raise UserError(
            f'the model takes {channels} x {size[0]} x {size[1]}; the corruptions need RGB of 32 px or more'
        )
    names = sorted(set(images.classes), key=natural_key)
    if len(names) != backbone.model.num_classes or (backbone.classes or names) != names:
        raise UserError(
            f'{arguments.images} has {len(names)} classes, the head {backbone.model.num_classes}, or others'
        )
    every = max(1, len(images) // (arguments.num_images or len(images)))  # classes lie one after the other
    index = {name: number for number, name in enumerate(names)}
    samples = [(images.load, i, index[images.classes[i]]) for i in range(0, len(images), every)]

    output = make_output(arguments.output)
    device = next(backbone.model.parameters()).device
    how = (arguments.batch_size or 64, worker_count(arguments.workers), amp_dtype(arguments.amp or 'auto', device))
    rows = [{'corruption': 'none', 'mean': top1(Corrupted(samples, backbone, None), backbone, *how)}]
    for name in chosen:
        scores = {f'strength_{s}': top1(Corrupted(samples, backbone, name, s), backbone, *how) for s in STRENGTHS}
        rows.append({'corruption': name, **scores, 'mean': statistics.mean(scores.values())})
        write_csv(output / 'corruptions.csv', rows, COLUMNS)  # after each: a run that is cut off keeps these
    rows.append({'corruption': 'mean of all', 'mean': statistics.mean(row['mean'] for row in rows[1:])})
    write_csv(output / 'corruptions.csv', rows, COLUMNS)
    cells = [[f'{row[c]:.1f}' if isinstance(row.get(c), float) else row.get(c, '') for c in COLUMNS] for row in rows]
    title = f'{backbone.name}, top-1 % of {len(samples)} images'
    stdout_console().print(make_table(title, COLUMNS, cells, right=range(1, len(COLUMNS))))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog='python -m benchmarks.corruptions',
        description=__doc__,
        example='python -m benchmarks.corruptions PATH/val --model hydra_vit_tiny.tin200 --output robustness',
    )
    parser.add_argument('images', type=non_empty, metavar='IMAGES', help='a folder with a folder per class, or a .tar')
    parser.add_argument(
        '--num-images', type=positive, metavar='N', help='about N, spread over the classes; default all'
    )
    parser.add_argument('--corruptions', nargs='+', metavar='NAME', help='default: the 15 of ImageNet-C')
    parser.add_argument('--output', type=path, required=True, metavar='DIR', help='new or empty folder')
    add_model_options(parser)
    add_image_options(parser)
    add_run_options(parser)
    return parser


if __name__ == '__main__':
    run(main, 'corruptions')

"""A masked autoencoder on a scan model: pre-training on handwritten digits, linear probes before and after.

MAE (He et al., CVPR 2022, arXiv 2111.06377): the encoder sees a random part of the patches, a light decoder predicts
the pixels of the others. What an encoder that scans does without the others is the question here: in the sequence of
the kept patches a token stands for itself and the dropped ones up to the next. `--steps` says how long its step is:

    unscaled   its own, as if the kept patches were neighbours
    rate       times the inverse of the share that is kept
    gap        times the distance on the grid, in scan order, to the next kept patch (backwards: to the one before)

Steps are scaled while patches are dropped only; the probes see whole images.
"""

import statistics
from collections.abc import Sequence

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hydra_vision.console import Parser, integer_list, make_table, path, positive, stdout_console
from hydra_vision.downstream import random_token_mask
from hydra_vision.errors import UserError
from hydra_vision.eval.features import Split
from hydra_vision.eval.probe import logistic_probe
from hydra_vision.io import make_output, write_csv
from hydra_vision.mixers import Hydra
from hydra_vision.models.hydra_vit import HydraBlock
from hydra_vision.train.sources import Digits

from . import run

STEPS = ('unscaled', 'rate', 'gap')
COLUMNS = ('steps', 'pos_embed', 'seed', 'before_few', 'after_few', 'before_all', 'after_all', 'loss')
FEW = 10  # labelled images a class


class ScaledSteps(nn.Module):
    """Stands in for the input projection of a `Hydra`; `scale` (B, L, 2) multiplies the step sizes of its two
    directions, None leaves them."""

    def __init__(self, mixer: Hydra) -> None:
        super().__init__()
        self.projection, self.dt_bias, self.scale = mixer.in_proj, mixer.dt_bias, None

    def forward(self, u: Tensor) -> Tensor:
        projected = self.projection(u)
        if self.scale is None:
            return projected
        heads = len(self.dt_bias)
        front, raw = projected.split([projected.shape[-1] - 2 * heads, 2 * heads], -1)
        bias = self.dt_bias.repeat(2)
        dt = F.softplus(raw + bias) * self.scale.repeat_interleave(heads, -1)
        return torch.cat([front, dt + torch.log(-torch.expm1(-dt)) - bias], -1)  # softplus backwards


def step_scales(steps: str, kept: Tensor, length: int) -> Tensor | None:
    """How many tokens of the whole sequence a kept one stands for.

    Args:
        steps: One of `STEPS`.
        kept: (B, K) Indices of the kept tokens, ascending.
        length: Tokens of the whole sequence.

    Returns:
        (B, K, 2), forwards and backwards; None for 'unscaled'.
    """
    if steps == 'unscaled':
        return None
    if steps == 'rate':
        return torch.full((*kept.shape, 2), length / kept.shape[1], device=kept.device)
    ahead, behind = F.pad(kept, (0, 1), value=length).diff(dim=1), F.pad(kept, (1, 0), value=-1).diff(dim=1)
    return torch.stack([ahead, behind], -1).float()


class MaskedAutoencoder(nn.Module):
    """A Hydra-ViT encoder over the patches that are kept, and a Hydra decoder for the others.

    Args:
        encoder: A `HydraViT` without class token, scanned by rows.
        steps: One of `STEPS`.
        width: Of the decoder's tokens.
        depth: Blocks of the decoder.
    """

    def __init__(self, encoder: nn.Module, steps: str = 'unscaled', width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.encoder, self.steps = encoder, steps
        self.mixers = [blk.mixer for blk in encoder.blocks]
        for mixer in self.mixers:
            mixer.in_proj = ScaledSteps(mixer)
        patches, weight = encoder.patch_embed.num_patches, encoder.patch_embed.proj.weight
        self.embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(patches, width))
        mixer_layer = lambda dim, **dd: Hydra(dim, d_state=16, headdim=32, **dd)  # noqa: E731
        self.decoder = nn.Sequential(*(HydraBlock(width, mixer_layer) for _ in range(depth)), nn.LayerNorm(width))
        self.predict = nn.Linear(width, weight[0].numel())

    def encode(self, images: Tensor, kept: Tensor) -> Tensor:
        """The kept patches (B, K, D); kept (B, K) ascending, in scan order."""
        encoder = self.encoder
        x = encoder.patch_embed(images)
        if encoder.pos_embed is not None:
            x = x + encoder.pos_embed
        scale = step_scales(self.steps, kept, x.shape[1])
        x = x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        for mixer in self.mixers:
            mixer.in_proj.scale = scale
        x = encoder.norm(encoder.blocks(x))
        for mixer in self.mixers:
            mixer.in_proj.scale = None
        return x

    def forward(self, images: Tensor, mask_ratio: float = 0.75) -> Tensor:
        """Mean squared error of the pixels of the dropped patches of images (B, C, H, W)."""
        embed = self.encoder.patch_embed
        target = F.unfold(images, embed.patch_size, stride=embed.patch_size).mT  # (B, L, pixels of a patch)
        kept, dropped = random_token_mask(target.shape[:2], mask_ratio, device=images.device)
        x = self.embed(self.encode(images, kept))
        tokens = self.mask_token.expand(*target.shape[:2], -1)
        tokens = tokens.scatter(1, kept.unsqueeze(-1).expand_as(x), x)
        predicted = self.predict(self.decoder(tokens + self.pos_embed))
        error = (predicted - target).square().mean(-1)
        return error.gather(1, dropped).mean()


def digits(train: bool) -> tuple[Tensor, np.ndarray]:
    """Images (N, 1, 8, 8), standardised, and their classes."""
    found = Digits(train)
    return (torch.from_numpy(found.images).float().unsqueeze(1) / 255 - 0.305) / 0.376, found.targets


@torch.no_grad()
def probe(encoder: nn.Module, labels: int | None = None, seed: int = 0) -> float:
    """Top-1 in percent of a linear probe on the mean of the tokens, learnt from so many labels a class (None: all)."""
    encoder.eval()
    splits = []
    for train in (True, False):
        images, classes = digits(train)
        if train and labels:
            order = np.random.default_rng(seed).permutation(len(classes))
            chosen = np.concatenate([order[classes[order] == c][:labels] for c in range(10)])
            images, classes = images[chosen], classes[chosen]
        features = torch.cat([encoder.forward_features(part).mean(1) for part in images.split(256)])
        splits.append(Split(features.numpy(), classes, 'digits'))
    return logistic_probe(*splits, num_classes=10, seed=seed)['top1']


def pretrain(
    model: MaskedAutoencoder, epochs: int, mask_ratio: float, lr: float = 1e-3, batch_size: int = 128
) -> float:
    """AdamW, a tenth of the epochs warm-up, then cosine; the loss of the last epoch."""
    images, _ = digits(train=True)
    steps = -(-len(images) // batch_size) * epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(epochs):
        losses = []
        for index in torch.randperm(len(images)).split(batch_size):
            losses.append(model(images[index], mask_ratio))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
            schedule.step()
    return torch.stack(losses).mean().item()


def main(argv: Sequence[str] | None = None) -> int:
    """Pre-train, probe, print a table, write masked_autoencoder.csv.

    Returns:
        Exit code 0.

    Raises:
        UserError: An unknown kind of steps, a ratio that leaves no patch.
    """
    arguments = _parser().parse_args(argv)
    if unknown := [name for name in arguments.steps if name not in STEPS]:
        raise UserError(f'--steps {unknown[0]!r}; allowed: {", ".join(STEPS)}')
    patches = (8 // arguments.patch_size) ** 2
    if not 0 < arguments.mask_ratio <= 1 - 1 / patches:
        raise UserError(
            f'--mask-ratio {arguments.mask_ratio:g}; of {patches} patches at least one is kept, one dropped'
        )
    output = make_output(arguments.output)
    rows = []
    for seed in arguments.seeds:
        for steps in arguments.steps:
            torch.manual_seed(seed)  # the same weights, images and masks for every kind of steps
            options = dict(img_size=8, patch_size=arguments.patch_size, in_chans=1, num_classes=0, depth=4)
            encoder = timm.create_model('hydra_vit_nano', pos_embed=arguments.pos_embed, **options)
            before = [probe(encoder, labels, seed) for labels in (FEW, None)]
            loss = pretrain(MaskedAutoencoder(encoder, steps), arguments.epochs, arguments.mask_ratio)
            after = [probe(encoder, labels, seed) for labels in (FEW, None)]
            scores = (n for pair in zip(before, after) for n in pair)
            rows.append(dict(zip(COLUMNS, (steps, arguments.pos_embed, seed, *scores, loss))))
            write_csv(output / 'masked_autoencoder.csv', rows, COLUMNS)  # a run that is cut off keeps these
    cells = []
    for steps in arguments.steps:
        own = [row for row in rows if row['steps'] == steps]
        cells.append([steps, *(_spread([row[key] for row in own]) for key in COLUMNS[3:])])
    title = (
        f'linear probe, top-1 % with {FEW} labels a class and all, mean and deviation of {len(arguments.seeds)} seeds'
    )
    heads = ['steps', f'{FEW}, before', 'after', 'all, before', 'after', 'loss']
    stdout_console().print(make_table(title, heads, cells, right=range(1, 6)))
    return 0


def _spread(values: list[float]) -> str:
    deviation = f' ± {statistics.stdev(values):.3g}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.4g}{deviation}'


def _parser() -> Parser:
    parser = Parser(
        prog='python -m benchmarks.masked_autoencoder',
        description=__doc__,
        example='python -m benchmarks.masked_autoencoder --steps unscaled gap --seeds 0,1,2 --output mae',
    )
    add = parser.add_argument
    add('--steps', nargs='+', default=STEPS, metavar='KIND', help='unscaled, rate, gap; default all')
    add('--pos-embed', choices=('learn', 'none'), default='learn', help='position embedding of the encoder')
    add('--patch-size', type=int, choices=(1, 2, 4), default=1, help='in px of 8 x 8; default 1')
    add('--mask-ratio', type=float, default=0.75, metavar='R', help='share of the patches dropped; default 0.75')
    add('--epochs', type=positive, default=30, metavar='N', help='over 1,437 images; default 30')
    add('--seeds', type=integer_list, default=[0, 1, 2], metavar='N,...', help='default 0,1,2')
    add('--output', type=path, required=True, metavar='DIR', help='new or empty folder')
    return parser


if __name__ == '__main__':
    run(main, 'masked_autoencoder')

"""What HiP attention changes in a trained ViT, on real images: recall, error, agreement, time.

    python -m benchmarks.sparse_attention --model vit_tiny_patch16_224 \
        --model-kwargs '{"img_size": 128, "patch_size": 2, "num_classes": 10}' --checkpoint best.pt \
        --images imagenette/val --keys 256 512 1024 --output sparse_attention

Columns as `hydra_vision.sparsify.agreement` defines them, means over attention modules and images; per module in
`layers.csv`. Times are of the whole model, dense and sparse in turns, synchronised.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import timm
import torch
from timm.data import ImageDataset, create_transform, resolve_model_data_config

import hydra_vision  # noqa: F401  registers its models
from hydra_vision.console import Parser, markdown_table, positive
from hydra_vision.device import pick_device
from hydra_vision.errors import UserError
from hydra_vision.io import write_csv
from hydra_vision.sparsify import agreement, sparsify_attention

LAYER = ('recall', 'oracle', 'random', 'error')
MODEL = ('top1_agreement', 'top1_dense', 'top1_sparse', 'logit_difference', 'kl', 'cosine')


def seconds(model: torch.nn.Module, images: torch.Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model: torch.nn.Module, batches: list, settings: dict, repeats: int) -> tuple[dict, list[dict]]:
    """A row of the table, and one per attention module."""
    reports = [agreement(model, images, labels, **settings) for images, labels in batches]
    weights = [len(labels) / sum(len(labels) for _, labels in batches) for _, labels in batches]
    layers = []
    for per_layer in zip(*(report['layers'] for report in reports)):
        means = {key: sum(w * row[key] for w, row in zip(weights, per_layer)) for key in LAYER}
        layers.append({'keys': settings['keys'], 'name': per_layer[0]['name'], **means})
    row = {'keys': settings['keys'], **{key: sum(layer[key] for layer in layers) / len(layers) for key in LAYER}}
    row |= {key: sum(w * report[key] for w, report in zip(weights, reports)) for key in MODEL}
    times = {'dense_ms': [], 'sparse_ms': []}
    for _ in range(repeats + 1):  # the first pair is a warm-up
        times['dense_ms'].append(1e3 * seconds(model, batches[0][0]))
        with sparsify_attention(model, **settings):
            times['sparse_ms'].append(1e3 * seconds(model, batches[0][0]))
    return {**row, **{key: median(values[1:]) for key, values in times.items()}}, layers


@torch.inference_mode()
def main(arguments: argparse.Namespace) -> None:
    device = pick_device(arguments.device)
    try:
        model = timm.create_model(
            arguments.model, checkpoint_path=arguments.checkpoint, **json.loads(arguments.model_kwargs)
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f'--model {arguments.model}: {str(error).splitlines()[0]}') from error
    model = model.eval().to(device)
    data = resolve_model_data_config(model, use_test_size=False)
    size = getattr(model.patch_embed, 'img_size', None)
    data['input_size'] = (data['input_size'][0], *size) if size else data['input_size']
    dataset = ImageDataset(arguments.images, transform=create_transform(**data))
    stride = max(1, len(dataset) // arguments.num_images)  # classes lie one after the other
    subset = torch.utils.data.Subset(dataset, range(0, len(dataset), stride)[: arguments.num_images])
    loader = torch.utils.data.DataLoader(subset, batch_size=arguments.batch_size)
    batches = [(images.to(device), labels.to(device)) for images, labels in loader]
    common = {name: getattr(arguments, name) for name in ('blocks', 'order', 'query_block', 'key_block', 'kernel')}
    rows, layers = [], []
    for keys in arguments.keys:
        row, per_layer = measure(model, batches, dict(common, keys=keys), arguments.repeats)
        rows.append(row)
        layers += per_layer
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / 'sparse_attention.csv', rows)
    write_csv(output / 'layers.csv', layers)
    print(f'{len(subset)} images, {device}, torch {torch.__version__}')
    print(markdown_table(list(rows[0]), [[f'{value:.4g}' for value in row.values()] for row in rows]))


if __name__ == '__main__':
    parser = Parser(prog='python -m benchmarks.sparse_attention', description=__doc__.splitlines()[0])
    parser.add_argument('--model', required=True, help='a timm model with token attention')
    parser.add_argument('--model-kwargs', default='{}', metavar='JSON', help='of the constructor')
    parser.add_argument('--checkpoint', default='', help='weights; random weights say nothing')
    parser.add_argument('--images', required=True, help='a folder with a folder per class')
    parser.add_argument('--num-images', type=positive, default=256)
    parser.add_argument('--batch-size', type=positive, default=8)
    parser.add_argument('--keys', type=positive, nargs='+', default=[256, 512, 1024])
    parser.add_argument('--query-block', type=positive, default=64)
    parser.add_argument('--key-block', type=positive, default=2)
    parser.add_argument('--kernel', choices=('gather', 'flex'), default='gather', help='flex: blocks of 128 or more')
    parser.add_argument('--order', choices=('hilbert', 'row'), default='hilbert')
    parser.add_argument('--blocks', type=int, nargs='+', help='attention modules that become sparse; default: all')
    parser.add_argument('--repeats', type=positive, default=5)
    parser.add_argument('--device', default='auto')
    parser.add_argument('--output', default='sparse_attention')
    try:
        main(parser.parse_args())
    except (UserError, ValueError) as error:
        raise SystemExit(f'error: {error}') from error

"""What a run says before it starts and when it is done."""

from typing import TYPE_CHECKING

from hydra_vision.eval.classification import Result
from hydra_vision.io import write_text
from hydra_vision.train import build, report
from hydra_vision.train.checkpoint import BEST, KEPT, LAST
from hydra_vision.train.log import MIXERS, STEPS
from hydra_vision.train.provenance import RUN

if TYPE_CHECKING:
    from hydra_vision.train.engine import Trainer


def announce(run: 'Trainer') -> None:
    """What is about to happen, in a few lines."""
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    size = 'x'.join(map(str, run.input_size))
    amp = 'float32' if run.amp is None else str(run.amp).removeprefix('torch.')
    images = [f'{len(loader.dataset):,}' for loader in (run.train_loader, run.val_loader)]
    start = f', from epoch {run.epoch}' if run.epoch else ''
    start += f' and {run.progress.batches} steps' if run.progress.batches else ''
    if run.epoch >= run.epochs:
        start = f': nothing to train, the checkpoint has {run.epoch} epochs already'
    batch, accum = run.config.data.batch_size, run.config.optim.accum_steps
    share = f'{batch // run.world.size} x {run.world.size} processes' if run.world.size > 1 else f'{batch}'
    share += f' x {accum} steps' if accum > 1 else ''
    config, more = run.config, []
    if hasattr(run.model, 'initial_weights'):
        more.append(f'start   {run.model.initial_weights}')
    if config.model.freeze_backbone:
        learning = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        more.append(f'probe   only the classifier learns: {learning:,} parameters')
    if config.distill.teacher is not None:
        more.append(f'teacher {config.distill.teacher}, {1 - config.distill.task_weight:.2g} of the loss')
    if config.data.progressive_sizes is not None:
        more.append(f'sizes   {", ".join(map(str, config.data.progressive_sizes))} px, in equal parts of the epochs')
    for line in (
        f'model   {run.config.model.name}, {parameters / 1e6:.2f} M parameters, input {size}',
        *more,
        f'data    {images[0]} training and {images[1]} validation images, {run.num_classes} classes',
        f'run     {run.epochs} epochs{start} on {run.device}, {amp}',
        f'update  {batch * accum} images ({share}), learning rate up to {build.scaled_lr(run.config):.3g}',
        f'cost    {run.cost.describe(run.device)}',
        f'output  {run.folder}',
    ):
        run.console.print(line, highlight=False, soft_wrap=True)


def conclude(run: 'Trainer') -> dict[str, Result]:
    """Prints and writes the final table."""
    results = {}
    for name, key in (('raw', 'val'), ('EMA', 'ema')):
        last = {metric: (run.history or [{}])[-1].get(f'{key}_{metric}') for metric in ('top1', 'top5', 'loss')}
        if last['top1'] is not None:
            results[f'{name}, last epoch'] = {**last, 'images': run.best['images']}
    if run.best is not None:
        label = f'best: {run.best["weights"]}, epoch {run.best["epoch"]}'
        results[label] = {key: run.best[key] for key in ('top1', 'top5', 'loss', 'images')}
    rows = report.result_rows(results)
    for loader in (run.train_loader, run.val_loader):
        report.tell_unreadable(run.console, loader, run.world)
    report.print_table(run.console, f'{run.config.model.name}, validation', report.RESULT_HEADER, rows)
    run.console.print(report.speed_line(run.history), highlight=False, soft_wrap=True)
    if not run.world.primary:
        return results
    write_text(run.folder / 'results.md', report.markdown_table(report.RESULT_HEADER, rows))
    files = ('curve.png', BEST, LAST, KEPT, 'summary.csv', STEPS, MIXERS, 'results.md', 'config.yaml', RUN)
    files = ', '.join(file for file in files if (run.folder / file).exists())
    run.console.print(f'{run.folder}: {files}', highlight=False, soft_wrap=True)
    return results

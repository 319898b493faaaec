"""Evaluates the weights of a checkpoint: `--validate`."""

from typing import Any

import torch
from rich.console import Console

from hydra_vision.errors import CheckpointError, DataError
from hydra_vision.eval.classification import Result, evaluate
from hydra_vision.train import build, data, report, sources
from hydra_vision.train.config import Config
from hydra_vision.train.device import compile_model, configure_torch, place_model
from hydra_vision.train.distributed import World


def initial_state(config: Config, world: World) -> dict[str, Any]:
    """What `validate` needs of a checkpoint, of the initial weights of a recipe.

    Raises:
        ConfigError, CheckpointError, DataError: what does not fit.
    """
    _, split = sources.open_splits(config, train=False, world=world)
    num_classes = sources.count_classes(config, split)
    torch.manual_seed(config.run.seed)
    model = build.create_model(config, num_classes)
    return {
        **{'arch': config.model.name, 'num_classes': num_classes, 'classes': split.classes, 'epoch': 0},
        **{'state_dict': model.state_dict(), 'state_dict_ema': None},
    }


def validate(config: Config, state: dict[str, Any], console: Console, world: World | None = None) -> dict[str, Result]:
    """Evaluates the raw and the averaged weights of a checkpoint on the validation split of `config`.

    The processes of `world` share the images; each gets the results of all of them.

    Raises:
        CheckpointError: weights that do not fit the model of `config`.
    """
    world = world or World()
    device = build.pick_device(config, world)
    amp = build.amp_dtype(config, device)
    configure_torch(config, device)
    _, split = sources.open_splits(config, train=False, world=world)
    if split.classes is not None and len(split.classes) != state['num_classes']:
        raise DataError(f'{split.name} has {len(split.classes)} classes; the checkpoint has {state["num_classes"]}')
    warning = sources.check_classes(split, state['classes'])
    if warning is not None:
        console.print(warning, highlight=False, soft_wrap=True)
    models = {}
    for name, key in (('raw', 'state_dict'), ('EMA', 'state_dict_ema')):
        if state[key] is None:
            continue
        model = build.create_model(config, state['num_classes'], load_weights=False)
        try:
            model.load_state_dict(state[key])
        except RuntimeError as error:
            raise CheckpointError(f'the checkpoint does not fit {config.model.name}: {error}') from error
        build.check_backend(model, device)
        models[name] = compile_model(place_model(model, config, device), config)
    loader = data.val_loader(config, split, state['num_classes'], next(iter(models.values())), device, world)
    meter = report.Meter(console, state['epoch'], len(loader), 0)
    with meter.bar, meter.phase(state['epoch'] - 1, 'validate', len(loader)) as phase:
        batches = data.shared_batches(loader, world, lockstep=False)
        results = evaluate(models, batches, device, amp, config.run.channels_last, phase.advance, world.sum)
    report.tell_unreadable(console, loader, world)
    return results

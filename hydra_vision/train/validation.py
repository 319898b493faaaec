"""Evaluates the weights of a checkpoint: `--validate`."""

from typing import Any

from rich.console import Console

from hydra_vision.eval.classification import Result, evaluate
from hydra_vision.train import build, data, report
from hydra_vision.train.config import Config
from hydra_vision.train.device import compile_model, configure_torch, place_model
from hydra_vision.train.errors import CheckpointError, DataError


def validate(config: Config, state: dict[str, Any], console: Console) -> dict[str, Result]:
    """Evaluates the raw and the averaged weights of a checkpoint on the validation split of `config`.

    Raises:
        CheckpointError: weights that do not fit the model of `config`.
    """
    device = build.pick_device(config)
    amp = build.amp_dtype(config, device)
    configure_torch(config, device)
    _, split = data.open_splits(config, train=False)
    if split.classes is not None and len(split.classes) != state["num_classes"]:
        raise DataError(f"{split.name} has {len(split.classes)} classes; the checkpoint has {state['num_classes']}")
    models = {}
    for name, key in (("raw", "state_dict"), ("EMA", "state_dict_ema")):
        if state[key] is None:
            continue
        model = build.create_model(config, state["num_classes"], load_weights=False)
        try:
            model.load_state_dict(state[key])
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint does not fit {config.model.name}: {error}") from error
        build.check_backend(model, device)
        models[name] = compile_model(place_model(model, config, device), config)
    loader = data.val_loader(config, split, state["num_classes"], next(iter(models.values())), device)
    meter = report.Meter(console, state["epoch"], len(loader), 0)
    with meter.bar, meter.phase(state["epoch"] - 1, "validate", len(loader)) as phase:
        results = evaluate(models, loader, device, amp, config.run.channels_last, on_batch=phase.advance)
    if getattr(loader.dataset, "unreadable", list)():
        console.print(f"warning: skipped {loader.dataset.report()}", highlight=False, soft_wrap=True)
    return results

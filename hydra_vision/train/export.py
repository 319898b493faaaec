"""`hydra-vision export-run`: a finished run as a folder that timm and transformers open."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hydra_vision.console import Parser
from hydra_vision.errors import CheckpointError, TrainError, UserError
from hydra_vision.train import build, data
from hydra_vision.train.average import pick_weights
from hydra_vision.train.checkpoint import BEST, find_checkpoint, load_checkpoint
from hydra_vision.train.config import Config


def trained_model(state: dict[str, Any], weights: str, name: str) -> tuple[nn.Module, Config]:
    """The model of a checkpoint, on the CPU, and its recipe.

    Args:
        state: of `load_checkpoint`.
        weights: 'raw', 'ema' or 'auto', see `pick_weights`.
        name: what error messages call the checkpoint.

    Raises:
        CheckpointError: weights that are not there or do not fit.
    """
    config = Config.from_dict(state['config'], source=name)
    model = build.create_model(config, state['num_classes'], load_weights=False)
    try:
        model.load_state_dict(pick_weights(state, weights, name))
    except RuntimeError as error:
        raise CheckpointError(f'the weights of {name} do not fit {config.model.name}: {error}') from error
    return model.eval(), config


def main(argv: Sequence[str], prog: str) -> int:
    """Runs the command."""
    description = "Write a run as config.json + model.safetensors: timm.create_model('local-dir:FOLDER') opens it."
    parser = Parser(prog=prog, description=description)
    parser.add_argument('run', metavar='RUN|CHECKPOINT', help='run folder (its best checkpoint), or a checkpoint')
    parser.add_argument('folder', type=Path, metavar='FOLDER', help='where to write')
    parser.add_argument('--weights', choices=('auto', 'raw', 'ema'), default='auto', help='auto: those that are best')
    arguments = parser.parse_args(argv)
    taken = [name for name in ('config.json', 'model.safetensors') if (arguments.folder / name).exists()]
    if taken:
        raise UserError(f'{arguments.folder} holds {" and ".join(taken)} already; nothing is overwritten')
    from hydra_vision.hub import save_pretrained

    path = find_checkpoint(arguments.run, BEST)
    try:
        state = load_checkpoint(path)
        model, config = trained_model(state, arguments.weights, str(path))
    except TrainError as error:
        raise UserError(str(error)) from error
    inputs = data.resolve_input(config, model)
    keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    preprocessing = {key: inputs[key] for key in keys if inputs.get(key) is not None}
    own = {key: value for key, value in config.model.kwargs.items() if not key.startswith('pretrained_')}
    try:
        save_pretrained(
            model, arguments.folder, model_args=own, label_names=state['classes'], data_config=preprocessing
        )
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    print(f'{arguments.folder}: config.json, model.safetensors ({config.model.name}, epoch {state["epoch"]})')
    print(f"open it with timm.create_model('local-dir:{arguments.folder}', pretrained=True) after import hydra_vision")
    return 0

"""`hydra-vision average-checkpoints`: the mean of the weights of several checkpoints of one run or one recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hydra_vision.console import Parser
from hydra_vision.errors import CheckpointError, UserError
from hydra_vision.io import write_atomically
from hydra_vision.train.checkpoint import BEST, FORMAT, checksum, find_checkpoint, load_checkpoint

_NORMS = 'running_mean'


def average(states: Sequence[dict[str, torch.Tensor]], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The mean of state dicts, computed in float64; whole numbers (counters) are those of the last one.

    Args:
        states: of the same model.
        names: what error messages call them.

    Raises:
        CheckpointError: names or shapes that differ.
    """
    first = states[0]
    for name, state in zip(names[1:], states[1:]):
        if state.keys() != first.keys():
            other = sorted(state.keys() ^ first.keys())
            raise CheckpointError(f'{names[0]} and {name} are of different models: only one of them has {other[0]}')
        for key, value in state.items():
            if value.shape != first[key].shape:
                shapes = f'{tuple(first[key].shape)} and {tuple(value.shape)}'
                raise CheckpointError(f'{names[0]} and {name} are of different models: {key} has the shapes {shapes}')
    mean = {}
    for key, value in first.items():
        if not value.is_floating_point():
            mean[key] = states[-1][key].clone()
            continue
        total = torch.zeros(value.shape, dtype=torch.float64)
        for state in states:
            total += state[key]
        mean[key] = (total / len(states)).to(value.dtype)
    return mean


def pick_weights(state: dict[str, Any], weights: str, name: str) -> dict[str, torch.Tensor]:
    """The raw or the averaged (EMA) weights of a checkpoint; 'auto': those that validated best so far, else raw ones.

    Raises:
        CheckpointError: averaged weights are asked for, and there are none.
    """
    if weights == 'auto':
        best = state.get('best')
        weights = 'ema' if best and best['weights'] == 'EMA' and state['state_dict_ema'] is not None else 'raw'
    key = {'raw': 'state_dict', 'ema': 'state_dict_ema'}[weights]
    if state[key] is None:
        raise CheckpointError(f'{name} has no averaged (EMA) weights: --weights raw')
    return state[key]


def main(argv: Sequence[str], prog: str) -> int:
    """Runs the command."""
    parser = Parser(prog=prog, description='Average the weights of several checkpoints into one that can be validated.')
    parser.add_argument('checkpoints', nargs='+', metavar='CHECKPOINT', help='two or more files, or run folders (best)')
    parser.add_argument('--output', required=True, type=Path, metavar='FILE', help='new checkpoint, e.g. averaged.pt')
    parser.add_argument('--weights', choices=('raw', 'ema', 'auto'), default='raw', help='which weights of each')
    arguments = parser.parse_args(argv)
    if len(arguments.checkpoints) < 2:
        raise UserError('give two checkpoints or more')
    if arguments.output.exists():
        raise UserError(f'--output {arguments.output} exists already; it is not overwritten')
    if not arguments.output.parent.is_dir():
        raise UserError(f'--output {arguments.output}: {arguments.output.parent} is not a folder')
    paths = [find_checkpoint(text, BEST) for text in arguments.checkpoints]
    try:
        states = [load_checkpoint(path) for path in paths]
        names = [str(path) for path in paths]
        picked = [pick_weights(state, arguments.weights, name) for state, name in zip(states, names)]
        last = states[-1]
        keys = ('arch', 'config', 'num_classes', 'classes', 'epoch', 'history', 'versions')
        # `updates` and the optimizer are left out on purpose: there is no run that this could go on from.
        merged = {'format': FORMAT, **{key: last[key] for key in keys if key in last}, 'best': None}
        merged |= {'state_dict': average(picked, names), 'state_dict_ema': None, 'averaged': names}
        merged['checksum'] = checksum(merged)
        write_atomically(arguments.output, lambda file: torch.save(merged, file))
    except CheckpointError as error:
        raise UserError(str(error)) from error
    print(f'{arguments.output}: mean of {len(paths)} checkpoints ({arguments.weights} weights)')
    if any(key.endswith(_NORMS) for key in merged['state_dict']):
        print('note: the statistics of batch norms were averaged as well; those of the averaged weights may differ')
    return 0

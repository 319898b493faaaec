"""FSDP2: a model whose parameters, gradients and optimizer state are spread over the processes.

Checkpoints hold whole tensors in every case, so that a run can go on with another number of processes, sharded or not.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Spreads the parameters over all processes, in place: one group a block, one for the rest.

    Parameters are gathered in their own precision, as autocast of the recipe casts what may be cast: decays and step
    sizes of Hydra layers stay float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    blocks = getattr(model, 'blocks', None) or getattr(model, 'stages', None) or ()
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # Else the rest stays whole after a forward pass without a backward one (validation, statistics).
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def gathered(value: Any) -> Any:
    """Nested containers with every sharded tensor made whole; a collective call, the result is on every process."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gathered(item) for item in value)
    return value


def scattered_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state of whole tensors as its parameters are sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    spread = {}
    for number, entries in state['state'].items():
        parameter = parameters[number]
        spread[number] = {
            key: distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
            if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape
            else value
            for key, value in entries.items()
        }
    return {**state, 'state': spread}

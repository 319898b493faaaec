"""Distributed training: which process writes, what is summed, how processes agree, and FSDP2.

Processes are started by torchrun, which sets the rank of each. Tensors on GPUs travel through NCCL; flags, messages and
tensors on the CPU through gloo.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import ConfigError, UserError, first_line
from .signals import Stopped


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: Rank of this process.
        size: Number of processes.
        local_rank: Rank of this process on its machine, which is also the index of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def primary(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, any picklable object."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        self.gather(None)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error of one process inside the block on all of them at the end of the block.

        Without this the others would wait for it forever. No collective call may be in the block.

        Raises:
            UserError: The error of the lowest rank that has one.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as raised:
            error = raised
        if self.size == 1:
            if error is not None:
                raise error
            return
        errors = self.gather(None if error is None else (type(error), str(error)))
        for rank, found in enumerate(errors):
            if found is not None:
                kind, text = found
                alone = rank > 0 and sum(other is not None for other in errors) == 1
                raise kind(f'{text} (rank {rank})' if alone else text).of_all() from error


def world_from_environment() -> World:
    """The world that torchrun describes in the environment; one process where it was not used.

    Raises:
        ConfigError: Variables that do not fit together.
    """
    names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')
    given = {name: os.environ[name] for name in names if name in os.environ}
    if 'WORLD_SIZE' not in given or given['WORLD_SIZE'] == '1':
        return World()
    try:
        rank, size, local_rank = (int(given[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f'WORLD_SIZE={given["WORLD_SIZE"]!r} is set, but RANK and LOCAL_RANK are not integers: '
            'start several processes with torchrun'
        ) from error
    if not 0 <= rank < size:
        raise ConfigError(f'RANK={rank} is not valid for WORLD_SIZE={size}')
    return World(rank, size, local_rank)


def local_processes() -> int:
    """Processes of the run on this machine, which share its cores and its memory."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', '1'))


@contextlib.contextmanager
def connected(world: World) -> Iterator[None]:
    """Connect the processes of a run for the length of a block.

    Raises:
        ConfigError: They cannot be connected.
    """
    if world.size == 1:
        yield
        return
    backend = 'cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo'
    try:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f'cannot connect {world.size} processes: {first_line(error)}') from error
    try:
        yield
    except Stopped:
        dist.destroy_process_group()
        raise
    except UserError as error:
        if error.shared:  # otherwise the others are in the middle of something, and torchrun ends them
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


class AsyncFlags:
    """Flags that any rank may raise, combined by an asynchronous all-reduce; results lag one step.

    A process that is asked to stop must not leave the others waiting, so it says so at every step and acts on what all
    said at the step before. The exchange overlaps with computation and never waits for the GPU.

    Args:
        world: The processes.
        count: Number of flags.
    """

    def __init__(self, world: World, count: int):
        self.world, self.count = world, count
        self.sent: tuple[Any, torch.Tensor] | None = None

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """Send the flags of this process; return those that any process raised at the previous call.

        With one process it returns its own flags at once.
        """
        if self.world.size == 1:
            return flags
        before = self._received()
        tensor = torch.tensor(flags, dtype=torch.int32)
        self.sent = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True), tensor
        return before

    def _received(self) -> tuple[bool, ...]:
        if self.sent is None:
            return (False,) * self.count
        work, tensor = self.sent
        self.sent = None
        work.wait()
        return tuple(bool(flag) for flag in tensor)


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Shard the parameters over all processes (FSDP2), in place: one group per block, one for the rest.

    Parameters are gathered in their own precision: autocast casts what may be cast, and decays and step sizes of Hydra
    layers stay float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = getattr(model, 'blocks', None) or getattr(model, 'stages', None) or ()
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # The default would keep the rest gathered after a forward pass without a backward one (validation, statistics).
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def gather_whole(value: Any) -> Any:
    """Nested containers with every sharded tensor made whole, on the CPU of rank 0; a collective call."""
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if dist.get_rank() == 0 else None
    if isinstance(value, Mapping):
        return {key: gather_whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gather_whole(item) for item in value)
    return value


def shard_optimizer_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer with its whole tensors sharded like its parameters.

    Args:
        state: Of `Optimizer.state_dict`, whole tensors, the same on every process.
        optimizer: Of a sharded model.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    sharded = {}
    for number, entries in state['state'].items():
        parameter = parameters[number]
        sharded[number] = {
            key: distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
            if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape
            else value
            for key, value in entries.items()
        }
    return {**state, 'state': sharded}

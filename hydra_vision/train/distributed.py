"""Several processes as one run: who writes, what is summed, and how all of them agree.

Processes are started by torchrun, which tells each its number. Tensors on GPUs travel through NCCL; flags, messages and
tensors on the CPU through gloo.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from hydra_vision.errors import ConfigError, TrainError, first_line
from hydra_vision.train.errors import Stopped


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: number of this process.
        size: how many there are.
        local_rank: number of this process on its machine, which is also its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def primary(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the processes, in place."""
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
        """Waits for all processes."""
        self.gather(None)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """An error of one process inside the block ends the block with that error in all of them.

        Without this the others would wait for it for ever. No collective call may be in the block.

        Raises:
            TrainError: the error of the lowest rank that has one.
        """
        error: TrainError | None = None
        try:
            yield
        except TrainError as raised:
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
        ConfigError: variables that do not fit together.
    """
    names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')
    given = {name: os.environ[name] for name in names if name in os.environ}
    if 'WORLD_SIZE' not in given or given['WORLD_SIZE'] == '1':
        return World()
    try:
        rank, size, local_rank = (int(given[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f'WORLD_SIZE={given["WORLD_SIZE"]!r} is set, but RANK and LOCAL_RANK are not whole numbers beside it: '
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
    """Connects the processes of a run for the length of a block.

    Raises:
        ConfigError: they cannot be connected.
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
    except TrainError as error:
        if error.shared:  # else the others are in the middle of something, and torchrun ends them
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


class Flags:
    """Wishes of single processes that all of them follow at the same update.

    A process that is told to stop must not leave the others waiting, so it says so at every update and acts on what
    all said at the update before. The exchange runs beside the computation and never waits for the GPU.

    Args:
        world: the processes.
        count: number of flags.
    """

    def __init__(self, world: World, count: int):
        self.world, self.count = world, count
        self.sent: tuple[Any, torch.Tensor] | None = None

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """Tells the others what this process wants; returns what any process wanted at the call before.

        With one process it returns its own flags at once.
        """
        if self.world.size == 1:
            return flags
        before = self.finish()
        tensor = torch.tensor(flags, dtype=torch.int32)
        self.sent = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True), tensor
        return before

    def finish(self) -> tuple[bool, ...]:
        """What any process wanted at the last call of `exchange`."""
        if self.sent is None:
            return (False,) * self.count
        work, tensor = self.sent
        self.sent = None
        work.wait()
        return tuple(bool(flag) for flag in tensor)

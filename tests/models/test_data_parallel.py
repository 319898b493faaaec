"""DistributedDataParallel: every process ends with the gradients of the whole batch. On the CPU, and on all GPUs."""

from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import hydra_vision  # noqa: F401

PER_PROCESS = 2


def make_model(backend: str, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model('test_hydra_vit', img_size=64, depth=2, num_classes=5, backend=backend).to(device)


def make_batch(processes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(processes * PER_PROCESS, 3, 64, 64, generator=generator)
    return images.to(device), torch.arange(processes * PER_PROCESS, device=device) % 5


def gradients(model: torch.nn.Module, images: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
    F.cross_entropy(model(images), target).backward()
    return [p.grad.clone() for p in model.parameters()]


def work(rank: int, processes: int, device_type: str, backend: str, compiled: bool, folder: str) -> None:
    """One process: its part of the batch, then the whole batch without the others."""
    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == 'cuda' else torch.device('cpu')
    if device_type == 'cuda':
        torch.cuda.set_device(device)
    transport = 'nccl' if device_type == 'cuda' else 'gloo'
    dist.init_process_group(transport, init_method=f'file://{folder}/meet', rank=rank, world_size=processes)
    try:
        model = make_model(backend, device)
        parallel = DistributedDataParallel(model, device_ids=[rank] if device_type == 'cuda' else None)
        if compiled:
            parallel = torch.compile(parallel, backend='aot_eager')
        images, target = make_batch(processes, device)
        part = slice(rank * PER_PROCESS, (rank + 1) * PER_PROCESS)
        found = gradients(parallel, images[part], target[part])
        model.zero_grad()
        expected = gradients(model, images, target)
        for (name, _), a, b in zip(model.named_parameters(), found, expected):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f'{name}: {m}')
    finally:
        dist.destroy_process_group()
    Path(folder, f'done{rank}').touch()


def launch(processes: int, device_type: str, backend: str, compiled: bool, folder: Path) -> None:
    arguments = (processes, device_type, backend, compiled, str(folder))
    torch.multiprocessing.spawn(work, args=arguments, nprocs=processes)
    assert all((folder / f'done{rank}').exists() for rank in range(processes))


@pytest.mark.slow
def test_two_processes_on_the_cpu(tmp_path):
    launch(2, 'cpu', 'chunked', False, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize('compiled', [False, True])
def test_every_gpu(tmp_path, compiled):
    launch(torch.cuda.device_count(), 'cuda', 'triton', compiled, tmp_path)

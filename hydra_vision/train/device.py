"""Puts a model on its device as a recipe says: threads, precision of products, memory format, compilation."""

import torch
from torch import nn

from hydra_vision.errors import ConfigError, first_line
from hydra_vision.train.config import Config


def configure_torch(config: Config, device: torch.device) -> None:
    """Threads, and on CUDA: TF32 for float32 products and which attention kernels may run, as the recipe says.

    PyTorch prefers cuDNN's attention on Hopper. Its bf16 backward pass turns finite inputs into NaN for some numbers of
    tokens, 64 being one (github.com/pytorch/pytorch/issues/196678, github.com/NVIDIA/cudnn-frontend/issues/1072), so it
    is left out unless it is asked for; flash attention takes its place.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high' if config.run.tf32 else 'highest')
        torch.backends.cudnn.allow_tf32 = config.run.tf32
        torch.backends.cuda.enable_cudnn_sdp(config.run.cudnn_attention)


def place_model(model: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """The model on its device, in the memory format of the recipe."""
    return model.to(device=device, memory_format=torch.channels_last if config.run.channels_last else None)


def compile_model(model: nn.Module, config: Config) -> nn.Module:
    """The compiled model (sharing its weights), or the model itself.

    Raises:
        ConfigError: an unknown mode.
    """
    if not config.run.torch_compile:
        return model
    check_compile_mode(config)
    return torch.compile(model, mode=config.run.compile_mode)


def check_compile_mode(config: Config) -> None:
    """Refuses an unknown mode of torch.compile.

    Raises:
        ConfigError: names the mode.
    """
    try:
        torch.compile(nn.Identity(), mode=config.run.compile_mode)
    except RuntimeError as error:
        raise ConfigError(f'run.compile_mode={config.run.compile_mode!r} is not valid: {first_line(error)}') from error


def peak_memory(device: torch.device) -> float | None:
    """GiB that tensors took at most since the process began, None on the CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == 'cuda' else None

"""CUDA streams of the data loaders."""

import torch
from torch import Tensor

__all__ = ['keep_on_stream']


def keep_on_stream(*tensors: Tensor) -> None:
    """Keeps a loader that allocated tensors on a stream of its own from reusing their memory while this stream reads.

    timm's prefetching loader waits by itself from version 1.0.31 on. Before, a batch that was no longer referred to
    could be overwritten by the next one while the model still worked on it, wherever the GPU was behind the host.
    """
    for t in tensors:
        if t.is_cuda:
            t.record_stream(torch.cuda.current_stream(t.device))

"""What the device can do, measured in the same run: a large matrix product and a large copy."""

from dataclasses import dataclass

import torch

from .timing import measure

__all__ = ['Roofline', 'measure_roofline']

_GEMM_SIDE = {'cuda': 8192, 'cpu': 1024}
_COPY_BYTES = {'cuda': 2 << 30, 'cpu': 256 << 20}


@dataclass(frozen=True)
class Roofline:
    """Rates of one device in one dtype."""

    flops_per_second: float
    bytes_per_second: float

    def gemm_seconds(self, flops: float) -> float:
        return flops / self.flops_per_second

    def memory_seconds(self, size: float) -> float:
        return size / self.bytes_per_second

    def __str__(self) -> str:
        return f'GEMM {self.flops_per_second / 1e12:.3g} TFLOP/s, copy {self.bytes_per_second / 1e12:.3g} TB/s'


def measure_roofline(device: torch.device, dtype: torch.dtype, *, time_limit: float = 2.0) -> Roofline:
    """Measure both rates, the fastest round counts: a floor is what the device can do when nothing disturbs it.

    Random data (products of zeros run faster); bytes read and bytes written both count.
    """
    side, size = _GEMM_SIDE[device.type], _COPY_BYTES[device.type]
    if device.type == 'cuda':  # a small card: the copy takes an eighth of what is free, twice
        size = min(size, torch.cuda.mem_get_info(device)[0] // 8)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.zeros(size, device=device, dtype=torch.uint8)
    target = torch.zeros_like(source)  # written once: untouched pages of the CPU would be faulted in by the copy
    variants = {'gemm': lambda: torch.mm(a, b, out=out), 'copy': lambda: target.copy_(source)}
    times = measure(variants, device, rounds=20, time_limit=time_limit)
    return Roofline(2 * side**3 / min(times['gemm'].seconds), 2 * size / min(times['copy'].seconds))

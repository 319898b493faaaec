"""Every kernel once at a small size, for compute-sanitizer (test_triton_gpu.py runs it). By hand:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python tests/ops/sanitizer_case.py

Without PyTorch's cache every tensor is an allocation of its own, so that one byte beyond it is seen. Other tools of
compute-sanitizer: racecheck, synccheck.
"""

import torch
from triton_checks import hydra_inner, inner_arguments, mix_arguments, value_and_grads

from hydra_vision.ops.triton.api import quasiseparable_mix
from hydra_vision.ops.triton.layernorm import add_layer_norm, add_rows, layer_norm
from hydra_vision.ops.triton.plan import forced_launch
from hydra_vision.ops.triton.table import Launch


def cuda(tensors, dtype, main):
    return [None if t is None else t.cuda().to(dtype if k in main else t.dtype) for k, t in enumerate(tensors)]


def run() -> None:
    # without initial states, seven taps wide, in whole chunks on Hopper: two tiles, four, and three chunks
    for K, L, start in ((7, 77, True), (3, 130, True), (7, 77, False), (7, 196, False), (7, 400, False)):
        tensors = cuda(inner_arguments(2, L, 3, 64, 1, 64, K=K, init_states=start), torch.bfloat16, (0,))
        value_and_grads(lambda a: hydra_inner(*a[:8], headdim=64, d_state=64, init_states=a[8]), tensors)
    for launch in (None, Launch(64), Launch(64, tail=1)):
        tensors = cuda(mix_arguments(2, 130, 3, 64, 1, 64, init_states=True), torch.bfloat16, (0, 4, 5, 6, 7))
        if launch is None:
            value_and_grads(lambda a: quasiseparable_mix(*a), tensors)
        else:
            with forced_launch(launch):
                value_and_grads(lambda a: quasiseparable_mix(*a), tensors)
    x, weight = torch.randn(77, 192, device='cuda', dtype=torch.bfloat16), torch.randn(192, device='cuda')
    factors = torch.rand(77, device='cuda')
    value_and_grads(lambda a: layer_norm(*a, 1e-6, torch.bfloat16), [x, weight, weight])
    value_and_grads(lambda a: add_rows(*a, factors), [x, x])
    for rows in (None, factors):
        value_and_grads(
            lambda a, rows=rows: torch.cat(add_layer_norm(*a[:2], rows, *a[2:], 1e-6, torch.bfloat16)),
            [x, x, weight, weight],
        )
    torch.cuda.synchronize()
    print('done')


if __name__ == '__main__':
    run()

"""The public operator: checks the arguments, chooses the backend, calls it."""

from typing import Optional

import torch
from torch import Tensor

from .chunked import mix_chunked
from .dispatch import choose_backend, is_exporting
from .exported import mix_exported
from .mamba_ssm import mix_mamba_ssm
from .packed import check_cu_seqlens, segments_of, separated
from .reference import dense_matrix, mix_dense

__all__ = ['mix_unchecked', 'quasiseparable_matrix', 'quasiseparable_mix']


def quasiseparable_mix(
    x: Tensor,
    dt_f: Tensor,
    dt_b: Tensor,
    A: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D: Optional[Tensor] = None,
    *,
    init_states: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
    backend: str = 'auto',
) -> Tensor:
    """Mix tokens with the data-dependent quasiseparable matrix, y = M x (Hydra, NeurIPS 2024, eq. 3).

        i > j:  M[i, j] = C_f[i-1] . B_f[j] * exp(A * sum_{k=j+1}^{i-1} dt_f[k]) * dt_f[j]
        i < j:  M[i, j] = C_b[i+1] . B_b[j] * exp(A * sum_{k=i+1}^{j-1} dt_b[k]) * dt_b[j]
        i = j:  M[i, i] = D[i]

    Args:
        x: (B, L, H, P), L >= 1.
        dt_f: (B, L, H), step sizes of the forward direction after softplus, >= 0 (not checked: it would cost a pass).
        dt_b: (B, L, H), of the backward direction.
        A: (H,), < 0. Checked on the CPU; on an accelerator reading it would stall the queue.
        B_f: (B, L, G, N), G divides H; head h reads group h * G // H. Likewise C_f, B_b, C_b.
        C_f: (B, L, G, N).
        B_b: (B, L, G, N).
        C_b: (B, L, G, N).
        D: the diagonal, (B, L, H) or (H,); None for zero.
        init_states: (H, P, N), the state from which both directions start; None for zero.
        cu_seqlens: (sequences + 1,), int32 or int64, from 0 to L: several sequences stand in one row, B = 1, token
            cu_seqlens[n] being the first of the n-th. M is then zero between them.
        backend: 'auto', 'reference', 'chunked', 'triton' or 'mamba_ssm'.

    x, B_* and C_* share one floating dtype; dt_*, A, D and init_states have that dtype or float32. Sums are accumulated
    in float32, for float64 input in float64.

    Returns:
        y (B, L, H, P), dtype of x.

    Raises:
        ValueError: a shape, A >= 0 or an unknown backend.
        TypeError: a dtype that does not fit, or not a tensor.
        RuntimeError: the named backend cannot run here.
    """
    _check({'x': x, 'B_f': B_f, 'C_f': C_f, 'B_b': B_b, 'C_b': C_b}, dt_f, dt_b, A, D, init_states)
    name = choose_backend(backend, x.device)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x, init_states)
        segments = segments_of(cu_seqlens, x.shape[1])
        dt_f, dt_b, B_f, B_b = separated(segments, dt_f, dt_b, A, B_f, B_b)
    return mix_unchecked(name, x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, D, init_states)


def quasiseparable_matrix(
    dt_f: Tensor,
    dt_b: Tensor,
    A: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D: Optional[Tensor] = None,
) -> Tensor:
    """The matrix M (B, H, L, L) of ``quasiseparable_mix``, for tests and pictures: O(L^2) memory.

    Shapes, dtypes and errors as there. float32, for float64 input float64.
    """
    _check({'B_f': B_f, 'C_f': C_f, 'B_b': B_b, 'C_b': C_b}, dt_f, dt_b, A, D, None)
    return dense_matrix(dt_f, dt_b, A, B_f, C_f, B_b, C_b, D)


def mix_unchecked(
    name: str,
    x: Tensor,
    dt_f: Tensor,
    dt_b: Tensor,
    A: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D: Optional[Tensor],
    init_states: Optional[Tensor],
) -> Tensor:
    """The operator on arguments known to fit, by a backend that can run. Autocast does not reach inside."""
    if name == 'triton':
        from .triton.api import quasiseparable_mix as mix  # lazily: importing hydra_vision must not import Triton
    elif name == 'chunked' and (
        is_exporting() or torch.onnx.is_in_onnx_export() or isinstance(x.shape[1], torch.SymInt)
    ):
        mix = mix_exported
    else:
        mix = {'reference': mix_dense, 'chunked': mix_chunked, 'mamba_ssm': mix_mamba_ssm}[name]
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):  # not so on 'meta'
        return mix(x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, D, init_states)
    with torch.autocast(device, enabled=False):  # the decays and sums keep their float32
        return mix(x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, D, init_states)


def _check(
    main: dict[str, Tensor],
    dt_f: Tensor,
    dt_b: Tensor,
    A: Tensor,
    D: Optional[Tensor],
    init_states: Optional[Tensor],
) -> None:
    """``main``: the tensors of one dtype, [x], B_f, C_f, B_b, C_b, by name."""
    side = {'dt_f': dt_f, 'dt_b': dt_b, 'A': A, 'D': D, 'init_states': init_states}
    for name, t in {**main, **side}.items():
        if t is None and name in ('D', 'init_states'):
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f'{name} must be a tensor, got {type(t).__name__}')

    first = next(iter(main))
    dtype, device = main[first].dtype, main[first].device
    if not dtype.is_floating_point:
        raise TypeError(f'{first} has dtype {dtype}; allowed: float16, bfloat16, float32, float64')
    for name, t in main.items():
        if t.dtype != dtype:
            raise TypeError(f'{name} has dtype {t.dtype}; it must be that of {first}, {dtype}')
    for name, t in side.items():
        if t is not None and t.dtype not in (dtype, torch.float32):
            raise TypeError(f'{name} has dtype {t.dtype}; allowed: that of {first}, {dtype}, or torch.float32')
    for name, t in {**main, **side}.items():
        if t is not None and t.device != device:
            raise ValueError(f'{name} is on device {t.device}; it must be on that of {first}, {device}')

    if dt_f.ndim != 3:
        raise ValueError(f'dt_f has shape {tuple(dt_f.shape)}; it must be (B, L, H)')
    batch, L, H = dt_f.shape
    if L < 1 or H < 1:
        raise ValueError(f'dt_f has shape {tuple(dt_f.shape)}, (B, L, H); L and H must be at least 1')
    B_f, x = main['B_f'], main.get('x')
    if B_f.ndim != 4:
        raise ValueError(f'B_f has shape {tuple(B_f.shape)}; it must be (B, L, G, N)')
    G, N = B_f.shape[2:]
    if G < 1 or H % G:
        raise ValueError(f'B_f has G = {G} groups; G must divide the number of heads H = {H}')
    if x is not None and x.ndim != 4:
        raise ValueError(f'x has shape {tuple(x.shape)}; it must be (B, L, H, P)')
    expected = {
        'dt_b': (dt_b, (batch, L, H), '(B, L, H)'),
        'A': (A, (H,), '(H,)'),
        **{name: (main[name], (batch, L, G, N), '(B, L, G, N)') for name in ('B_f', 'C_f', 'B_b', 'C_b')},
    }
    if x is not None:
        expected['x'] = (x, (batch, L, H, x.shape[3]), '(B, L, H, P)')
    if D is not None:
        if D.ndim == 1:
            expected['D'] = (D, (H,), '(H,)')
        else:
            expected['D'] = (D, (batch, L, H), '(B, L, H) or (H,)')
    if init_states is not None:
        expected['init_states'] = (init_states, (H, x.shape[3], N), '(H, P, N)')
    for name, (t, shape, letters) in expected.items():
        if tuple(t.shape) != shape:
            raise ValueError(f'{name} has shape {tuple(t.shape)}; it must be {letters} = {shape}')

    # Reading a value is free on the CPU only, and impossible while tracing.
    if A.device.type == 'cpu' and not torch.compiler.is_compiling():
        try:
            negative = bool((A < 0).all())
        except RuntimeError:  # nor can it be read inside torch.func.vmap, nor of a fake tensor
            negative = True
        if not negative:
            raise ValueError(f'A must be negative everywhere, got values up to {A.detach().max().item()}')

"""Launch parameters by architecture, L bucket, headdim, d_state and dtype. Plain data; nothing is measured here.

A row holds the tile T of tokens, and warps, pipeline stages and heads a program of the kernels.
``hydra_vision.ops.triton.tune`` measures candidates and prints a row for an unknown GPU.
"""

from dataclasses import dataclass, field

__all__ = ['L_BUCKETS', 'Launch', 'bucket', 'launch_for', 'shipped']

L_BUCKETS = (256, 65536)
ARCHITECTURES = (80, 89, 90)
DTYPES = ('bfloat16', 'float16', 'float32')


@dataclass(frozen=True)
class Launch:
    """One row.

    Args:
        tile: T, tokens a tile; 16, 32 or 64. States travel between tiles, so L <= T needs none.
        warps: warps of a kernel, by its name; 4 where absent.
        stages: pipeline stages of a kernel, by its name; 1 where absent.
        heads: most heads a program of a kernel that loops over them, by its name; 6 where absent.
        tail: from how many heads times batch on a last tile of 16 or 32 tokens or less is a launch of its own, which
            computes no more than that; 0: never. A launch costs small problems more than it saves. There warps, stages
            and heads are those of the name with ``_tail`` behind it, where the row has it.
    """

    tile: int
    warps: dict[str, int] = field(default_factory=dict)
    stages: dict[str, int] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    tail: int = 0

    def options(self, kernel: str, tail: bool = False) -> dict[str, int]:
        """num_warps and num_stages of one kernel."""
        return {'num_warps': _of(self.warps, kernel, tail, 4), 'num_stages': _of(self.stages, kernel, tail, 1)}

    def heads_of(self, kernel: str, available: int, tail: bool = False) -> int:
        """Heads a program: the largest divisor of ``available`` that the row allows."""
        most = min(_of(self.heads, kernel, tail, 6), available)
        return next(count for count in range(most, 0, -1) if available % count == 0)


def _of(values: dict[str, int], kernel: str, tail: bool, absent: int) -> int:
    value = values.get(kernel, absent)
    return values.get(f'{kernel}_tail', value) if tail else value


def bucket(L: int) -> int:
    """The smallest bucket that holds L tokens."""
    return next(size for size in L_BUCKETS if size >= L)


_HEADS = {'mix_heads': 12, 'mix_heads_tail': 6, 'dx_heads': 24, 'dx_heads_tail': 6, 'scores_heads': 12}
_STAGES = {
    'mix_heads': 3,
    'dx_heads': 2,
    'scores_heads': 3,
    'states': 3,
    'state_grads': 3,
    'bc_grads': 3,
    'diagonal': 3,
}
_TWO_STAGES = dict.fromkeys(_STAGES, 2)  # 99 KB of shared memory a block
_LONG = {'norm_backward': 2, 'bc_grads_tail': 1}
_SHORT = {**_LONG, 'states': 2, 'state_grads': 2}
_LOOPING = ('mix_heads', 'dx_heads', 'scores_heads', 'bc_grads')
_EIGHT, _FOUR = ({'norm_backward': 8, **dict.fromkeys(_LOOPING, warps)} for warps in (8, 4))

# bfloat16, headdim and d_state up to 64: by architecture and bucket
_TUNED = {
    (90, 256): Launch(64, _SHORT, _STAGES, _HEADS, tail=512),
    (90, 65536): Launch(64, _LONG, _STAGES, _HEADS, tail=512),
    (80, 256): Launch(64, _SHORT, _TWO_STAGES, _HEADS, tail=512),
    (80, 65536): Launch(64, _LONG, _TWO_STAGES, _HEADS, tail=512),
}
# Right everywhere, fast nowhere: float32 products, or states in float32 beside float16, or tiles of 128 columns.
_BFLOAT16_WIDE = Launch(64, _EIGHT)
_OTHERS = Launch(32, _EIGHT)
_OTHERS_WIDE = Launch(16, _FOUR)


def _row(arch: int, limit: int, P: int, N: int, dtype: str) -> Launch:
    if max(P, N) == 128:
        return _BFLOAT16_WIDE if dtype == 'bfloat16' else _OTHERS_WIDE
    return _TUNED[90 if arch >= 90 else 80, limit] if dtype == 'bfloat16' else _OTHERS


def shipped() -> dict[tuple[int, int, int, int, str], Launch]:
    """Every problem and its row of the seven: (arch, L bucket, P, N, dtype) -> Launch."""
    sizes = (16, 32, 64, 128)
    return {
        (arch, limit, P, N, dtype): _row(arch, limit, P, N, dtype)
        for arch in ARCHITECTURES
        for limit in L_BUCKETS
        for P in sizes
        for N in sizes
        for dtype in DTYPES
    }


_TABLE = shipped()


def launch_for(arch: int, L: int, P: int, N: int, dtype: str) -> Launch:
    """The row for a problem; an architecture that is not in the table uses the nearest older one.

    Args:
        arch: compute capability times ten.
        L: tokens, at most the last bucket.
        P: headdim.
        N: d_state.
        dtype: 'bfloat16', 'float16' or 'float32'.
    """
    known = max((a for a in ARCHITECTURES if a <= arch), default=ARCHITECTURES[0])
    return _TABLE[known, bucket(L), P, N, dtype]

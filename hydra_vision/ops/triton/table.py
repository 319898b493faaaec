"""Launch parameters by architecture, L bucket, headdim, d_state and element size. Plain data; nothing is measured here.

A row holds the tile T of tokens, the tiles QT a chunk, and warps and pipeline stages of each kernel that depends on them.
``hydra_vision.ops.triton.tune`` measures candidates and prints a row for an unknown GPU.
"""

from dataclasses import dataclass, field, replace

__all__ = ['L_BUCKETS', 'Launch', 'bucket', 'launch_for', 'shipped']

L_BUCKETS = (64, 256, 65536)
ARCHITECTURES = (80, 89, 90)


@dataclass(frozen=True)
class Launch:
    """One row.

    Args:
        tile: T, tokens a tile; 16, 32 or 64.
        chunk: QT, tiles a chunk; states travel between chunks, so L <= T * QT needs none.
        warps: warps of a kernel, by its name; 4 where absent.
        stages: pipeline stages of a kernel, by its name; 1 where absent.
        heads: most heads a program of a kernel that loops over them, by its name; 6 where absent.
    """

    tile: int
    chunk: int
    warps: dict[str, int] = field(default_factory=dict)
    stages: dict[str, int] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)

    def options(self, kernel: str) -> dict[str, int]:
        """num_warps and num_stages of one kernel."""
        return {'num_warps': self.warps.get(kernel, 4), 'num_stages': self.stages.get(kernel, 1)}

    def heads_of(self, kernel: str, available: int) -> int:
        """Heads a program: the largest divisor of ``available`` that the row allows."""
        most = min(self.heads.get(kernel, 6), available)
        return next(count for count in range(most, 0, -1) if available % count == 0)


def bucket(L: int) -> int:
    """The smallest bucket that holds L tokens."""
    return next(size for size in L_BUCKETS if size >= L)


def _row(arch: int, limit: int, P: int, N: int, itemsize: int) -> Launch:
    wide = max(P, N) == 128
    tile = 32 if itemsize == 4 else 64
    if itemsize == 4 and wide:
        tile = 16
    if itemsize == 4 or wide:
        return Launch(tile, 1, {'norm_backward': 8})
    stages = {'mix_heads': 3, 'dx_heads': 2, 'scores_heads': 3, 'states': 3, 'state_grads': 3, 'bc_grads': 3}
    stages['diagonal'] = 3
    heads = {'mix_heads': 24, 'dx_heads': 24, 'scores_heads': 12}
    if arch < 90:  # 99 KB of shared memory a block
        stages = {kernel: min(count, 2) for kernel, count in stages.items()}
    return Launch(tile, 1, {'norm_backward': 8}, stages, heads)


def shipped() -> dict[tuple[int, int, int, int, int], Launch]:
    """Every row: (arch, L bucket, P, N, bytes an element) -> Launch."""
    sizes = (16, 32, 64, 128)
    return {
        (arch, limit, P, N, item): _row(arch, limit, P, N, item)
        for arch in ARCHITECTURES
        for limit in L_BUCKETS
        for P in sizes
        for N in sizes
        for item in (2, 4)
    }


_TABLE = shipped()


def launch_for(arch: int, L: int, P: int, N: int, itemsize: int) -> Launch:
    """The row for a problem; an architecture that is not in the table uses the nearest older one."""
    known = max((a for a in ARCHITECTURES if a <= arch), default=ARCHITECTURES[0])
    return _TABLE[known, bucket(L), P, N, itemsize]


def with_chunk(launch: Launch, chunk: int) -> Launch:
    """The same row with another chunk length."""
    return replace(launch, chunk=chunk)

"""Compile what the launch table ships, without a GPU: registers, spills, shared memory."""

import importlib.util
import os
import re
import subprocess
import tempfile

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='the package triton is not installed'),
    pytest.mark.skipif(os.environ.get('TRITON_INTERPRET') == '1', reason='the interpreter compiles nothing'),
]

SPILL_LIMIT = 256  # bytes a thread
HOPPER_SPILL_LIMIT = 192  # products over whole chunks, which fill the registers: at most 168, with Triton 3.8
SLOW_SPILL_LIMIT = 12288  # rows that are right but not tuned: float16, float32, 128 columns (NOTES.md)


def compiled(arch: int, L: int, **problem):
    from hydra_vision.ops.triton.offline import compile_launch, problem_launches

    return [compile_launch(launch, arch) for launch in problem_launches(arch, L, **problem)]


def check(arch: int, results, spill_limit: int = SPILL_LIMIT) -> None:
    from hydra_vision.ops.triton.offline import SHARED_MEMORY

    limit = SHARED_MEMORY[arch]
    bad = [r for r in results if r.shared > limit or r.registers > 255 or r.spills > spill_limit]
    assert results
    assert not bad, bad


@pytest.mark.slow
@pytest.mark.parametrize('arch', [80, 89, 90])
@pytest.mark.parametrize('L', [49, 196])
def test_base_model(arch, L):
    """The portable kernels; with two groups of B and C, as with one they do not run on Hopper."""
    check(arch, compiled(arch, L, G=2 if arch == 90 else 1))


@pytest.mark.slow
@pytest.mark.parametrize('L', [64, 128, 196, 1092])
def test_base_model_on_hopper(L):
    """One, two and four tiles, and chunks of three with states between them."""
    results = compiled(90, L)
    check(90, results, HOPPER_SPILL_LIMIT)
    names = [r.name for r in results]
    assert names.count('mix_chunk_kernel') == 2
    assert {'conv_diagonal_kernel', 'score_grads_kernel', 'chunk_bc_grads_kernel'} <= set(names)
    assert ('chunk_states_kernel' in names) == (L > 200)


@pytest.mark.slow
@pytest.mark.parametrize('arch', [80, 89, 90])
def test_every_row(arch):
    """Each set of launch parameters with the largest sizes that it is shipped for: smaller ones need no more memory.

    All sizes: ``python -m hydra_vision.ops.triton.offline``. sm_89 has sm_80's rows: once is enough, but for bfloat16.
    """
    from hydra_vision.ops.triton.offline import compile_launch, table_launches

    launches = table_launches(arch, largest=True)
    if arch == 89:
        known = table_launches(80, largest=True)
        launches = {k: label for k, label in launches.items() if k not in known or 'P 64, N 64, bfloat16' in label}
    tuned = [compile_launch(k, arch) for k, label in launches.items() if 'P 64, N 64, bfloat16' in label]
    others = [compile_launch(k, arch) for k, label in launches.items() if 'P 64, N 64, bfloat16' not in label]
    check(arch, tuned, 2 * SPILL_LIMIT)
    if arch != 89:
        check(arch, others, SLOW_SPILL_LIMIT)


def test_every_bucket_is_compiled_with_its_own_row():
    from hydra_vision.ops.triton.offline import table_launches
    from hydra_vision.ops.triton.table import L_BUCKETS, launch_for

    launches = table_launches(90, largest=True).items()
    states = [k for k, label in launches if k.name == 'states_kernel' and 'P 64, N 64, bfloat16' in label]
    found = {dict(k.options)['num_warps'] for k in states}
    assert found == {launch_for(90, L, 64, 64, 'bfloat16').options('states')['num_warps'] for L in L_BUCKETS}


@pytest.mark.parametrize('L', [20, pytest.param(212, marks=pytest.mark.slow)])
def test_short_last_tile(L):
    """20 tokens in the last of four tiles, or in all: the other kernels are those of any length."""
    from hydra_vision.ops.triton.offline import compile_launch, problem_launches

    launches = [k for k in problem_launches(90, L, G=2, inner=False) if dict(k.constants).get('R') == 32]
    assert len(launches) == 4
    check(90, [compile_launch(launch, 90) for launch in launches])


@pytest.mark.slow
@pytest.mark.parametrize('arch', [80, 90])
@pytest.mark.parametrize(('H', 'P'), [(13, 64), (17, 16), (22, 64)])
def test_heads_that_few_numbers_divide(arch, H, P):
    """Programs over one head each leave the scores' gradient in as many parts as there are heads."""
    from hydra_vision.ops.triton.offline import compile_launch, problem_launches

    launches = problem_launches(arch, 196, H=H, P=P, inner=False, init_states=True)  # with them in tiles on Hopper too
    check(arch, [compile_launch(launch, arch) for launch in launches if launch.name == 'bc_grads_kernel'])


@pytest.mark.slow
@pytest.mark.parametrize(('H', 'P'), [(17, 16), (17, 32), (1, 16)])
def test_descriptors_of_one_head(H, P):
    """ptxas adds to the low word of a 64-bit descriptor and carries into the high one, which must then be zero before.

    With a loop of one turn, which Triton removes, ptxas of Triton 3.6 took the low word for both (NOTES.md).
    """
    from triton import knobs

    from hydra_vision.ops.triton.offline import compile_kernel, problem_launches

    for launch in problem_launches(90, 196, H=H, P=P, inner=False):
        if 'heads' not in launch.name:
            continue
        with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
            file.write(compile_kernel(launch, 90).asm['cubin'])
            file.flush()
            command = [knobs.nvidia.nvdisasm.path, '-c', file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert 'HGMMA' in text or 'HMMA' in text
        last = {}  # what wrote each uniform register
        for line in text.splitlines():
            carry = re.search(r'UIADD3\.X UR\d+, (UR\d+), -?0x\w+, URZ, UP\d', line)
            if carry and carry[1] != 'URZ':
                assert 'URZ' in last.get(carry[1], ''), f'{launch.name}: {line}'
            written = re.search(r'\*/\s+(?:@!?U?P\d\s+)?(?:U\w[\w.]*|R2UR)\s+(?:UP\d, )?(UR\d+)', line)
            if written:
                last[written[1]] = line


@pytest.mark.slow
@pytest.mark.parametrize('arch', [80, 90])
def test_many_wide_heads(arch):
    """The diagonal's gradient returns through a product over all heads, here 128 of 64 columns."""
    from hydra_vision.ops.triton.offline import compile_launch, problem_launches

    launches = problem_launches(arch, 196, H=128)
    check(arch, [compile_launch(launch, arch) for launch in launches if launch.name == 'dx_heads_kernel'])


@pytest.mark.parametrize('arch', [80, 90])
def test_layer_norm(arch):
    from hydra_vision.ops.triton.offline import compile_launch, layer_norm_launches

    for D in (768, 4096):
        results = [compile_launch(launch, arch) for launch in layer_norm_launches(D)]
        check(arch, results, spill_limit=0)


@pytest.mark.parametrize('arch', [80, 90])
def test_packed_rows(arch):
    """What knows of borders: the decays and the convolutions; the rest is compiled above."""
    from hydra_vision.ops.triton.offline import compile_launch, problem_launches

    launches = problem_launches(arch, 392, B=1, packed=True)
    known = [launch for launch in launches if 'decay' in launch.name or 'conv' in launch.name]
    assert len(known) == 5
    check(arch, [compile_launch(launch, arch) for launch in known])


@pytest.mark.parametrize('arch', [80, 89, 90])
def test_selective_scan(arch):
    from hydra_vision.ops.triton.offline import compile_launch, selective_scan_launches

    results = [compile_launch(launch, arch) for launch in selective_scan_launches(16)]
    assert len(results) == 2
    check(arch, results, spill_limit=0)


def test_recording_needs_no_device():
    from hydra_vision.ops.triton.offline import problem_launches

    names = {launch.name for launch in problem_launches(80, 196)}
    assert {'conv7_kernel', 'mix_heads_kernel', 'norm_gate_kernel', 'dx_heads_kernel'} <= names
    names = {launch.name for launch in problem_launches(90, 196)}
    assert {'conv_diagonal_kernel', 'mix_chunk_kernel', 'score_grads_kernel', 'chunk_decay_backward_kernel'} <= names
    assert not any('heads' in name for name in names)

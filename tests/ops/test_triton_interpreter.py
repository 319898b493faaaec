"""Runs the tests of the kernels in Triton's interpreter: the same kernels, on the CPU, at small sizes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='the package triton is not installed')
@pytest.mark.parametrize('which', ['not slow', 'slow'], ids=['push', 'full'])
def test_kernels_in_the_interpreter(which):
    """In two processes, side by side."""
    groups = (
        ('test_triton_kernels.py', 'test_triton_layernorm.py', 'test_triton_selective_scan.py'),
        ('test_chunks.py',),
    )
    started = [
        subprocess.Popen(
            [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '-m', which]
            + [str(Path(__file__).with_name(name)) for name in names],
            env={**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for names in groups
    ]
    try:
        outputs = [process.communicate(timeout=1200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    if any('only 0-dimensional arrays can be converted' in output for output in outputs):
        pytest.skip('the interpreter of this Triton does not run with this NumPy')  # 3.6 with NumPy 2.4 or newer
    for process, output in zip(started, outputs):
        assert process.returncode == 0, output[-4000:]
        assert ' passed' in output
        assert ' skipped' not in output

"""Runs the tests of the kernels in Triton's interpreter: the same kernels, on the CPU, at small sizes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='the package triton is not installed')
def test_kernels_in_the_interpreter():
    names = ('test_chunks.py', 'test_triton_kernels.py', 'test_triton_layernorm.py')
    targets = [str(Path(__file__).with_name(name)) for name in names]
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', *targets],
        env={**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    if 'only 0-dimensional arrays can be converted' in result.stdout:  # Triton 3.6 with NumPy 2.4 or newer
        pytest.skip('the interpreter of this Triton does not run with this NumPy')
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert ' passed' in result.stdout
    assert ' skipped' not in result.stdout

"""Every command with odd files, folders and arguments: one line, the documented exit code, nothing written or lost."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hydra_vision.cli import main

MODEL = ['--model', 'test_hydra_vit', '--random-init', '--img-size', '32', '--device', 'cpu']
WEIGHTS = ['--model', 'test_hydra_vit', '--img-size', '32', '--checkpoint']


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with good images and all kinds of odd files."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ('a', 'b'):
        (tmp_path / 'images' / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'images' / name / f'{i}.png')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'zero').write_bytes(b'')
    (tmp_path / 'text').write_text('a,b\n1,2\n')
    (tmp_path / 'binary').write_bytes(bytes(range(256)) * 20)
    torch.save([1, 2], tmp_path / 'list.pth')
    torch.save({}, tmp_path / 'nothing.pth')
    torch.save({'state_dict': {}}, tmp_path / 'inner.pth')
    torch.save({'format': 2, 'config': {}, 'state_dict': {}}, tmp_path / 'run.pth')
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'code.pth')
    torch.save({'x': torch.zeros(2)}, tmp_path / 'other.pth')
    (tmp_path / 'cut.pth').write_bytes((tmp_path / 'other.pth').read_bytes()[:600])
    save_file({'x': torch.zeros(2)}, tmp_path / 'other.safetensors')
    (tmp_path / 'cut.safetensors').write_bytes((tmp_path / 'other.safetensors').read_bytes()[:40])
    os.mkfifo(tmp_path / 'pipe')
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def fails(place: Path, capfd, argv: list[str], lines: int = 1) -> None:
    """The command fails as documented; an exception would be a traceback."""
    before = contents(place)
    try:
        code = main(argv)
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capfd.readouterr()
    assert code in (1, 2), argv
    assert 1 <= len(captured.err.strip().splitlines()) <= lines, captured.err
    assert len(captured.err) < 600, captured.err
    assert 'Traceback' not in captured.err
    assert '\x1b' not in captured.err
    assert contents(place) == before, argv


CHECKPOINTS = [
    *('zero', 'text', 'binary', 'list.pth', 'nothing.pth', 'inner.pth', 'run.pth', 'code.pth', 'other.pth', 'cut.pth'),
    *('other.safetensors', 'cut.safetensors', 'pipe', 'empty', 'images', 'gone', '', '~nobody-of-this-name/x'),
]


@pytest.mark.parametrize('odd', CHECKPOINTS)
def test_checkpoints(odd, place, capfd):
    for argv in (
        ['extract', 'images', '--output', 'f.npy', '--device', 'cpu', *WEIGHTS, odd],
        ['probe', 'knn', 'images', 'images', '--device', 'cpu', *WEIGHTS, odd],
        ['visualize', 'pca', 'images', '--device', 'cpu', *WEIGHTS, odd],
        ['export', 'onnx', '--output', 'm.onnx', *WEIGHTS, odd],
        ['runs', 'average', odd, odd, '--output', 'mean.pt'],
        ['runs', 'export', odd, '--output', 'model'],
        ['runs', 'compare', odd],
        ['train', '--validate', odd],
        ['train', '--resume', odd, '--output', 'out'],
        ['segment', 'compare', odd, '--output', 'out'],
    ):
        fails(place, capfd, argv, lines=3)


@pytest.mark.parametrize('odd', ['zero', 'text', 'binary', 'pipe', 'empty', 'gone', '', 'code.pth', '/dev/null'])
def test_images(odd, place, capfd):
    for argv in (
        ['extract', odd, '--output', 'f.npy', *MODEL],
        ['probe', 'knn', odd, 'images', *MODEL],
        ['probe', 'linear', 'images', odd, *MODEL],
        ['visualize', 'similarity', odd, *MODEL],
        ['train', '--data-dir', odd, '--model', 'test_hydra_vit', '--output', 'out', '--device', 'cpu'],
        ['segment', 'train', odd, '--output', 'out', '--model', 'test_hydra_vit', '--device', 'cpu'],
    ):
        fails(place, capfd, argv)


@pytest.mark.parametrize('odd', ['', 'gone/x', 'text/x', '/proc/self/x', 'images', 'text'])
def test_outputs(odd, place, capfd):
    for argv, suffix in (
        (['extract', 'images', *MODEL], '.npy'),
        (['visualize', 'pca', 'images', *MODEL], '.png'),
        (['export', 'onnx', '--model', 'test_hydra_vit', '--random-init'], '.onnx'),
        (['runs', 'average', 'run.pth', 'run.pth'], '.pt'),
    ):
        output = odd + suffix if '/' in odd else odd
        fails(place, capfd, [*argv, '--output', output])


@pytest.mark.parametrize(
    'words',
    [
        *(['--img-size', size] for size in ('1000000', '0', '-32', '32x', 'x', '', '3.5', '33')),
        *(
            ['--model-kwargs', pair]
            for pair in ('depth=x', 'depth=-1', 'patch_size=0', 'depth', 'unknown=1', 'd_state=[')
        ),
        *(['--model', name] for name in ('', 'hydra_vit_tyni', 'local-dir:gone', 'local-dir:')),
        *(['--device', name] for name in ('', 'nonsense', 'cuda:99', 'meta')),
        *(['--mean', text] for text in ('', 'a,b,c', '1,2', 'nan,0,0')),
        ['--std', '0,0,0'],
        ['--unknown'],
        ['one-more'],
    ],
)
def test_arguments(words, place, capfd):
    for argv in (
        ['extract', 'images', '--output', 'f.npy', *MODEL],
        ['probe', 'linear', 'images', 'images', *MODEL],
        ['visualize', 'pca', 'images', *MODEL],
    ):
        fails(place, capfd, [*argv, *words])


CLI = [sys.executable, '-m', 'hydra_vision.cli']


def run(command: str | list[str], **kwargs) -> subprocess.CompletedProcess:
    command = command if isinstance(command, list) else ['bash', '-c', command]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **kwargs)


@pytest.mark.slow
def test_streams_that_cannot_be_written(place):
    """A full disk, a reader that has left, closed streams, a locale without UTF-8, names that are none."""
    with open('/dev/full', 'w') as full:
        done = run([*CLI, 'env'], stdout=full)
    assert done.returncode == 1
    assert done.stderr == 'hydra-vision env: error: [Errno 28] No space left on device\n'
    done = run(f'set -o pipefail; {" ".join(CLI)} models | true')
    assert (done.returncode, done.stderr) == (0, '')
    assert run(f'{" ".join(CLI)} models >&- 2>&-').returncode == 0
    odd = os.fsdecode(os.fsencode('images/a/') + b'\xff\xe9.png')
    Path(odd).write_bytes(b'no image')
    for number, environment in enumerate(({}, {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'})):
        command = [*CLI, 'extract', 'images', '--output', f'{number}.npy', *MODEL]
        done = run(command, stdout=subprocess.PIPE, env={**os.environ, **environment})
        assert done.returncode == 0, done.stderr
        assert '1 unreadable' in done.stdout

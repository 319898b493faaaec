"""`python -m hydra_vision.run`: scripts that were never told about us."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What timm's validate.py does with a name, and what a script may expect of its surroundings.
SCRIPT = """
import argparse, sys
from pathlib import Path
import neighbour                      # a module next to the script
from torch.utils.data import DataLoader

class Numbers:                        # spawned workers find it in __main__
    def __len__(self): return 4
    def __getitem__(self, i): return i

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('data')
    parser.add_argument('--model')
    args = parser.parse_args()
    import timm
    assert timm.is_model(args.model), args.model
    model = timm.create_model(args.model, num_classes=3, device='meta')
    assert sys.argv[0] == __file__ and Path(__file__).name == 'validate.py'
    loader = DataLoader(Numbers(), batch_size=2, num_workers=1, multiprocessing_context='spawn')
    print(args.data, model.num_classes, neighbour.VALUE, [b.tolist() for b in loader])
    sys.exit(7)

if __name__ == '__main__':
    main()
"""


@pytest.fixture
def script(tmp_path) -> Path:
    (tmp_path / 'neighbour.py').write_text('VALUE = 42\n')
    path = tmp_path / 'validate.py'
    path.write_text(SCRIPT)
    return path


def python(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([root, os.environ.get('PYTHONPATH', '')])}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **kwargs)


def test_a_script_finds_our_models(script):
    done = python('-m', 'hydra_vision.run', script, 'photos', '--model', 'test_hydra_vit')
    assert done.returncode == 7, done.stderr
    assert done.stdout.split(maxsplit=3) == ['photos', '3', '42', '[[0, 1], [2, 3]]\n']


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason='Python 3.11 brought PYTHONSAFEPATH')
def test_no_entry_of_the_path_is_lost(tmp_path):
    """Under PYTHONSAFEPATH the first entry is not the working directory, but one of the user's."""
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere' / 'neighbour.py').write_text('VALUE = 7')
    (tmp_path / 'script.py').write_text('import sys, neighbour; sys.exit(neighbour.VALUE)')
    path = os.pathsep.join([str(tmp_path / 'elsewhere'), str(Path(__file__).resolve().parents[1])])
    environment = {**os.environ, 'PYTHONPATH': path, 'PYTHONSAFEPATH': '1'}
    command = [sys.executable, '-m', 'hydra_vision.run', str(tmp_path / 'script.py')]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 7, done.stderr


def test_a_module(tmp_path):
    (tmp_path / 'client.py').write_text('import sys, timm; sys.exit(timm.is_model(sys.argv[1]) and 7)')
    done = python('-m', 'hydra_vision.run', '-m', 'client', 'test_hydra_vit', cwd=tmp_path)
    assert done.returncode == 7, done.stderr


@pytest.mark.slow
def test_what_train_py_does_with_device_modules():
    code = 'import importlib, timm; [importlib.import_module(m) for m in ("hydra_vision", "hydra_vision")];'
    done = python('-W', 'error', '-c', code + 'import hydra_vision.run; assert timm.is_model("test_hydra_vit")')
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ('arguments', 'code', 'text'),
    [
        ([], 2, 'nothing to run'),
        (['--model'], 2, 'unknown option'),
        (['none.py'], 2, 'no script'),
        (['-h'], 0, 'usage'),
    ],
)
def test_arguments(arguments, code, text, capsys):
    from hydra_vision.run import main

    if code:
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == code
    else:
        main(arguments)
    captured = capsys.readouterr()
    assert text in captured.err + captured.out

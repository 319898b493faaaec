import itertools
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hydra_vision.train import data, report, sources
from hydra_vision.train.checkpoint import LAST, load_checkpoint
from hydra_vision.train.config import Config
from hydra_vision.train.main import main

COLORS = {'blue': (30, 30, 200), 'green': (30, 200, 30), 'red': (200, 30, 30)}

# A recipe small enough for many runs: 4 tokens, one block, 6 batches an epoch.
TINY = """
model: {name: hydra_vit_nano, drop_path_rate: 0.1, kwargs: {patch_size: 4, depth: 1, embed_dim: 64}}
data: {img_size: 8, batch_size: 8, workers: 0}
optim: {lr: 2e-3}
schedule: {epochs: 3, warmup_epochs: 1}
ema: {decay: 0.9}
run: {device: cpu, threads: 1}
"""


@pytest.fixture(autouse=True)
def in_scratch_folder(tmp_path, monkeypatch):
    """Runs write to output/ in the current folder, and set the number of threads of the process."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def curves_are_not_drawn(request, monkeypatch):
    """Drawing takes as long as the rest of a small run; one test looks at the picture."""
    if 'picture' not in request.node.name:
        monkeypatch.setattr(report, 'write_curve', lambda folder, *_: (folder / 'curve.png').touch())


def save_images(folder: Path, count: int, color: Sequence[int], size: int = 24, suffix: str = '.png') -> None:
    """Noisy images around one colour."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(sum(color))
    for index in range(count):
        noise = generator.normal(color, 20, (size, size, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(folder / f'{index:03}{suffix}')


@pytest.fixture(scope='session')
def tiny(tmp_path_factory) -> tuple[str, ...]:
    """Arguments of a run on 48 training and 18 validation images that takes about a second."""
    folder = tmp_path_factory.mktemp('tiny')
    (folder / 'tiny.yaml').write_text(TINY)
    for label, color in COLORS.items():
        save_images(folder / 'train' / label, 16, color, size=12)
        save_images(folder / 'val' / label, 6, color, size=12)
    return ('--config', str(folder / 'tiny.yaml'), '--data-dir', str(folder))


@pytest.fixture(scope='session')
def whole(tiny, tmp_path_factory) -> Path:
    """A run of ``tiny`` that is done: to compare with, not to be changed."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    assert main([*tiny, '--output', str(folder)]) == 0
    return folder


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    """A copy of it, ``run`` in the current folder."""
    return Path(shutil.copytree(whole, tmp_path / 'run'))


@pytest.fixture
def image_folder(tmp_path) -> Callable[..., Path]:
    """Builds an ImageNet-style folder of three classes that differ in colour."""

    def build(name: str = 'images', train: int = 8, val: int = 3, suffix: str = '.png') -> Path:
        for split, count in (('train', train), ('val', val)):
            for label, color in COLORS.items():
                save_images(tmp_path / name / split / label, count, color, suffix=suffix)
        return tmp_path / name

    return build


@pytest.fixture
def loaders() -> Iterator[Callable[..., tuple]]:
    """Opens the data of a recipe; gives its training and its validation loader on the CPU."""

    built = []

    def build(config: Config) -> tuple:
        train, val = sources.open_splits(config)
        arguments = (sources.count_classes(config, train), torch.nn.Identity(), torch.device('cpu'))
        built.append((data.train_loader(config, train, *arguments), data.val_loader(config, val, *arguments)))
        return built[-1]

    yield build
    for loader in itertools.chain(*built):
        data.end_processes(loader)


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str, str]]:
    """Calls the training command; gives its exit code, output and error text."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def fails(run) -> Callable[..., str]:
    """Calls the training command, expects it to end with a message (not a traceback), and gives the message."""

    def call(*arguments: object, code: int) -> str:
        got, _, error = run(*arguments)
        assert got == code, error
        assert error.startswith('error: ')
        assert error.count('\n') == 1, error
        return error

    return call


@pytest.fixture
def validated(run) -> Callable[..., dict]:
    """Results of `--validate --json`."""

    def call(*arguments: object) -> dict:
        code, out, error = run('--validate', *arguments, '--json')
        assert code == 0, error
        return json.loads(out)['results']

    return call


def _autograd_has_threads() -> bool:
    """Whether an earlier test of this process has started them, where the system tells."""
    names = (path.read_text() for path in Path('/proc/self/task').glob('*/comm'))
    return any(name.startswith('pt_autograd') for name in names)


class Processes:
    """Training commands in processes that are forked from this one, where everything is imported already.

    Args:
        folder: that they run in; receives what they print as `RANK.log`.
        arguments: of the training command.
        world: how many processes make up the run.
    """

    def __init__(self, folder: Path, arguments: Sequence[object], world: int = 1):
        self.folder, self.world = folder, world
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        self.ids = [self._fork(rank, port, [str(argument) for argument in arguments]) for rank in range(world)]

    def _fork(self, rank: int, port: int, arguments: list[str]) -> int:
        if _autograd_has_threads():
            return self._spawn(rank, port, arguments)
        environment = self._environment(rank, port)
        process = os.fork()
        if process:
            return process
        code = 99
        try:  # the child: nothing of pytest may run in it
            log = os.open(self.folder / f'{rank}.log', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', closefd=False)  # noqa: SIM115
            os.environ.update(environment)
            code = main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        """What torchrun sets; nothing for a single process."""
        if self.world == 1:
            return {}
        own = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.world), LOCAL_WORLD_SIZE=str(self.world))
        return own | dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))

    def _spawn(self, rank: int, port: int, arguments: list[str]) -> int:
        """A new interpreter, which imports everything: autograd does not survive a fork once it has threads."""
        environment = os.environ | self._environment(rank, port)
        log = os.open(self.folder / f'{rank}.log', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        command = [sys.executable, '-m', 'hydra_vision.train', *arguments]
        actions = [(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
        process = os.posix_spawn(sys.executable, command, environment, file_actions=actions)
        os.close(log)
        return process

    def kill(self, number: int) -> None:
        """Sends a signal to all of them."""
        for process in self.ids:
            os.kill(process, number)

    def wait(self, seconds: float = 60) -> list[int]:
        """Exit codes, -N for an end by signal N."""
        codes, end = [], time.monotonic() + seconds
        for process in self.ids:
            while True:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    codes.append(os.waitstatus_to_exitcode(status))
                    break
                if time.monotonic() > end:
                    self.kill(signal.SIGKILL)
                    raise AssertionError(f'still running after {seconds} s: {self.output()}')
                time.sleep(0.01)
        return codes

    def output(self) -> str:
        """What they printed."""
        logs = [self.folder / f'{rank}.log' for rank in range(self.world)]
        return ''.join(log.read_text() for log in logs if log.is_file())

    def wait_for_update(self, run: Path, update: int, seconds: float = 60) -> int:
        """Waits until a row of steps.csv is there; the last one's update."""
        end, path = time.monotonic() + seconds, run / 'steps.csv'
        while time.monotonic() < end:
            rows = path.read_text().splitlines()[1:] if path.is_file() else []
            reached = max((int(row.split(',')[0]) for row in rows if row.split(',')[0].isdigit()), default=0)
            if reached >= update:
                return reached
            assert all(os.waitpid(process, os.WNOHANG)[0] == 0 for process in self.ids), self.output()
            time.sleep(0.002)
        raise AssertionError(f'update {update} not reached in {seconds} s: {self.output()}')


@pytest.fixture
def processes(tmp_path) -> Callable[..., Processes]:
    """Starts training commands in processes of their own."""
    if not hasattr(os, 'fork'):
        pytest.skip('needs fork')

    def start(*arguments: object, world: int = 1) -> Processes:
        return Processes(tmp_path, arguments, world)

    return start


@pytest.fixture
def killed_at_update_8(processes, tmp_path) -> Callable[..., str]:
    """Starts two processes, kills them behind update 8 and lets them go on, in ``parts``; what those print."""

    def go(*command: object) -> str:
        killed = processes(*command, '--output', 'parts', world=2)
        killed.wait_for_update(tmp_path / 'parts', 8)
        killed.kill(signal.SIGKILL)
        killed.wait()
        again = processes(*command, '--output', 'parts', '--resume', 'auto', world=2)
        assert again.wait() == [0, 0], again.output()
        return again.output()

    return go


def same(first, second) -> bool:
    """Bitwise equality of nested containers of tensors."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or (first != first and second != second)


@pytest.fixture
def assert_same_run() -> Callable[[Path, Path], None]:
    """Compares the last checkpoints of two runs bit by bit, and the history but for times."""

    def check(first: Path, second: Path) -> None:
        states = [load_checkpoint(folder / LAST) for folder in (first, second)]
        for state in states:
            for row in state['history']:
                for key in ('seconds', 'images_per_second', 'data_wait', 'mfu', 'peak_memory_gib'):
                    row.pop(key, None)
        for key in ('epoch', 'updates', 'state_dict', 'state_dict_ema', 'optimizer', 'random', 'best', 'history'):
            assert same(states[0][key], states[1][key]), key

    return check

"""The package as users get it: cheap to import, complete when installed from a wheel or built from an sdist."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, **kwargs) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_is_light():
    code = (
        'import sys, timm; before = set(sys.modules);'
        'import hydra_vision, hydra_vision.downstream, hydra_vision.ops.triton, torch;'
        'assert not torch.cuda.is_initialized();'
        'heavy = {"triton", "matplotlib", "sklearn", "rich", "mamba_ssm", "scipy", "pandas", "transformers", "lightly",'
        '"segmentation_models_pytorch", "onnx", "onnxruntime", "torchao", "captum", "pytorch_grad_cam", "pyarrow"};'
        'print(sorted(heavy & (set(sys.modules) - before)))'
    )
    assert run(sys.executable, '-c', code).strip() == '[]'


def test_import_takes_at_most_a_fifth_longer_than_timm():
    # CPU time of both in one process: a busy machine slows them alike
    code = (
        'import time; a = time.process_time(); import timm; b = time.process_time(); import hydra_vision;'
        'print(b - a, time.process_time() - a)'
    )
    pairs = []
    while len(pairs) < 3 and not any(ours <= 1.2 * theirs for theirs, ours in pairs):
        pairs.append(tuple(map(float, run(sys.executable, '-c', code).split())))
    assert min(ours / theirs for theirs, ours in pairs) <= 1.2, pairs


def test_importing_twice_is_harmless():
    code = (
        'import sys, timm, hydra_vision; n = timm.list_models("*hydra_vit*");'
        '[sys.modules.pop(m) for m in list(sys.modules) if m.startswith("hydra_vision")];'
        'import hydra_vision; assert timm.list_models("*hydra_vit*") == n;'
        'timm.create_model("test_hydra_vit", device="meta")'
    )
    run(sys.executable, '-W', 'ignore', '-c', code)


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(tmp_path):
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob('*.whl')
    (sdist,) = tmp_path.glob('*.tar.gz')
    names = zipfile.ZipFile(wheel).namelist()
    assert 'hydra_vision/configs/hydra_vit_base_imagenet1k.yaml' in names
    assert any(n.endswith('licenses/LICENSE') for n in names)
    assert not any(n.startswith(('tests/', 'benchmarks/', 'output/')) for n in names)
    with tarfile.open(sdist) as archive:
        members = {n.split('/', 1)[1] for n in archive.getnames() if '/' in n}
    assert {'train_imagenet.py', 'README.md', 'LICENSE', 'hydra_vision/__init__.py'} <= members
    assert any(n.startswith('configs/') for n in members)
    assert {'benchmarks/goals.yaml', 'benchmarks/ablation/table2.yaml'} <= members
    assert any(n.startswith('tests/') for n in members)

    site = tmp_path / 'site'
    run(sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', str(site), str(wheel))
    environment = {**os.environ, 'PYTHONPATH': str(site)}
    code = (
        'import hydra_vision, timm, pathlib; from hydra_vision.train.config import recipe_folder, recipe_names;'
        'print(pathlib.Path(hydra_vision.__file__).parent); print(recipe_folder()); print(len(recipe_names()));'
        'timm.create_model("hydra_vit_nano", device="meta")'
    )
    package, recipes, count = run(sys.executable, '-c', code, cwd=tmp_path, env=environment).split()
    assert Path(package) == site / 'hydra_vision'
    assert Path(recipes) == site / 'hydra_vision' / 'configs'
    assert int(count) >= 6
    for command in ('env', 'models'):
        out = run(sys.executable, '-m', 'hydra_vision.cli', command, '--json', cwd=tmp_path, env=environment)
        assert str(ROOT) not in out

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml

import hydra_vision
from hydra_vision.train.checkpoint import BEST, LAST, load_checkpoint, save_checkpoint

ROOT = Path(hydra_vision.__file__).parents[1]
FILES = {'best.pt', 'checkpoints', 'config.yaml', 'curve.png', 'last.pt', 'results.md', 'run.json', 'summary.csv'}


def script(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Runs train_imagenet.py as a user does."""
    if not (ROOT / 'train_imagenet.py').is_file():
        pytest.skip('train_imagenet.py is part of the checkout, not of the installed package')
    command = [sys.executable, str(ROOT / 'train_imagenet.py'), *map(str, arguments)]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_a_full_disk_behind_stdout_is_one_line():
    if not os.path.exists('/dev/full'):
        pytest.skip('this system has no /dev/full')
    with open('/dev/full', 'w') as full:
        command = [sys.executable, str(ROOT / 'train_imagenet.py'), '--list-configs']
        environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (1, 'train_imagenet.py: error: [Errno 28] No space left on device\n')


@pytest.mark.slow
def test_the_demonstration_learns_real_images_in_two_minutes(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = script(cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime  # it is one thread's work; the wall clock also tells of the neighbours
    assert result.returncode == 0, result.stderr
    folder = tmp_path / 'output' / 'hydra_vit_nano_digits'
    assert {path.name for path in folder.iterdir()} == {*FILES, 'steps.csv', 'mixers.csv'}
    assert str(folder.relative_to(tmp_path)) in result.stdout
    rows = (folder / 'summary.csv').read_text().splitlines()
    last = dict(zip(rows[0].split(','), rows[-1].split(','), strict=True))
    assert min(float(last['val_top1']), float(last['ema_top1'])) >= 95
    assert seconds < 120, f'took {seconds:.0f} s of a processor'


def test_the_imagenet_recipe_runs_on_a_folder(run, validated, image_folder, tmp_path):
    """`--data-dir` alone picks the ImageNet recipe; only sizes are made small here."""
    folder = image_folder(train=8, val=4)
    shrink = ('--model', 'test_hydra_vit', '--num-classes', 3, '--img-size', 32, '--batch-size', 4, '--epochs', 2)
    shrink = (*shrink, '--set', 'schedule.warmup_epochs=1', '--workers', 0, '--device', 'cpu')
    code, out, error = run('--data-dir', folder, *shrink)
    assert code == 0, error
    output = tmp_path / 'output' / 'hydra_vit_base_imagenet1k'
    assert {path.name for path in output.iterdir()} == FILES
    recipe = yaml.safe_load((output / 'config.yaml').read_text())
    assert recipe['augment']['auto_augment'] == 'rand-m9-mstd0.5-inc1'
    assert recipe['optim']['accum_steps'] == 4
    assert recipe['run']['amp'] == 'bf16'
    assert '24 training and 12 validation images, 3 classes' in out
    assert load_checkpoint(output / BEST)['classes'] == ['blue', 'green', 'red']
    assert validated(output)['raw']['images'] == 12


def test_the_result_is_a_timm_checkpoint(finished, tmp_path):
    kwargs = {'img_size': 8, 'num_classes': 3, 'patch_size': 4, 'depth': 1, 'embed_dim': 64}
    model = timm.create_model('hydra_vit_nano', checkpoint_path=str(tmp_path / 'run' / BEST), **kwargs)
    state = load_checkpoint(tmp_path / 'run' / BEST)['state_dict_ema']
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_run_is_never_overwritten(tiny, run, fails, tmp_path):
    for name in ('tiny', 'tiny-1'):
        assert run(*tiny, '--epochs', '2')[0] == 0
        assert {path.name for path in (tmp_path / 'output' / name).iterdir()} == FILES
    before = (tmp_path / 'output' / 'tiny' / BEST).read_bytes()
    error = fails(*tiny, '--output', 'output/tiny', code=2)
    assert 'already holds a run' in error
    assert '--resume auto' in error
    assert (tmp_path / 'output' / 'tiny' / BEST).read_bytes() == before


def test_resume_auto_starts_afresh_where_there_is_nothing_and_finds_the_latest_run(tiny, run, tmp_path):
    code, out, _ = run(*tiny, '--resume', 'auto')
    assert code == 0
    assert 'from epoch' not in out
    code, out, _ = run(*tiny, '--epochs', '4', '--resume', 'auto')
    assert code == 0
    assert 'from epoch 3' in out
    assert [path.name for path in (tmp_path / 'output').iterdir()] == ['tiny']


def test_a_run_continued_in_another_folder_takes_its_best_checkpoint_along(finished, run, validated, tmp_path):
    last, best = (load_checkpoint(tmp_path / 'run' / name) for name in (LAST, BEST))
    last['best'] |= {'top1': 101.0, 'epoch': 1}  # no later epoch can be better
    save_checkpoint(tmp_path / 'run', {**best, 'epoch': 1, 'updates': 6}, is_best=True)
    save_checkpoint(tmp_path / 'run', last, is_best=False)
    code, out, _ = run('--resume', 'run', '--epochs', '4', '--output', 'longer')
    assert code == 0
    assert 'best: ' in out
    assert len((tmp_path / 'run' / 'summary.csv').read_text().splitlines()) == 4
    assert len((tmp_path / 'longer' / 'summary.csv').read_text().splitlines()) == 5
    assert (tmp_path / 'longer' / BEST).read_bytes() == (tmp_path / 'run' / BEST).read_bytes()
    assert validated('longer')


def test_a_resume_is_not_judged_by_a_recipe_that_it_does_not_use(tiny, run):
    changes = ('--epochs', '1', '--set', 'schedule.warmup_epochs=0')
    assert run(*tiny, *changes, '--output', 'run')[0] == 0
    # shorter than the warm-up of the demonstration, which is the recipe where no other is named
    code, out, error = run('--resume', 'run', '--epochs', '2')
    assert code == 0, error
    assert 'from epoch 1' in out


def test_resume_auto_leaves_recipes_of_similar_names_alone(tiny, run, tmp_path):
    assert run(*tiny, '--output', 'output/tiny-long')[0] == 0
    code, out, _ = run(*tiny, '--resume', 'auto')
    assert code == 0
    assert 'from epoch' not in out
    assert (tmp_path / 'output' / 'tiny' / LAST).is_file()


@pytest.mark.parametrize(
    ('arguments', 'code', 'message'),
    [
        (['--epochz', '3'], 2, "unknown flag --epochz; the nearest valid name is '--epochs'"),
        (['--epoch', '3'], 2, "unknown flag --epoch; the nearest valid name is '--epochs'"),
        (['--optim.lr', '3'], 2, 'unknown flag --optim.lr: write --set optim.lr=VALUE'),
        (['--epochs'], 2, 'argument --epochs: expected one argument'),
        (['--epochs', 'few'], 2, "--epochs: schedule.epochs='few' is not valid; allowed: an integer"),
        (['--output', ''], 2, "--output='' is empty"),
        (['digits'], 2, "unexpected argument 'digits'"),
        (['--config', 'hydra_vit_nano_digit'], 2, "the nearest valid name is 'hydra_vit_nano_digits'"),
        (['--json'], 2, '--json needs --validate'),
        (['--validate', 'a.pt', '--output', 'b'], 2, 'leave out --resume and --output'),
        (['--model', 'hydra_vit_nan'], 2, "the nearest valid name is 'hydra_vit_nano'"),
        (['--device', 'gpu'], 2, "run.device='gpu' is not available"),
        (['--data-dir', 'nowhere'], 1, "data.dir='nowhere' is not a folder"),
        (['--compile', 'true', '--set', 'run.compile_mode=fast'], 2, "run.compile_mode='fast' is not valid"),
        (['--num-classes', '11'], 1, 'model.num_classes=11, but sklearn/digits (train) has 10 classes'),
        (['--resume', 'nowhere.pt'], 1, "no checkpoint 'nowhere.pt'"),
    ],
)
def test_mistakes_end_with_one_line_before_any_work(fails, tmp_path, arguments, code, message):
    assert message in fails(*arguments, code=code)
    assert list(tmp_path.iterdir()) == [] or list((tmp_path / 'output').iterdir()) == []


@pytest.mark.parametrize(
    ('name', 'message'),
    [('cuda', "HYDRA_VISION_BACKEND: unknown backend 'cuda'"), ('mamba_ssm', "backend 'mamba_ssm' is not available")],
)
def test_a_backend_that_cannot_run_ends_with_one_line(tiny, finished, fails, tmp_path, monkeypatch, name, message):
    monkeypatch.setenv('HYDRA_VISION_BACKEND', name)
    monkeypatch.setattr('hydra_vision.ops.dispatch._mamba_ssm_reason', lambda: 'not here')
    assert message in fails(*tiny, '--output', 'other', code=2)
    assert not (tmp_path / 'other').exists()
    assert message in fails('--validate', 'run', code=2)


def test_too_many_unreadable_images_end_the_run_by_name(fails, image_folder):
    folder = image_folder()
    (folder / 'train' / 'red' / '003.png').write_bytes(b'')
    small = ('--model', 'test_vit', '--num-classes', 3, '--img-size', 32, '--batch-size', 4, '--device', 'cpu')
    error = fails('--data-dir', folder, *small, '--set', 'data.max_unreadable=0', '--workers', 2, code=1)
    assert '1 unreadable image in the' in error
    assert 'red/003.png' in error


def test_skipped_images_are_told_at_the_end(run, image_folder):
    folder = image_folder()
    (folder / 'val' / 'red' / '001.png').write_bytes(b'')
    small = ('--model', 'test_hydra_vit', '--num-classes', 3, '--img-size', 32, '--batch-size', 4, '--device', 'cpu')
    code, out, _ = run('--data-dir', folder, *small, '--epochs', 1, '--set', 'schedule.warmup_epochs=0', '--workers', 0)
    assert code == 0
    assert 'warning: skipped 1 unreadable image' in out
    assert 'red/001.png' in out


def test_print_config_shows_the_recipe_after_overrides_and_runs_nothing(run, tmp_path):
    code, out, _ = run('--print-config', '--lr', '3e-3', '--set', 'optim.lr=4e-3')
    assert code == 0
    recipe = yaml.safe_load(out)
    assert recipe['optim']['lr'] == 4e-3  # the last word wins
    assert recipe['data']['name'] == 'sklearn/digits'
    assert list(tmp_path.iterdir()) == []
    assert yaml.safe_load(run('--print-config', '--data-dir', 'x')[1])['model']['name'] == 'hydra_vit_base'


def test_output_is_plain_lines_where_there_is_no_terminal(tiny, run):
    code, out, error = run(*tiny)
    assert code == 0, error
    assert '\x1b' not in out
    assert '\r' not in out
    lines = [line for line in out.splitlines() if line.startswith('epoch')]
    assert len(lines) == 3
    assert all('img/s' in line for line in lines)
    assert 'ETA' in lines[0]
    assert error == ''


def test_a_checkpoint_meets_no_other_classes(tiny, finished, fails, tmp_path):
    shutil.copytree(tiny[-1], tmp_path / 'other')
    for split in ('train', 'val'):
        (tmp_path / 'other' / split / 'red').rename(tmp_path / 'other' / split / 'azure')
    for arguments in (('--validate', 'run'), ('--resume', 'run', '--epochs', 4)):
        error = fails(*arguments, '--data-dir', tmp_path / 'other', code=1)
        assert "is 'azure', of the checkpoint 'blue': it was trained on other classes" in error


def test_initial_weights_can_be_validated(tiny, finished, run, fails, validated, tmp_path):
    best = validated('run')
    start = ('--set', 'model.checkpoint=run/best.pt')
    code, out, error = run(*tiny, *start, '--epochs', 0, '--validate', '--json')
    assert code == 0, error
    found = json.loads(out)
    assert found['checkpoint'] == 'initial weights'
    assert found['results']['raw'] == pytest.approx(best['EMA'])  # averaged weights go first where there are some
    assert 'trains nothing; add --validate' in fails(*tiny, '--epochs', 0, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ['run']

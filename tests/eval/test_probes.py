"""Probes agree with scikit-learn, look at the test set once, and reject features that do not belong together."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from hydra_vision.cli import main
from hydra_vision.eval import probe
from hydra_vision.eval.features import Split, class_names, paired_splits, top_accuracy
from hydra_vision.eval.knn import knn_probe, knn_scores
from hydra_vision.features import FeatureError, extract, load_backbone

CHECKPOINT = f'local-dir:{Path(__file__).resolve().parents[2] / "weights" / "hydra_vit_nano_digits"}'
DIGITS = ['sklearn/digits/train', 'sklearn/digits/test']


def blobs(seed: int, rows: int = 300, classes: int = 4, spread: float = 1.2) -> Split:
    centres = np.random.default_rng(0).normal(size=(classes, 8))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, rows)
    return Split((centres[y] + spread * rng.normal(size=(rows, 8))).astype(np.float32), y, 'blobs')


@pytest.mark.parametrize('k', [1, 7, 20])
def test_knn_agrees_with_scikit_learn(k):
    train, test = blobs(1), blobs(2, rows=130)
    reference = KNeighborsClassifier(k, metric='cosine', weights=lambda d: np.exp((1 - d) / 0.07), algorithm='brute')
    reference.fit(train.x.astype(np.float64), train.y)
    expected = reference.predict_proba(test.x.astype(np.float64))
    arrays = (torch.from_numpy(a) for a in (train.x, train.y, test.x))
    scores = knn_scores(*arrays, k=k, num_classes=4, chunk=50)
    np.testing.assert_allclose(scores / scores.sum(1, keepdim=True), expected, atol=1e-4)
    (row,) = knn_probe(train, test, num_classes=4, k=(k,))
    assert row['top1'] == pytest.approx(100 * (expected.argmax(1) == test.y).mean(), abs=1e-6)
    assert row['top5'] == 100


def test_knn_with_a_small_temperature_is_the_nearest_neighbour():
    train, test = blobs(1), blobs(2)
    small, nearest = (
        knn_probe(train, test, num_classes=4, k=(k,), temperature=t)[0]['top1'] for k, t in ((20, 1e-5), (1, 0.07))
    )
    assert small == nearest


def test_knn_takes_each_k():
    train, test = blobs(1), blobs(2)
    both = knn_probe(train, test, num_classes=4, k=(1, 50))
    assert both == [knn_probe(train, test, num_classes=4, k=(k,))[0] for k in (1, 50)]
    assert both[0]['top1'] != both[1]['top1']


def test_classes_are_in_natural_order():
    assert class_names(['10', '9', 'b', 'a'], ['9']) == ['9', '10', 'a', 'b']


def test_top_accuracy():
    scores = np.array([[0.1, 0.5, 0.4], [0.2, 0.3, 0.5], [0.9, 0.05, 0.05]])
    result = top_accuracy(scores, np.array([2, 2, 1]), ks=(1, 2, 5))
    assert {key: round(value, 2) for key, value in result.items()} == {'top1': 33.33, 'top2': 100.0, 'top5': 100.0}


@pytest.mark.parametrize('classes', [2, 4])
def test_logistic_probe_is_scikit_learns(classes):
    train, test = blobs(1, classes=classes), blobs(2, classes=classes)
    result = probe.logistic_probe(train, test, num_classes=classes, values=(0.001, 0.1))
    assert [row['C'] for row in result['sweep']] == [0.001, 0.1]
    assert result['C'] == max(result['sweep'], key=lambda row: row['top1'])['C']
    scaler = StandardScaler().fit(train.x)
    reference = LogisticRegression(C=result['C'], max_iter=1000).fit(scaler.transform(train.x), train.y)
    assert result['top1'] == pytest.approx(100 * reference.score(scaler.transform(test.x), test.y))
    assert result['converged']
    assert not probe.logistic_probe(train, test, num_classes=classes, values=(1.0,), max_iter=1)['converged']


def by_hand(train: Split, test: Split, lr: float, epochs: int, batch_size: int, seed: int = 0) -> float:
    """The linear probe as its protocol says, in plain PyTorch."""
    mean, std = train.x.mean(0), train.x.std(0)
    x, y = torch.from_numpy((train.x - mean) / std), torch.from_numpy(train.y)
    torch.manual_seed(seed)
    head = torch.nn.Linear(x.shape[1], 4)
    optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9, nesterov=True)
    updates = epochs * -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(batch_size):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(x[index]), y[index]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return head(torch.from_numpy((test.x - mean) / std)).numpy()


@pytest.mark.parametrize('scale', [1.0, 50.0])
def test_linear_probe_does_what_its_protocol_says(scale, monkeypatch):
    stretch = np.geomspace(1, scale, 8).astype(np.float32)  # features of very different sizes
    train, test = (Split((part.x + 3) * stretch, part.y, part.name) for part in (blobs(1), blobs(2)))
    seen = []
    monkeypatch.setattr(probe, 'top_accuracy', lambda scores, y, **_: seen.append(scores) or {'top1': 0.0})
    probe.linear_probe(train, test, num_classes=4, values=(0.03,), epochs=3, batch_size=64)
    np.testing.assert_allclose(seen[0], by_hand(train, test, 0.03, 3, 64), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('run', [probe.logistic_probe, probe.linear_probe])
def test_a_feature_that_never_changes_is_no_feature(run):
    """Not one that is divided by nothing: in the test set it may differ a little."""
    train, test = blobs(1), blobs(2)
    noise = 5 + 1e-3 * np.random.default_rng(3).normal(size=(300, 1)).astype(np.float32)
    more = (
        Split(np.hstack([train.x, np.full_like(noise, 5)]), train.y, ''),
        Split(np.hstack([test.x, noise]), test.y, ''),
    )
    value = {'values': (0.1,), 'num_classes': 4}
    assert abs(run(*more, **value)['top1'] - run(train, test, **value)['top1']) < 2


@pytest.mark.parametrize('values', [(0.001, 0.01, 1.0)])
def test_the_sweep_is_judged_on_images_that_were_held_out(values):
    train, test = blobs(1), blobs(2)
    result = probe.logistic_probe(train, test, num_classes=4, values=values[::-1], holdout=0.25, seed=3)
    x, held, y, y_held = train_test_split(train.x, train.y, test_size=0.25, stratify=train.y, random_state=3)
    scaler = StandardScaler().fit(x)
    for row, C in zip(result['sweep'], values):
        model = LogisticRegression(C=C, max_iter=1000).fit(scaler.transform(x), y)
        assert row == {'C': C, 'top1': pytest.approx(100 * model.score(scaler.transform(held), y_held))}
    best = max(row['top1'] for row in result['sweep'])
    assert result['C'] == min(row['C'] for row in result['sweep'] if row['top1'] == best)


def test_equal_values_of_a_sweep_give_the_smaller_one():
    easy = blobs(1, spread=0.01)
    assert probe.logistic_probe(easy, easy, num_classes=4, values=(10.0, 1.0, 5.0))['C'] == 1.0


def test_a_class_without_images_keeps_its_number():
    train, test = (blobs(seed, classes=3) for seed in (1, 2))
    moved = [Split(part.x, np.array([0, 2, 3])[part.y], '') for part in (train, test)]
    for a, b in ((moved, (train, test)), ([Split(s.x[s.y != 2], s.y[s.y != 2], '') for s in moved], None)):
        result = probe.logistic_probe(*a, num_classes=4, values=(1.0,))
        assert result['top1'] > 50
        assert b is None or result['top1'] == probe.logistic_probe(*b, num_classes=3, values=(1.0,))['top1']


def test_linear_probe_comes_close_to_logistic_regression():
    train, test = blobs(1), blobs(2)
    kwargs = dict(num_classes=4, values=(0.01, 0.1), epochs=30, batch_size=64)
    result = probe.linear_probe(train, test, **kwargs)
    logistic = probe.logistic_probe(train, test, num_classes=4)
    assert abs(result['top1'] - logistic['top1']) < 4
    assert result['top1'] > 60
    assert probe.linear_probe(train, test, **kwargs) == result  # the seed says it all
    assert probe.linear_probe(train, test, **{**kwargs, 'values': (0.1,)})['sweep'] == []


def test_the_test_set_does_not_choose():
    """With test labels shuffled, the chosen value stays."""
    train, test = blobs(1), blobs(2)
    shuffled = Split(test.x, np.random.default_rng(0).permutation(test.y), test.name)
    a, b = (probe.logistic_probe(train, part, num_classes=4) for part in (test, shuffled))
    assert (a['C'], a['sweep']) == (b['C'], b['sweep'])
    assert a['top1'] > b['top1']


@pytest.mark.parametrize(
    ('run', 'match'),
    [
        (lambda a, b: knn_probe(a, b, num_classes=4, k=(301,)), 'k=301; allowed: 1 to 300'),
        (lambda a, b: knn_probe(a, b, num_classes=4, temperature=0), 'temperature=0'),
        (lambda a, b: knn_probe(a, b, num_classes=4, temperature=float('nan')), 'temperature=nan'),
        (lambda a, b: probe.logistic_probe(a, b, num_classes=4, values=()), r'C=\[\]'),
        (lambda a, b: probe.linear_probe(a, b, num_classes=4, values=(0.1, -1)), 'all positive'),
        (lambda a, b: probe.linear_probe(a, b, num_classes=4, epochs=0), 'epochs=0'),
        (lambda a, b: probe.logistic_probe(a, b, num_classes=4, holdout=0.001), r'holdout=0.001 of 300'),
    ],
)
def test_bad_arguments(run, match):
    with pytest.raises(FeatureError, match=match):
        run(blobs(1), blobs(2))


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Features of both digits splits by the trained checkpoint of the repository, as files."""
    folder = tmp_path_factory.mktemp('digits')
    backbone = load_backbone(CHECKPOINT)
    return [extract(source, folder / f'{i}.npy', model=backbone, workers=0) for i, source in enumerate(DIGITS)]


def test_commands_on_files(digits, capsys):
    files = [str(features.path) for features in digits]
    assert main(['probe', 'knn', *files, '--k', '1,20', '--json']) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row['k'] for row in result['results']] == [1, 20]
    assert min(row['top1'] for row in result['results']) > 96
    assert result['classes'] == 10
    assert result['test'] == {'images': DIGITS[1], 'rows': 360, 'skipped': 0}
    assert 'T = 0.07' in result['protocol']
    assert main(['probe', 'linear', *files, '--sweep', '0.01,1']) == 0
    out = capsys.readouterr().out
    assert CHECKPOINT in out
    assert 'held out: C 0.01: top1' in out
    assert 'C chosen on 20% of the training images (stratified, seed 0)' in out
    assert main(['probe', 'linear', *files, '--solver', 'sgd', '--sweep', '0.1', '--epochs', '5', '--json']) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['results'][0]['top1'] > 96
    assert 'cosine over 5 epochs, seed 0; lr 0.1 was given, none chosen' in result['protocol']


def test_command_on_images(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for name, colour in (('red', (255, 0, 0)), ('blue', (0, 0, 255))):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = np.clip(np.array(colour) + rng.integers(-60, 60, (40, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f'{i}.png')
    options = ['--model', 'test_hydra_vit', '--random-init', '--img-size', '32']
    options += ['--workers', '0', '--k', '3', '--device', 'cpu', '--json']
    assert main(['probe', 'knn', str(tmp_path / 'train'), str(tmp_path / 'val'), *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['results'][0]['top1'] == 100
    assert result['weights'] == 'random'


def test_features_that_do_not_belong_together(digits, tmp_path):
    train, _ = digits
    backbone = load_backbone(CHECKPOINT)
    sizes = dict(depth=4, img_size=8, patch_size=2, in_chans=1)
    other = load_backbone('hydra_vit_nano', random_init=True, model_kwargs=sizes)
    variants = {
        'model': dict(model=other),
        'pool': dict(model=backbone, pool='max'),
        'layers': dict(model=backbone, layers=[1]),
    }
    for key, kwargs in variants.items():
        features = extract(DIGITS[1], tmp_path / f'{key}.npy', workers=0, **kwargs)
        with pytest.raises(FeatureError, match=f'different models or settings: {key} '):
            paired_splits(train, features)
    tokens = extract(DIGITS[1], tmp_path / 'tokens.npy', model=backbone, workers=0, pool='tokens')
    with pytest.raises(FeatureError, match=r'\[16, 128\] values an image'):
        paired_splits(tokens, tokens)


def test_commands_that_make_no_sense(digits, tmp_path, fails, monkeypatch):
    """They end before images are run through a model."""
    train, test = files = [features.path for features in digits]
    (tmp_path / 'one' / 'cat').mkdir(parents=True)
    Image.new('L', (8, 8)).save(tmp_path / 'one' / 'cat' / 'a.png')
    one = tmp_path / 'one'
    model = ['--model', 'hydra_vit_nano', '--random-init', '--model-kwargs']
    model += ['depth=4', 'img_size=8', 'patch_size=2', 'in_chans=1']
    monkeypatch.setattr('hydra_vision.eval.main.extract', lambda *_, **__: pytest.fail('extracted'))
    for argv, match in (
        (['knn', train, DIGITS[1], *model], 'features of another model'),
        (['knn', train, DIGITS[1], '--model', CHECKPOINT, '--mean', '0.5'], 'settings: data'),
        (['knn', *files, *model], 'both sets are features already'),
        (['knn', *files, '--batch-size', '8'], '--batch-size: both sets are features'),
        (['knn', *DIGITS], 'no model'),
        (['knn', *DIGITS, '--k', '1,1438', *model], '--k 1438: there are 1437'),
        (['knn', DIGITS[0], one, *model], 'classes to test on'),
        (['knn', one, one, *model], 'have one class, cat'),
        (['linear', *DIGITS, '--pool', 'tokens', *model], "'avg', 'max', 'cls'"),
        *((['linear', *files, '--sweep', '1', option, '3'], option) for option in ('--seed', '--holdout')),
        (['linear', *files, '--sweep', '1', '--device', 'cpu'], '--device'),  # nothing that would use it
        (['linear', *files, '--epochs', '3'], '--epochs is for --solver sgd'),
        (['linear', *files, '--holdout', '1.5'], '--holdout'),
    ):
        assert match in fails('probe', *argv)


def test_classes_that_do_not_fit(digits, tmp_path):
    train, _ = digits
    for name in ('3', 'cat'):
        (tmp_path / name).mkdir()
        Image.new('L', (8, 8)).save(tmp_path / name / 'a.png')
    backbone = load_backbone(CHECKPOINT)
    odd = extract(tmp_path, tmp_path / 'odd.npy', model=backbone, workers=0)
    with pytest.raises(FeatureError, match='1 classes to test on are not among the 10 to train on: cat'):
        paired_splits(train, odd)
    flat = extract(tmp_path / 'cat', tmp_path / 'flat.npy', model=backbone, workers=0)
    with pytest.raises(FeatureError, match='the images to test on have no classes'):
        paired_splits(train, flat)

"""The segmenter: metrics against numpy, a run that learns drawn shapes, errors before work."""

import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from hydra_vision import cli
from hydra_vision.errors import UserError
from hydra_vision.io import read_csv

pytest.importorskip('segmentation_models_pytorch')
from hydra_vision.downstream.segment import plot_predictions, save_mask
from hydra_vision.downstream.segmentation import (
    Recipe,
    Scores,
    SegmentationFolder,
    build_segmenter,
    evaluate,
    measure_speed,
    predict,
    read_classes,
    train_segmenter,
    train_transform,
)

RUN = ['--model', 'test_hydra_vit', '--crop', '64', '--device', 'cpu', '--batch-size', '4']
FPN = ['--workers', '0', '--decoder', 'FPN']


class _Fixed(nn.Module):
    """Predicts the class that is the first channel of the image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-2] % 32 == x.shape[-1] % 32 == 0
        return nn.functional.one_hot(x[:, 0].long(), 4).movedim(-1, 1).float()


def test_scores_against_numpy():
    rng = np.random.default_rng(0)
    predicted, truth = rng.integers(0, 3, (2, 5, 23, 30))
    truth[:, :4] = 9
    batches = [
        (torch.tensor(p[None, None].repeat(3, 1)).float(), torch.tensor(t[None])) for p, t in zip(predicted, truth)
    ]
    scores = evaluate(_Fixed(), batches, num_classes=4, ignore_index=9, device=torch.device('cpu'))
    p, t = predicted[truth != 9], truth[truth != 9]
    expected = [((p == c) & (t == c)).sum() / ((p == c) | (t == c)).sum() for c in range(3)]
    assert scores.iou[:3] == pytest.approx(expected)
    assert math.isnan(scores.iou[3])  # neither there nor predicted
    assert scores.miou == pytest.approx(np.mean(expected))
    assert scores.accuracy == pytest.approx((p == t).mean())


@pytest.mark.parametrize(
    ('name', 'decoder'), [('test_hydra_vit', 'DPT'), ('test_vit', 'DPT'), ('test_hydra_vit', 'FPN')]
)
def test_any_size(name, decoder):
    model = build_segmenter(name, decoder, 3, img_size=(64, 64)).eval()
    assert predict(model, torch.randn(1, 3, 50, 77)).shape == (1, 3, 50, 77)


def test_training_pairs_stay_aligned(drawn_folder):
    data = SegmentationFolder(
        drawn_folder, 'train', num_classes=3, ignore_index=255, transform=train_transform((64, 96), 255)
    )
    torch.manual_seed(0)
    for i in range(8):
        image, mask = data[i]
        assert image.shape == (3, 64, 96)
        assert mask.shape == (64, 96)
        red, blue = image[0] - image[2], image[2] - image[0]
        for label, colour in ((1, red), (2, blue)):
            if (mask == label).sum() > 50:
                assert colour[mask == label].mean() > colour[mask == 0].mean() + 0.5


@pytest.mark.slow
def test_a_run_learns_and_reports(drawn_folder, tmp_path, capsys):
    out = tmp_path / 'run'
    arguments = ['segment', 'train', str(drawn_folder), *RUN, *FPN, '--output', str(out)]
    assert cli.main([*arguments, '--epochs', '16', '--lr', '2e-3', '--eval-every', '8', '--drop-path', '0']) == 0
    summary = json.loads((out / 'summary.json').read_text())
    assert summary['classes'] == ['ground', 'rectangle', 'disc']
    assert summary['test']['miou'] > 0.6  # chance, all ground, is below 0.3
    rows = read_csv(out / 'curve.csv')
    assert len(rows) == 16
    assert float(rows[-1]['loss']) < 0.7 * float(rows[0]['loss'])
    with Image.open(out / 'predictions.png') as picture:
        assert min(picture.size) > 200
    assert len(list((out / 'predictions').iterdir())) == 4
    assert 'test mIoU' in capsys.readouterr().out

    # the weights are those of the summary
    model = build_segmenter('test_hydra_vit', 'FPN', 3, img_size=(64, 64))
    model.load_state_dict(load_file(out / 'model.safetensors'))
    data = SegmentationFolder(drawn_folder, 'test', num_classes=3, ignore_index=255)
    batches = []
    for image, mask in data:
        x = (image / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
            :, None, None
        ]
        batches.append((x[None], mask[None]))
    scores = evaluate(model, batches, num_classes=3, ignore_index=255, device=torch.device('cpu'))
    assert scores.miou == pytest.approx(summary['test']['miou'], abs=1e-3)

    again = shutil.copytree(out, tmp_path / 'again')  # the same model twice: both are in the picture
    assert cli.main(['segment', 'compare', str(out), str(again), '--output', str(tmp_path / 'both')]) == 0
    with Image.open(out / 'predictions.png') as one, Image.open(tmp_path / 'both' / 'predictions.png') as both:
        assert both.width > one.width
    capsys.readouterr()
    assert cli.main(['segment', 'compare', str(out), str(out), '--output', str(tmp_path / 'twice')]) == 2
    assert 'name different ones' in capsys.readouterr().err
    assert not (tmp_path / 'twice').exists()
    assert (out / 'model.safetensors').stat().st_mode == (out / 'summary.json').stat().st_mode
    assert cli.main(arguments) == 2  # the folder is not empty


def test_an_interrupted_run_leaves_its_best_weights(drawn_folder, tmp_path, monkeypatch, capsys):
    calls = []

    def interrupt(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr('hydra_vision.downstream.segmentation.evaluate', interrupt)
    out = tmp_path / 'run'
    arguments = ['segment', 'train', str(drawn_folder), *RUN, *FPN, '--output', str(out)]
    assert cli.main([*arguments, '--epochs', '3', '--eval-every', '1']) == 130
    assert {path.name for path in out.iterdir()} == {'curve.csv', 'model.safetensors', 'last.pt', 'checkpoints'}
    assert len(load_file(out / 'model.safetensors')) > 20
    assert cli.main(['segment', 'compare', str(out), '--output', str(tmp_path / 'c')]) == 2
    assert 'not a finished run' in capsys.readouterr().err


def test_a_killed_run_goes_on(drawn_folder, tmp_path, monkeypatch, capsys):
    """The same weights and curve as without the kill, which costs one epoch."""

    class Killed(BaseException):
        pass

    def train(out, *more):
        arguments = ['--epochs', '3', '--eval-every', '1', '--output', str(out), *more]
        return cli.main(['segment', 'train', str(drawn_folder), *RUN, *FPN, *arguments])

    def curve(out):
        return [{k: v for k, v in row.items() if k != 'seconds'} for row in read_csv(out / 'curve.csv')]

    whole, out = tmp_path / 'whole', tmp_path / 'run'
    assert train(whole) == 0
    assert {path.name for path in whole.iterdir()} == {
        *('curve.csv', 'model.safetensors', 'pictures.json', 'predictions', 'predictions.png', 'summary.json'),
    }
    calls = []

    def kill(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:  # in the third epoch
            raise Killed
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr('hydra_vision.downstream.segmentation.evaluate', kill)
        with pytest.raises(Killed):
            train(out)
    assert len(curve(out)) == 2
    capsys.readouterr()
    for more, match in (
        (['--lr', '1e-3'], 'has lr 0.0005, not 0.001'),
        (['--epochs', '4'], 'has epochs 3, not 4'),
        (['--seed', '1'], 'has seed 0, not 1'),
    ):
        assert train(out, '--resume', *more) == 2
        assert match in capsys.readouterr().err
    assert train(out) == 2  # unasked, nothing goes on
    assert train(out, '--resume') == 0
    assert 'continuing after epoch 2 of 3' in capsys.readouterr().out
    assert curve(out) == curve(whole)
    one, two = (load_file(folder / 'model.safetensors') for folder in (out, whole))
    assert all(torch.equal(one[key], two[key]) for key in two)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert train(out, '--resume') == 2
    assert 'it is finished' in capsys.readouterr().err


def test_training_is_what_the_recipe_says(monkeypatch):
    """Warm-up and cosine, no decay of what the backbone spares, the loss of labelled pixels, the best weights."""
    model = build_segmenter('test_hydra_vit', 'FPN', 3, img_size=(64, 64), depth=1, pos_embed='learn')
    torch.manual_seed(0)
    mask = torch.randint(3, (2, 64, 64))
    mask[:, :40] = 255
    batches = [(torch.randn(2, 3, 64, 64), mask)] * 5
    mious = iter((0.3, 0.7, 0.5, float('nan')))
    monkeypatch.setattr('hydra_vision.downstream.segmentation.evaluate', lambda *_, **__: Scores(next(mious), 0.0, []))
    states, recipe = [], Recipe(epochs=4, lr=1e-6, min_lr=1e-8, warmup=0.25, eval_every=1)
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model.train()(batches[0][0]), mask, ignore_index=255)
    curve = train_segmenter(
        *(model, batches, batches, recipe),
        **dict(num_classes=3, ignore_index=255, device=torch.device('cpu')),
        on_epoch=lambda _, now: states.append(copy.deepcopy(now())),
    )
    assert curve[0]['loss'] == pytest.approx(float(loss), rel=0.01)
    groups = states[-1]['optimizer']['param_groups']
    spared = {name for name, p in model.named_parameters() if p.ndim <= 1} | {'encoder.model.pos_embed'}
    assert sum(len(group['params']) for group in groups if group['weight_decay'] == 0) == len(spared)
    expected = [1e-8 + (1e-6 - 1e-8) * 4 / 5]  # the last of 5 warm-up updates, then a cosine over all 20
    expected += [1e-8 + (1e-6 - 1e-8) * (1 + math.cos(math.pi * update / 20)) / 2 for update in (9, 14, 19)]
    assert [state['optimizer']['param_groups'][0]['lr'] for state in states] == pytest.approx(expected)
    assert [state['updates'] for state in states] == [5, 10, 15, 20]
    best, last = states[1]['model'], states[3]['model']
    final = model.state_dict()
    assert all(torch.equal(final[key], best[key]) for key in final)
    assert not all(torch.equal(final[key], last[key]) for key in final)


def test_what_a_crop_adds_has_no_class(tmp_path):
    for name, array in (('images', np.full((40, 40, 3), 200)), ('masks', np.ones((40, 40)))):
        (tmp_path / 'train' / name).mkdir(parents=True)
        Image.fromarray(array.astype(np.uint8)).save(tmp_path / 'train' / name / 'a.png')
    data = SegmentationFolder(
        tmp_path, 'train', num_classes=2, ignore_index=255, transform=train_transform((96, 96), 255)
    )
    torch.manual_seed(0)
    image, mask = data[0]
    assert mask.unique().tolist() == [1, 255]
    assert image[0][mask == 1].min() > image[0][mask == 255].max()


def test_a_batch_without_a_class_is_no_error():
    torch.manual_seed(0)  # some random weights begin with a loss above 3
    model = build_segmenter('test_hydra_vit', 'FPN', 3, img_size=(64, 64), depth=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    empty, some = torch.full((2, 64, 64), 255), torch.ones(2, 64, 64, dtype=torch.long)
    batches = [(torch.randn(2, 3, 64, 64), mask) for mask in (empty, some)]
    curve = train_segmenter(
        model, batches, batches, Recipe(epochs=1), num_classes=3, ignore_index=255, device=torch.device('cpu')
    )
    assert 0 < curve[0]['loss'] < 3
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not torch.equal(model.state_dict()['segmentation_head.0.weight'], before['segmentation_head.0.weight'])


def test_scale_is_that_of_the_image_not_of_the_crop(tmp_path):
    """A crop far smaller than the image shows its details between half and twice their size."""
    column = np.repeat(np.arange(64, dtype=np.uint8), 8)[None].repeat(512, 0)  # a class every 8 px
    for name, array in (('images', np.stack([column] * 3, -1)), ('masks', column)):
        (tmp_path / 'train' / name).mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / 'train' / name / 'a.png')
    data = SegmentationFolder(
        tmp_path, 'train', num_classes=64, ignore_index=255, transform=train_transform((64, 64), 255)
    )
    torch.manual_seed(0)
    widths = [64 / len(data[0][1].unique()) for _ in range(20)]
    assert 3 < min(widths) < 7
    assert 9 < max(widths) < 17


def test_predictions_are_drawn_in_the_colours_of_their_classes(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, *_, **__: figures.append(figure))
    images = [np.full((2, 2, 3), i, np.uint8) for i in range(2)]
    truths = [np.array([[0, 1], [2, 255]]), np.array([[1, 1], [0, 0]])]
    predicted = [np.array([[2, 1], [0, 1]]), np.array([[0, 1], [0, 2]])]
    plot_predictions(tmp_path / 'p.png', images, truths, {'m': predicted}, ['a', 'b', 'c'])
    (figure,) = figures
    palette = np.array([patch.get_facecolor()[:3] for patch in figure.legends[0].get_patches()])
    cells = [axes.images[0].get_array() for axes in figure.axes]
    for row in range(2):
        image, truth, prediction = cells[3 * row : 3 * row + 3]
        np.testing.assert_array_equal(image, images[row])
        labelled = truths[row] != 255
        for cell, numbers in ((truth, truths[row]), (prediction, predicted[row])):
            np.testing.assert_allclose(cell[labelled], palette[numbers[labelled]])
            assert not cell[~labelled].any()  # black


def test_masks_hold_more_than_256_classes(tmp_path):
    for most in (255, 300):
        mask = torch.tensor([[0, most]])
        save_mask(tmp_path / 'm.png', mask)
        assert np.asarray(Image.open(tmp_path / 'm.png')).tolist() == [[0, most]]


def test_speed():
    model = build_segmenter('test_hydra_vit', 'FPN', 3, img_size=(64, 64))
    speed = measure_speed(model, size=(64, 64), batch_size=2, num_classes=3, device=torch.device('cpu'), calls=1)
    assert set(speed) == {'train_images_per_second', 'inference_images_per_second'}
    assert min(speed.values()) > 0


def test_bad_input(drawn_folder, tmp_path, fails):
    train = ['train', drawn_folder, '--output', tmp_path / 'out', *RUN]
    for match, argv in [
        ('UPerNet', [*train, '--decoder', 'Unett']),
        ('multiples of 32', [*train, '--crop', '60x64']),
        ('multiples of 32', ['time', '--crop', '60', '--output', tmp_path / 'out']),
        ('--num-classes 1', [*train, '--num-classes', '1']),
        ('is one of the 3 classes', [*train, '--ignore-index', '2']),
        ('holds no interrupted run', [*train, '--resume']),
        ('--lr -1.0', [*train, '--lr', '-1']),
        ('names 3', [*train, '--num-classes', '4']),
        ('no folder', ['train', tmp_path / 'none', *train[2:], '--num-classes', '3']),
        ('classes.txt', ['train', tmp_path, *train[2:]]),
        ('not an empty folder', [*train, '--output', drawn_folder]),
    ]:
        assert match in fails('segment', *argv)
    assert not (tmp_path / 'out').exists()
    two = SegmentationFolder(drawn_folder, 'train', num_classes=2, ignore_index=255)
    with pytest.raises(UserError, match='holds the class 2'):
        list(two)
    assert read_classes(tmp_path, 2) == ['class 0', 'class 1']


def test_a_wrong_mask_is_found_before_the_training(drawn_folder, tmp_path, fails):
    folder = shutil.copytree(drawn_folder, tmp_path / 'drawn')
    mask = folder / 'test' / 'masks' / '3.png'
    Image.fromarray(np.full((60, 72), 7, np.uint8)).save(mask)
    error = fails('segment', 'train', folder, '--output', tmp_path / 'out', *RUN)
    assert f'{mask} holds the class 7; allowed: 0 to 2' in error
    assert not (tmp_path / 'out').exists()


def test_unreadable_pairs_are_skipped_and_named(drawn_folder, tmp_path, capsys):
    folder = shutil.copytree(drawn_folder, tmp_path / 'drawn')
    (folder / 'train' / 'images' / '3.png').write_bytes(b'')
    for path in (folder / 'train' / 'images' / '5.png', folder / 'test' / 'masks' / '1.png'):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    out = tmp_path / 'run'
    arguments = ['segment', 'train', str(folder), *RUN, '--epochs', '1', '--decoder', 'FPN', '--output', str(out)]
    assert cli.main([*arguments, '--max-unreadable', '1', '--workers', '1']) == 1
    assert '2 unreadable images or masks in train: 3.png, 5.png' in capsys.readouterr().err
    shutil.rmtree(out)
    assert cli.main([*arguments, '--workers', '1']) == 0
    shown = capsys.readouterr().out
    assert 'skipped 2 unreadable images or masks in train: 3.png, 5.png' in shown
    assert 'skipped 1 unreadable images or masks in test: 1.png' in shown
    data = SegmentationFolder(folder, 'test', num_classes=3, ignore_index=255)
    assert (data[1][1] == 255).all()  # what stands in for it does not count
    assert torch.equal(data[1][0], data[2][0])


def test_folder_errors(tmp_path):
    for name in ('images', 'masks'):
        (tmp_path / 'train' / name).mkdir(parents=True)

    def read():
        return SegmentationFolder(tmp_path, 'train', num_classes=2, ignore_index=255)

    with pytest.raises(UserError, match='holds no image'):
        read()
    Image.new('RGB', (8, 8)).save(tmp_path / 'train/images/a.png')
    with pytest.raises(UserError, match='has no mask'):
        read()
    Image.new('L', (8, 9)).save(tmp_path / 'train/masks/a.png')
    with pytest.raises(UserError, match='8 x 9'):
        read()
    Image.new('RGB', (8, 8)).save(tmp_path / 'train/masks/a.png')
    with pytest.raises(UserError, match='mode RGB'):
        read()

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hydra_vision.errors import ConfigError, DataError
from hydra_vision.train import data, sources
from hydra_vision.train.config import AugmentConfig, Config, merge
from hydra_vision.train.distributed import World
from hydra_vision.train.sources import Digits

CPU = torch.device('cpu')


def recipe(folder: Path | None, **sections: dict) -> Config:
    base = {
        'model': {'name': 'test_vit'},
        'data': {'dir': None if folder is None else str(folder), 'img_size': 16, 'batch_size': 4, 'workers': 0},
    }
    return Config.from_dict(merge(base, sections))


def test_batches_of_a_folder(loaders, image_folder):
    train, val = loaders(recipe(image_folder()))
    images, targets = next(iter(train))
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert torch.cat([targets for _, targets in val]).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_every_field_of_augmentation_reaches_its_transform(loaders, image_folder):
    augment = {'scale': [0.3, 0.4], 'ratio': [0.9, 1.1], 'hflip': 0.2, 'vflip': 0.7, 'color_jitter': 0.5}
    augment |= {'erase_prob': 0.6, 'erase_mode': 'const', 'erase_count': 3, 'interpolation': 'bilinear'}
    train, val = loaders(recipe(image_folder(), augment=augment, data={'crop_pct': 0.5, 'interpolation': 'bilinear'}))
    parts = {type(part).__name__: part for part in train.dataset.transform.transforms}
    crop = parts['RandomResizedCropAndInterpolation']
    assert (tuple(crop.scale), tuple(crop.ratio)) == ((0.3, 0.4), (0.9, 1.1))
    assert (parts['RandomHorizontalFlip'].p, parts['RandomVerticalFlip'].p) == (0.2, 0.7)
    assert tuple(parts['ColorJitter'].brightness) == (0.5, 1.5)
    erasing = train.random_erasing.erasing
    assert (erasing.probability, erasing.mode, erasing.max_count) == (0.6, 'const', 3)
    assert val.dataset.transform.transforms[0].size == 32  # cut to 16: half of it
    assert val.random_erasing is None


def test_every_field_of_mixing_reaches_timm():
    augment = {'mixup': 0.2, 'cutmix': 0.9, 'mix_prob': 0.4, 'mix_switch_prob': 0.3, 'mix_mode': 'pair'}
    mixup = data.create_mixup(AugmentConfig(**augment, smoothing=0.3), 7)
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob) == (0.2, 0.9, 0.4, 0.3)
    assert (mixup.mode, mixup.label_smoothing, mixup.num_classes) == ('pair', 0.3, 7)
    assert data.create_mixup(AugmentConfig(smoothing=0.3), 7) is None


def test_loader_processes_draw_by_seed_epoch_and_process(image_folder):
    folder, seeds = image_folder(), set()
    for seed, epoch, rank in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        config = recipe(folder, run={'seed': seed})
        split, _ = sources.open_splits(config)
        train = data.train_loader(config, split, 3, torch.nn.Identity(), CPU, World(rank, 2, rank))
        data.epoch_batches(train, config.run.seed, epoch)
        seeds.add(train.loader.generator.initial_seed())
    assert len(seeds) == 4


@pytest.mark.parametrize(('val_name', 'suffix'), [('val', '.webp'), ('validation', '.bmp'), ('valid', '.jpeg')])
def test_usual_names_of_the_validation_folder_and_formats(image_folder, val_name, suffix):
    folder = image_folder(suffix=suffix)
    (folder / 'val').rename(folder / val_name)
    train, val = sources.open_splits(recipe(folder))
    assert (len(train.dataset), len(val.dataset)) == (24, 9)


def test_tar_files_give_the_same_samples_as_folders(loaders, image_folder):
    folder = image_folder()
    packed = folder.parent / 'packed'
    packed.mkdir()
    for split in ('train', 'val'):
        with tarfile.open(packed / f'{split}.tar', 'w') as tar:
            for path in sorted((folder / split).rglob('*.png')):
                tar.add(path, arcname=path.relative_to(folder / split))
    pairs = [list(loaders(recipe(path))[1]) for path in (folder, packed)]
    for (images, targets), (tar_images, tar_targets) in zip(*pairs, strict=True):
        assert torch.equal(images, tar_images)
        assert torch.equal(targets, tar_targets)


def test_synthetic_images_need_no_data(loaders):
    options = {'name': 'synthetic', 'dir': None, 'train_samples': 13}
    train, val = loaders(recipe(None, data=options, model={'num_classes': 5}))
    batches = list(train)
    assert [images.shape for images, _ in batches] == [(4, 3, 16, 16)] * 3 == [(4, 3, 16, 16)] * len(train)
    assert all(torch.equal(images, batches[0][0]) for images, _ in batches)
    assert (len(val), int(batches[0][1].max()) < 5) == (100, True)


def test_torchvision_sets_are_read(loaders, image_folder):
    train, val = loaders(recipe(image_folder(), data={'name': 'torch/image_folder'}))
    assert next(iter(train))[0].shape == (4, 3, 16, 16)
    assert len(val.dataset) == 9


def test_digits_split_is_fixed_balanced_and_disjoint():
    train, test = Digits(train=True), Digits(train=False)
    assert (len(train), len(test)) == (1437, 360)
    assert not set(train.indices) & set(test.indices)
    assert np.array_equal(train.indices, Digits(train=True).indices)
    assert np.bincount(test.targets).min() >= 34


def without_validation(folder: Path) -> None:
    shutil.rmtree(folder / 'val')


def with_an_empty_class(folder: Path) -> None:
    (folder / 'train' / 'yellow').mkdir()


def without_images(folder: Path) -> None:
    for path in folder.rglob('*.png'):
        path.unlink()


def with_an_image_outside(folder: Path) -> None:
    shutil.copy(folder / 'train' / 'red' / '000.png', folder / 'train' / 'loose.png')


def with_another_class(folder: Path) -> None:
    (folder / 'val' / 'red').rename(folder / 'val' / 'rouge')


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (shutil.rmtree, r"data.dir='.*images' is not a folder"),
        (without_validation, r'has no validation split; looked for validation, .*val\.tar'),
        (with_an_empty_class, r'1 class folder of .* without an image: yellow'),
        (without_images, r'holds no image'),
        (with_an_image_outside, r'1 images of .* are in no class folder, e\.g\. loose\.png'),
        (with_another_class, r'differ: red only in .*train; rouge only in .*val'),
    ],
)
def test_folders_that_cannot_be_trained_on(image_folder, spoil, message):
    folder = image_folder()
    spoil(folder)
    with pytest.raises(DataError, match=message):
        sources.open_splits(recipe(folder))


@pytest.mark.parametrize(
    ('sections', 'error', 'message'),
    [
        ({'data': {'dir': None}}, DataError, 'give --data-dir'),
        (
            {'model': {'num_classes': 1000}},
            DataError,
            r'num_classes=1000, but .*train has 3 classes: add --num-classes 3',
        ),
        ({'data': {'name': 'torch/nothing'}}, DataError, 'cannot open torch/nothing'),
        ({'data': {'batch_size': 100}}, DataError, 'batch_size=100 is more than the 24 images'),
        ({'augment': {'auto_augment': 'nonsense'}}, ConfigError, 'Unknown AA policy nonsense'),
        ({'data': {'name': 'wds/x', 'cache': 'ram'}}, ConfigError, "data.cache has no effect for data.name='wds/x'"),
    ],
)
def test_recipes_that_do_not_fit_the_data(image_folder, loaders, sections, error, message):
    with pytest.raises(error, match=message):
        loaders(recipe(image_folder(), **sections))


def test_a_class_map_chooses_and_orders_classes(image_folder, tmp_path):
    """Folders that it leaves out are none of the set; it has one name per line and nothing else."""
    folder, path = image_folder(), tmp_path / 'map.txt'
    path.write_text('red\nblue\n')
    config = recipe(folder, data={'class_map': str(path)})
    train, val = sources.open_splits(config)
    assert train.classes == val.classes == ['red', 'blue']
    assert (len(train.dataset), len(val.dataset)) == (16, 6)
    assert {(Path(name).parent.name, target) for name, target in val.dataset.reader.samples} == {
        ('red', 0),
        ('blue', 1),
    }
    for text, message in (('red\n\nblue\n', 'no class name in line 2'), ('red\nblue\nred\n', "'red' a second time")):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            sources.open_splits(config)
    with pytest.raises(DataError, match=r'is not a file'):
        sources.open_splits(recipe(folder, data={'class_map': 'none.txt'}))
    (tmp_path / 'map.json').write_text('{}')
    with pytest.raises(DataError, match=r'map\.json. cannot be read'):
        sources.open_splits(recipe(folder, data={'class_map': str(tmp_path / 'map.json')}))
    path.write_text('red\nblue\nyellow\n')
    (folder / 'train' / 'yellow').mkdir()
    with pytest.raises(DataError, match=r'without an image: yellow'):
        sources.open_splits(config)


def test_classes_of_a_checkpoint():
    """Equal numbers of classes are not enough: other names, or another order, make every accuracy meaningless."""
    split = sources.Split(None, 'val', ['a', 'b', 'c'])
    assert sources.check_classes(split, ['a', 'b', 'c']) is None
    assert sources.check_classes(split, None) is None
    for other in (['a', 'c', 'b'], ['a', 'b', 'd']):
        with pytest.raises(DataError, match=r"class . of val is '.', of the checkpoint '.': it was trained on other"):
            sources.check_classes(split, other)
    with pytest.raises(DataError, match=r'val has 3 classes; the checkpoint has 2'):
        sources.check_classes(split, ['a', 'b'])
    assert 'the order of the classes is taken to be the same' in sources.check_classes(split, ['x', 'y', 'z'])


@pytest.mark.parametrize('policy', ['rand-m9-mstd0.5-inc1', 'rand-m10', 'original', 'augmix-m5'])
def test_every_augmentation_works_at_every_magnitude(loaders, image_folder, policy):
    """With Pillow 13, timm's strongest posterize alone is an error that ends a run after thousands of images."""
    train, _ = loaders(recipe(image_folder(), augment={'auto_augment': policy}))
    operations = list(data.augment_operations(train.dataset.transform))
    assert len(operations) > 10
    image = Image.new('RGB', (16, 16), (200, 100, 50))
    for operation in operations:
        operation.prob, operation.magnitude_std = 1.0, 0
        for magnitude in (0, 0.4, 5, 9, 9.6, 10):
            operation.magnitude = magnitude
            assert operation(image).size == (16, 16), operation.name


def spoil(folder: Path, *names: str) -> None:
    """Breaks images in the ways that happen: cut off, emptied, replaced by text."""
    for index, name in enumerate(names):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes((content[: len(content) // 2], b'', b'<html>not found</html>')[index % 3])


@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_images_are_counted_named_and_skipped(loaders, image_folder, workers):
    folder = image_folder()
    bad = ['train/red/000.png', 'train/red/001.png', 'train/green/007.png']
    spoil(folder, *bad)
    config = recipe(folder, data={'workers': workers, 'max_unreadable': 3})
    train, _ = loaders(config)
    for _ in range(2):  # an image counts once, however often it is met
        assert sum(len(targets) for _, targets in train) == 24
    assert sorted(train.dataset.unreadable()) == sorted(name.removeprefix('train/') for name in bad)
    train, _ = loaders(recipe(folder, data={'workers': workers, 'max_unreadable': 2}))
    with pytest.raises(DataError, match=r'3 unreadable images in the .*train split: (.*\.png.*){3}max_unreadable=2'):
        list(train)


def test_validation_leaves_out_what_it_cannot_read(loaders, image_folder):
    folder = image_folder()
    spoil(folder, 'val/green/002.png')
    targets = torch.cat([targets for _, targets in loaders(recipe(folder))[1]])
    assert targets.tolist() == [0, 0, 0, 1, 1, -1, 2, 2, 2]


def test_batches_follow_from_the_epoch_and_not_from_loader_processes_or_where_a_pass_begins(loaders, image_folder):
    folder = image_folder()
    before = torch.get_rng_state()

    def epochs(workers: int, *passes: tuple[int, int]) -> list[torch.Tensor]:
        config = recipe(folder, data={'workers': workers}, augment={'erase_prob': 0.5})
        train, _ = loaders(config)
        found = []
        for epoch, start in passes:
            batches = data.epoch_batches(train, config.run.seed, epoch, start)
            found.append(torch.cat([images for images, _ in batches]))
        return found

    first, second = epochs(2, (0, 0), (1, 0))
    assert not torch.equal(first, second)
    assert torch.equal(epochs(0, (1, 0))[0], second)
    rest = epochs(2, (1, 2))[0]
    assert 0 < len(rest) < len(second)
    assert torch.equal(rest, second[len(second) - len(rest) :])
    assert torch.equal(torch.get_rng_state(), before)  # and takes no number from the training process


def test_images_decoded_into_memory_give_the_same_batches(loaders, image_folder):
    folder = image_folder()
    (folder / 'train' / 'red' / '000.png').write_bytes(b'')
    found = []
    for cache in ('none', 'ram'):
        train, val = loaders(recipe(folder, data={'cache': cache, 'workers': 2}))
        found.append([*data.epoch_batches(train, 0, 0), *val])
        assert train.dataset.unreadable() == ['red/000.png']
    for (images, targets), (cached, cached_targets) in zip(*found, strict=True):
        assert torch.equal(images, cached)
        assert torch.equal(targets, cached_targets)
    with pytest.raises(DataError, match=r'1 unreadable image in the .*red/000\.png .*max_unreadable=0'):
        loaders(recipe(folder, data={'cache': 'ram', 'max_unreadable': 0}))


def test_a_set_that_does_not_fit_into_memory_is_rejected_at_once(image_folder, loaders, monkeypatch):
    """Every process of a machine needs the memory."""
    config = recipe(image_folder(), data={'cache': 'ram'})
    size = 24 * 24 * 24 * 3  # of the training images
    monkeypatch.setattr('hydra_vision.train.readable.free_memory', lambda: size)
    with pytest.raises(DataError, match=r"data.cache='ram': .*train needs about .* set data.cache=none"):
        loaders(config)
    monkeypatch.setattr('hydra_vision.train.readable.free_memory', lambda: 2 * size)
    loaders(config)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    with pytest.raises(DataError, match=r'needs about 0.0 GiB decoded in each of 2 processes'):
        loaders(config)


def test_an_epoch_of_which_nothing_is_left_does_not_ask_the_loader(loaders, image_folder, monkeypatch):
    config = recipe(image_folder())
    train, _ = loaders(config)
    assert len(list(data.epoch_batches(train, 0, 0, len(train) - 1))) == 1
    monkeypatch.setattr(type(train), '__iter__', lambda self: pytest.fail('asked'))
    assert list(data.epoch_batches(train, 0, 0, len(train))) == []


def test_unusual_images_of_a_folder_are_converted_or_rejected(image_folder, loaders):
    """One of each kind that real sets hold; tests/test_images.py has what each becomes."""
    folder = image_folder(val=1)
    red = folder / 'val' / 'red'
    image = Image.new('RGB', (16, 16), (100, 100, 100))
    image.convert('CMYK').save(red / 'cmyk.jpg')
    Image.fromarray(np.full((16, 16), 100 * 257, dtype=np.uint16)).save(red / 'deep.png')
    image.quantize(4).save(red / 'palette.png')
    image.save(red / 'moving.gif', save_all=True, append_images=[Image.new('RGB', (16, 16))])
    _, val = loaders(recipe(folder, data={'mean': [0.0], 'std': [1.0], 'crop_pct': 1.0}))
    images, targets = (torch.cat(parts) for parts in zip(*val, strict=True))
    assert (images[targets == 2][-4:] - 100 / 255).abs().max() < 0.03  # red/000.png comes first
    assert val.dataset.unreadable() == []
    _, val = loaders(recipe(folder, data={'unusual_images': 'unreadable'}))
    assert len(list(val)) > 0
    names = sorted(Path(name).name for name in val.dataset.unreadable())
    assert names == ['cmyk.jpg', 'deep.png', 'moving.gif', 'palette.png']

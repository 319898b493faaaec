"""Sets that are not folders: webdataset shards, parquet, Hugging Face data sets; read whole and streamed."""

import io
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hydra_vision.errors import ConfigError, DataError
from hydra_vision.train import data, sources
from hydra_vision.train.config import Config, merge

CPU = torch.device('cpu')


def encoded(number: int, size: int = 16) -> bytes:
    """A PNG whose upper left pixel tells its number."""
    pixels = np.full((size, size, 3), 7 * (number % 3) + 40, dtype=np.uint8)
    pixels[..., 0] = number
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG')
    return file.getvalue()


def write_shards(folder: Path, split: str, shards: list[list[tuple[str, bytes, str]]]) -> str:
    """Tar files of (key, image, class); the name of the split for timm."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, samples in enumerate(shards):
        with tarfile.open(folder / f'{split}-{number:04}.tar', 'w') as tar:
            for key, image, label in samples:
                for suffix, content in (('png', image), ('cls', label.encode())):
                    info = tarfile.TarInfo(f'{key}.{suffix}')
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f'{split}-{{0000..{len(shards) - 1:04}}}.tar'


def samples(start: int, count: int) -> list[tuple[str, bytes, str]]:
    return [(f'{number:05}', encoded(number), str(number % 3)) for number in range(start, start + count)]


def recipe(folder: Path, name: str, **sections: dict) -> Config:
    base = {
        'model': {'name': 'test_vit', 'num_classes': 3},
        'data': {'name': name, 'dir': str(folder), 'img_size': 16, 'batch_size': 4, 'workers': 0, 'crop_pct': 1.0},
        'augment': {'hflip': 0.0},
    }
    return Config.from_dict(merge(base, sections))


@pytest.fixture
def shards(tmp_path):
    """Four training and two validation shards: a function of what to put in place of some samples."""
    pytest.importorskip('webdataset')

    def build(replaced: dict[int, bytes] | None = None, **options: object) -> Config:
        train = [samples(6 * shard, 6) for shard in range(4)]
        val = [samples(100 + 5 * shard, 5) for shard in range(2)]
        for number, content in (replaced or {}).items():
            split = val if number >= 100 else train
            for shard in split:
                shard[:] = [(k, content if int(k) == number else image, label) for k, image, label in shard]
        folder = tmp_path / 'shards'
        names = [write_shards(folder, name, parts) for name, parts in (('train', train), ('val', val))]
        options = {'train_split': names[0], 'val_split': names[1], 'train_samples': 24, 'val_samples': 10, **options}
        return recipe(folder, 'wds/', data=options)

    return build


@pytest.mark.parametrize('workers', [0, 2])
def test_webdataset_shards_are_read_whole(loaders, shards, workers):
    config = shards(workers=workers)
    train, val = loaders(config)
    assert len(train) == 6
    assert sum(len(targets) for _, targets in data.epoch_batches(train, config.run.seed, 0)) == 24
    targets = torch.cat([targets for _, targets in val])
    assert sorted(targets.tolist()) == sorted(number % 3 for number in range(100, 110))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_stream_is_the_same_for_one_seed_and_number_of_processes(loaders, shards, workers):
    config = shards(workers=workers)

    def epoch(number: int) -> torch.Tensor:
        train, _ = loaders(config)
        return torch.cat([images for images, _ in data.epoch_batches(train, config.run.seed, number)])

    first = epoch(0)
    assert torch.equal(first, epoch(0))
    assert not torch.equal(first, epoch(1))


@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_images_of_a_stream_are_counted_named_and_skipped(loaders, shards, workers):
    config = shards({3: encoded(3)[:40], 20: b'', 104: b'<html>'}, workers=workers, max_unreadable=2)
    train, val = loaders(config)
    for epoch in range(2):  # an image counts once, however often it is met
        assert sum(len(targets) for _, targets in data.epoch_batches(train, config.run.seed, epoch)) == 24
    assert sorted(name.rpartition(':')[2] for name in train.dataset.unreadable()) == ['00003', '00020']
    assert '2 unreadable images in the wds/ (train' in train.dataset.report()
    assert sum(len(targets) for _, targets in val) == 9
    assert '1 unreadable image' in val.dataset.report()
    train, _ = loaders(shards({3: b'', 4: b'', 5: b''}, workers=workers, max_unreadable=2))
    with pytest.raises(DataError, match=r'3 unreadable images in the wds/ .*train-0000\.tar:0000.*max_unreadable=2'):
        list(train)


def test_a_damaged_shard_is_named(loaders, shards):
    config = shards()
    path = Path(config.data.dir) / 'train-0002.tar'
    path.write_bytes(path.read_bytes()[:700])
    train, _ = loaders(config)
    with pytest.raises(DataError, match=r'a shard of the wds/ .* is damaged: .*train-0002\.tar'):
        list(train)
    path.unlink()
    train, _ = loaders(config)
    with pytest.raises(DataError, match=r'a shard of the wds/ .* is damaged: .*train-0002\.tar'):
        list(train)


def test_a_sample_without_its_class_is_named(loaders, shards):
    config = shards(target_key='label')
    train, _ = loaders(config)
    with pytest.raises(DataError, match=r'label'):
        list(train)


def test_classes_of_a_stream_must_fit_the_model(loaders, shards):
    config = Config.from_dict(merge(shards().to_dict(), {'model': {'num_classes': 2}}))
    with pytest.raises(DataError, match=r'has class 2; the model has 2 classes'):
        list(loaders(config)[0])


def test_more_loader_processes_than_shards_are_refused(loaders, shards):
    with pytest.raises(DataError, match=r'has 4 shards for 1 x 5 loader processes.*--workers 4 at most'):
        loaders(shards(workers=5))


def test_sixteen_bit_images_of_a_stream(loaders, shards):
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16), 100 * 257, dtype=np.uint16)).save(file, 'PNG')
    _, val = loaders(shards({number: file.getvalue() for number in range(100, 110)}, mean=[0.0], std=[1.0]))
    images = torch.cat([images for images, _ in val])
    assert torch.allclose(images, torch.full_like(images, 100 / 255))  # Pillow alone: white


def write_parquet(folder: Path, broken: tuple[int, ...] = ()) -> None:
    datasets = pytest.importorskip('datasets')
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=['a', 'b', 'c'])})
    folder.mkdir(exist_ok=True)
    for split, numbers in (('train', range(24)), ('validation', range(100, 109))):
        rows = [
            {'image': {'bytes': b'no image' if n in broken else encoded(n), 'path': f'{n}.png'}, 'label': n % 3}
            for n in numbers
        ]
        for shard in range(2):
            part = datasets.Dataset.from_list(rows[shard::2], features=features)
            part.to_parquet(folder / f'{split}-{shard:05}-of-00002.parquet')


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """Caches of the Hugging Face libraries in the scratch folder, and no network."""
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    datasets.disable_progress_bars()


def test_parquet_files(loaders, tmp_path, no_hub):
    write_parquet(tmp_path / 'set', broken=(5,))
    train, val = loaders(recipe(tmp_path / 'set', 'parquet', data={'val_split': 'validation'}))
    assert sum(len(targets) for _, targets in train) == 24
    assert train.dataset.unreadable() == ['5.png']
    assert sources.open_splits(recipe(tmp_path / 'set', 'parquet'))[0].classes == ['a', 'b', 'c']
    assert sorted(torch.cat([targets for _, targets in val]).tolist()) == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize('workers', [0, 2])
def test_hugging_face_sets_streamed(loaders, tmp_path, no_hub, workers):
    write_parquet(tmp_path / 'set', broken=(5, 104))
    options = {'train_samples': 24, 'val_samples': 9, 'workers': workers}
    config = recipe(tmp_path / 'cache', f'hfids/{tmp_path / "set"}', data=options)
    train, val = loaders(config)
    assert sum(len(targets) for _, targets in data.epoch_batches(train, config.run.seed, 0)) == 24
    assert train.dataset.unreadable() == ['5.png']
    assert sum(len(targets) for _, targets in val) == 8
    assert val.dataset.unreadable() == ['104.png']


def test_hugging_face_sets_with_random_access(loaders, tmp_path, no_hub):
    write_parquet(tmp_path / 'set')
    train, val = loaders(recipe(tmp_path / 'cache', f'hfds/{tmp_path / "set"}'))
    assert len(train.dataset) == 24
    assert len(val.dataset) == 9


def test_streams_of_too_few_shards(loaders, tmp_path, no_hub):
    write_parquet(tmp_path / 'set')
    options = {'train_samples': 24, 'val_samples': 9, 'workers': 3}
    with pytest.raises(DataError, match=r'has 2 shards for 1 x 3 loader processes'):
        loaders(recipe(tmp_path / 'cache', f'hfids/{tmp_path / "set"}', data=options))


def test_a_folder_without_parquet_files(tmp_path):
    pytest.importorskip('datasets')  # a missing package is told first
    with pytest.raises(DataError, match=r'is not a folder with \.parquet files'):
        sources.open_splits(recipe(tmp_path, 'parquet'))


def test_missing_packages_and_options_without_effect(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"data.download has no effect for data.name='wds/'"):
        recipe(tmp_path, 'wds/', data={'download': True})
    monkeypatch.setattr(sources.importlib.util, 'find_spec', lambda name: None)
    for name in ('parquet', 'wds/', 'hfds/x'):
        with pytest.raises(DataError, match=r"pip install 'hydra-vision\[data\]'"):
            sources.open_splits(recipe(tmp_path, name))


def test_a_killed_loader_process_is_a_clear_error(tiny, fails, monkeypatch):
    """As the system does when memory runs out."""
    read = data.ReadableDataset._read

    def killed(self, *arguments):
        if self.split.endswith('train') and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, *arguments)

    monkeypatch.setattr(data.ReadableDataset, '_read', killed)
    error = fails(*tiny, '--workers', 1, code=1)
    assert 'a loader process died' in error
    assert '--resume auto' in error


def test_a_stream_goes_on_inside_an_epoch(loaders, shards):
    config = shards(workers=2)

    def images(start: int) -> torch.Tensor:
        train, _ = loaders(config)
        return torch.cat([images for images, _ in data.epoch_batches(train, config.run.seed, 1, start)])

    assert torch.equal(images(2), images(0)[2 * 4 :])


def test_a_streamed_run_of_two_processes_counts_once_and_goes_on_bit_by_bit(
    shards, processes, killed_at_update_8, tmp_path, assert_same_run
):
    options = shards(workers=1).to_dict()['data']
    fields = {f'data.{key}': options[key] for key in ('name', 'dir', 'train_split', 'val_split')}
    fields |= {f'data.{key}': options[key] for key in ('train_samples', 'val_samples', 'workers', 'img_size')}
    fields |= {'data.batch_size': 4, 'data.val_batch_size': 3, 'model.num_classes': 3, 'schedule.epochs': 3}
    fields |= {'model.kwargs.patch_size': 4, 'model.kwargs.depth': 1, 'model.kwargs.embed_dim': 64, 'log.every': 1}
    fields |= {'run.device': 'cpu', 'run.threads': 1, 'checkpoint.every_steps': 1, 'model.drop_path_rate': 0.2}
    (tmp_path / 'base.yaml').write_text('model: {name: hydra_vit_nano}\n')
    command = ['--config', 'base.yaml', *(f'--set={key}={value}' for key, value in fields.items())]
    whole = processes(*command, '--output', 'whole', world=2)
    assert whole.wait() == [0, 0], whole.output()
    killed_at_update_8(*command)
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')
    assert '│     10 │' in whole.output()

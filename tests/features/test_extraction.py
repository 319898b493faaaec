"""Extraction: the rows are the model's features, none is missing in silence, a kill costs nothing."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import timm
import torch
from PIL import Image

from hydra_vision.errors import DataError, UserError, WriteError
from hydra_vision.features import (
    FeatureError,
    extract,
    files,
    image_features,
    load_backbone,
    load_features,
    open_images,
)
from hydra_vision.images import ImageRules
from hydra_vision.io import read_csv


def by_hand(backbone, folder: Path, paths: list[str]) -> np.ndarray:
    transform = backbone.transform()
    x = torch.stack([transform(Image.open(folder / path).convert('RGB')) for path in paths])
    with torch.inference_mode():
        return backbone.model.forward_head(backbone.model.forward_features(x), pre_logits=True).numpy()


@pytest.mark.parametrize(('suffix', 'workers'), [('.npy', 0), ('.npy', 2), ('.safetensors', 0), ('.parquet', 0)])
def test_rows_are_the_pooled_features(backbone, folder, tmp_path, suffix, workers):
    if suffix == '.parquet':
        pytest.importorskip('pyarrow')
    out = tmp_path / f'f{suffix}'
    features = extract(folder, out, model=backbone, batch_size=5, workers=workers)
    assert features.array.shape == (12, 64)
    assert features.classes == ['a'] * 4 + ['b'] * 4 + ['c'] * 4
    assert features.paths[:2] == ['a/image0.png', 'a/image3.jpg']
    np.testing.assert_allclose(features.array, by_hand(backbone, folder, features.paths), atol=1e-5)
    assert sorted(path.name for path in tmp_path.glob('f.*')) == [out.name, f'{out.name}.csv', f'{out.name}.json']


def test_a_model_in_memory(backbone, folder, tmp_path):
    features = extract(folder, tmp_path / 'f.npy', model=backbone.model, workers=0)
    assert features.card['model'] == 'test_hydra_vit'
    assert features.card['fingerprint'] == backbone.fingerprint()
    np.testing.assert_allclose(features.array, by_hand(backbone, folder, features.paths), atol=1e-5)
    with pytest.raises(FeatureError, match='in training mode'):
        extract(folder, tmp_path / 'g.npy', model=timm.create_model('test_vit'))


def test_other_readers_open_the_files(backbone, folder, tmp_path):
    kwargs = dict(model=backbone, workers=0, pool='tokens', dtype='float16')
    array = np.array(extract(folder, tmp_path / 'f.npy', **kwargs).array)
    assert array.shape == (12, 4, 64)
    assert array.dtype == np.float16
    np.testing.assert_array_equal(np.load(tmp_path / 'f.npy'), array)
    extract(folder, tmp_path / 'f.safetensors', **kwargs)
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / 'f.safetensors')['features'], array)

    parquet = pytest.importorskip('pyarrow.parquet')
    np.testing.assert_array_equal(extract(folder, tmp_path / 'f.parquet', **kwargs).array, array)
    table = parquet.read_table(tmp_path / 'f.parquet')
    assert table.column_names == ['path', 'class', 'features']
    assert str(table.schema.field('features').type) == 'fixed_size_list<element: halffloat>[256]'
    assert table['path'][3].as_py() == 'a/image9.jpg'
    np.testing.assert_array_equal(np.array(table['features'][3].as_py(), np.float16), array[3].ravel())
    assert json.loads(table.schema.metadata[b'hydra_vision'])['model'] == 'test_hydra_vit'


@pytest.mark.parametrize('suffix', ['.npy', '.safetensors', '.parquet'])
def test_shards_are_joined(backbone, folder, tmp_path, suffix, monkeypatch):
    if suffix == '.parquet':
        pytest.importorskip('pyarrow')
    kwargs = dict(model=backbone, workers=0, batch_size=5, pool='none')
    (folder / 'b' / 'image1.jpg').write_bytes(b'no image')
    whole = extract(folder, tmp_path / f'whole{suffix}', **kwargs)
    monkeypatch.setattr(files, '_SHARD_BYTES', 1)
    parts = extract(folder, tmp_path / f'f{suffix}', **kwargs)
    assert parts.shape == (11, 64, 2, 2)
    np.testing.assert_array_equal(parts.array, whole.array)
    assert parts.paths == whole.paths
    assert (tmp_path / f'f{suffix}.csv').read_bytes() == (tmp_path / f'whole{suffix}.csv').read_bytes()
    if suffix == '.parquet':
        import pyarrow.parquet

        metadata = pyarrow.parquet.read_metadata(parts.path)
        assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [4, 5, 2]
        assert pyarrow.parquet.read_table(parts.path)['path'].to_pylist() == parts.paths


def test_unreadable_images_are_listed_and_have_no_row(backbone, folder, tmp_path):
    (folder / 'a' / 'image3.jpg').write_bytes(b'no image')
    (folder / 'b' / 'image10.png').write_bytes((folder / 'b' / 'image4.png').read_bytes()[:100])
    with pytest.raises(DataError, match=r'2 unreadable images, max_unreadable=1: a/image3.jpg: Unident'):
        extract(folder, tmp_path / 'f.npy', model=backbone, workers=0, batch_size=2, max_unreadable=1)
    # a higher limit goes on where the lower one ended
    started = []
    features = extract(
        folder, tmp_path / 'f.npy', model=backbone, workers=0, batch_size=2, on_progress=lambda *p: started.append(p)
    )
    assert started[0][0] > 1
    assert len(features.array) == len(features.paths) == len(features.classes) == 10
    assert set(features.skipped) == {'a/image3.jpg', 'b/image10.png'}
    np.testing.assert_allclose(features.array, by_hand(backbone, folder, features.paths), atol=1e-5)
    rows = read_csv(tmp_path / 'f.npy.csv')
    assert [row['path'] for row in rows] == list(open_images(folder).paths)
    assert rows[1]['row'] == ''
    assert 'UnidentifiedImageError' in rows[1]['error']


def test_the_reason_is_the_same_every_time(backbone, folder, tmp_path):
    (folder / 'a' / 'image3.jpg').write_bytes(b'no image')
    with tarfile.open(tmp_path / 'images.tar', 'w') as archive:
        archive.add(folder, arcname='.')
    skipped = extract(tmp_path / 'images.tar', tmp_path / 'f.npy', model=backbone, workers=0).skipped
    assert skipped == {'a/image3.jpg': 'UnidentifiedImageError: cannot identify image file'}


def test_nothing_readable(backbone, tmp_path):
    (tmp_path / 'a.png').write_bytes(b'')
    (tmp_path / 'list.txt').write_text('a.png\ngone.png\n')
    with pytest.raises(DataError, match=r'not one of 2 images could be read: a\.png'):
        extract(tmp_path / 'list.txt', tmp_path / 'f.npy', model=backbone, workers=0)
    assert not (tmp_path / 'f.npy').exists()


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ('suffix', 'damage'),
    [
        *((suffix, 'none') for suffix in ('.npy', '.safetensors', '.parquet')),
        *(('.npy', damage) for damage in ('torn', 'missing', 'not finished')),
    ],
)
def test_resumes_to_the_same_file(backbone, folder, tmp_path, suffix, damage, monkeypatch):
    if suffix == '.parquet':
        pytest.importorskip('pyarrow')
    monkeypatch.setattr(files, '_SHARD_SECONDS', 0.0)
    kwargs = dict(model=backbone, workers=0, batch_size=3)
    (folder / 'b' / 'image1.jpg').write_bytes(b'no image')
    (folder / 'c' / 'image11.jpg').write_bytes(b'no image')  # the last one
    whole, out = tmp_path / f'whole{suffix}', tmp_path / f'f{suffix}'
    extract(folder, whole, **kwargs)

    def stop(done, total):
        if done >= 9:
            raise Stop

    with pytest.raises(Stop):
        extract(folder, out, on_progress=stop, **kwargs)
    with pytest.raises(FeatureError, match='is not finished'):
        load_features(out)
    shards = sorted(out.with_name(f'{out.name}.partial').glob('*.safetensors'))
    assert len(shards) == 3
    if damage == 'torn':
        shards[2].write_bytes(shards[2].read_bytes()[:-70])
    elif damage == 'missing':
        shards[1].unlink()
    elif damage == 'not finished':
        shards[2].with_name(f'.{shards[2].name}.tmp').write_bytes(b'half')
    begun = []
    extract(folder, out, on_progress=lambda done, total: begun.append(done), **kwargs)
    assert begun[0] == {'torn': 6, 'missing': 3}.get(damage, 9)
    for suffixes in ('', '.csv', '.json'):
        assert Path(f'{out}{suffixes}').read_bytes() == Path(f'{whole}{suffixes}').read_bytes()
    assert sorted(path.name for path in tmp_path.glob('f.*')) == [out.name, f'{out.name}.csv', f'{out.name}.json']
    monkeypatch.chdir(tmp_path)  # finished: nothing is read again, by whatever path the folder is named
    extract('images', out, on_progress=lambda done, total: pytest.fail('read again'), **kwargs)
    out.unlink()  # but what is gone is made again
    begun.clear()
    extract(folder, out, on_progress=lambda done, total: begun.append(done), **kwargs)
    assert begun[0] == 0
    assert out.read_bytes() == whole.read_bytes()


def test_two_at_once(backbone, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(files, '_LOCK_SECONDS', 0.1)
    kwargs = dict(model=backbone, workers=0, batch_size=3)
    refused = []

    def second(done, total):
        with pytest.raises(FeatureError, match=r'another process is writing .*f\.npy: wait for it'):
            extract(folder, tmp_path / 'f.npy', **kwargs)
        extract(folder, tmp_path / 'g.npy', **kwargs)  # another file is free
        refused.append(done)

    features = extract(folder, tmp_path / 'f.npy', on_progress=second, **kwargs)
    assert refused == [0, 3, 6, 9, 12]
    np.testing.assert_allclose(features.array, by_hand(backbone, folder, features.paths), atol=1e-5)
    assert not list(tmp_path.glob('*.lock'))


@pytest.mark.slow
def test_a_lock_of_a_killed_process_is_none(folder, tmp_path):
    """Nor one that its loader processes hold for a moment longer."""
    code = (
        'import os, sys; from hydra_vision.features import extract;'
        'extract(sys.argv[1], sys.argv[2], model="test_hydra_vit", random_init=True, img_size=32, workers=2,'
        'batch_size=1, device="cpu", on_progress=lambda done, _: done > 3 and os.kill(os.getpid(), 9))'
    )
    out = tmp_path / 'f.npy'
    done = subprocess.run([sys.executable, '-c', code, str(folder), str(out)], check=False, stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    features = extract(folder, out, model=load_backbone('test_hydra_vit', random_init=True, img_size=32), workers=0)
    assert len(features.array) == 12


def test_other_images_of_the_same_names_are_told_apart(backbone, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / 'val')
    for path in other.rglob('*.png'):
        with Image.open(path) as image:
            flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        flipped.save(path)
    out = tmp_path / 'f.npy'
    before = extract(folder, out, model=backbone, workers=0).array.copy()
    with pytest.raises(FeatureError, match=f'begun with other images \\({folder}, now {other}\\)'):
        extract(other, out, model=backbone, workers=0)
    after = extract(other, out, model=backbone, workers=0, overwrite=True).array
    assert not np.allclose(before, after)


def test_killed_while_finishing(backbone, folder, tmp_path, monkeypatch):
    kwargs = dict(model=backbone, workers=0)
    with monkeypatch.context() as patch:
        replace = os.replace
        patch.setattr(
            files.os, 'replace', lambda a, b: (_ for _ in ()).throw(Stop) if Path(b).suffix == '.npy' else replace(a, b)
        )
        with pytest.raises(Stop):
            extract(folder, tmp_path / 'f.npy', **kwargs)
    assert not (tmp_path / 'f.npy').exists()
    assert len(extract(folder, tmp_path / 'f.npy', **kwargs).array) == 12


def test_full_disk(backbone, folder, tmp_path, monkeypatch):
    kwargs = dict(model=backbone, workers=0, batch_size=3)
    monkeypatch.setattr(files, '_SHARD_SECONDS', 0.0)
    calls = []

    def fsync(_):
        calls.append(0)
        if len(calls) > 6:  # two per file: the card and two shards
            raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', fsync)
        with pytest.raises(WriteError, match=r'could not be written .*No space left on device.* are kept'):
            extract(folder, tmp_path / 'f.npy', **kwargs)
    begun = []
    features = extract(folder, tmp_path / 'f.npy', on_progress=lambda done, _: begun.append(done), **kwargs)
    assert begun[0] == 6
    np.testing.assert_allclose(features.array, by_hand(backbone, folder, features.paths), atol=1e-5)


@pytest.mark.slow
def test_survives_sigkill(folder, tmp_path):
    paths = [str(folder / path) for path in open_images(folder).paths] * 300
    (tmp_path / 'list.txt').write_text('\n'.join(paths))
    out = tmp_path / 'f.npy'
    code = (
        'import sys; from hydra_vision.features import extract, files; files._SHARD_SECONDS = 0.2;'
        'extract(sys.argv[1], sys.argv[2], model="test_hydra_vit", random_init=True, img_size=32, workers=0,'
        'batch_size=4, device="cpu")'
    )
    process = subprocess.Popen([sys.executable, '-c', code, str(tmp_path / 'list.txt'), str(out)])
    deadline = time.monotonic() + 120
    folder = tmp_path / 'f.npy.partial'
    while len([*folder.glob('*.safetensors')]) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    begun = []
    features = extract(
        tmp_path / 'list.txt',
        out,
        model=load_backbone('test_hydra_vit', random_init=True, img_size=32),
        batch_size=128,
        on_progress=lambda done, _: begun.append(done),
    )
    assert 0 < begun[0] < len(paths)
    np.testing.assert_allclose(features.array[0::12], features.array[:1].repeat(300, 0), atol=1e-5)
    np.testing.assert_allclose(features.array[11::12], features.array[11:12].repeat(300, 0), atol=1e-5)


def test_other_features_are_not_overwritten(backbone, folder, tmp_path):
    out = tmp_path / 'f.npy'
    kwargs = dict(workers=0)
    before = extract(folder, out, model=backbone, **kwargs)
    content = out.read_bytes()
    other = load_backbone('test_hydra_vit', random_init=True, img_size=32, seed=1)
    for changed, match in (
        (dict(model=other), 'another way \\(fingerprint'),
        (dict(model=load_backbone('test_vit', random_init=True)), '"test_hydra_vit", now "test_vit"'),
        (dict(model=backbone, pool='max'), 'pool "avg", now "max"'),
        (dict(model=backbone, layers=[-1]), 'layers null, now \\[3\\]'),
    ):
        with pytest.raises(FeatureError, match=match):
            extract(folder, out, **kwargs, **changed)
    (folder / 'a' / 'image0.png').rename(folder / 'a' / 'image00.png')
    with pytest.raises(FeatureError, match='begun with other images'):
        extract(folder, out, model=backbone, **kwargs)
    # what has no weights makes another model, too
    kwargs['model'] = load_backbone('test_hydra_vit', random_init=True, img_size=32)
    extract(folder, tmp_path / 'h.npy', **kwargs)
    built = load_backbone('test_hydra_vit', random_init=True, img_size=32, model_kwargs={'scan_order': 'column'})
    assert built.fingerprint() == backbone.fingerprint()
    grey = dataclasses.replace(kwargs.pop('model'), rules=ImageRules(exif_rotation=True))
    for model, match in ((built, 'arguments {}, now {"scan_order": "column"}'), (grey, 'now {"exif_rotation": true}')):
        with pytest.raises(FeatureError, match=match):
            extract(folder, tmp_path / 'h.npy', model=model, **kwargs)
    assert out.read_bytes() == content
    after = extract(folder, out, model=backbone, pool='max', overwrite=True, **kwargs)
    assert out.read_bytes() != content
    assert before.card['pool'] != after.card['pool']
    (tmp_path / 'g.npy').write_bytes(b'mine')
    with pytest.raises(FeatureError, match='is not of this extraction'):
        extract(folder, tmp_path / 'g.npy', model=backbone, **kwargs)
    assert (tmp_path / 'g.npy').read_bytes() == b'mine'


@pytest.mark.parametrize(
    ('changed', 'match'),
    [
        (dict(out='f.txt'), 'must end in .npy, .safetensors, .parquet'),
        (dict(out='nowhere/f.npy'), "there is no folder 'nowhere'"),
        (dict(out='/proc/self/f.npy'), r"f\.npy' cannot be written: no file can be made in '/proc/self'"),
        (dict(pool='mean'), "pool='mean'; allowed: avg"),
        (dict(pool='cls'), 'has no class token'),
        (dict(layers=[0, 4]), 'layer 4 is out of range; the model has layers 0 to 3'),
        (dict(layers=[3, -1]), 'each one once'),
        (dict(dtype='int8'), 'allowed: float32, float16'),
        (dict(batch_size=0), 'batch_size=0'),
        (dict(amp='bf8'), 'allowed: auto, none, bf16'),
        (dict(images='nowhere'), "'nowhere' is neither a folder nor a file"),
        (dict(img_size=64), 'a loaded model is taken as it is'),
        (dict(device='meta'), 'computes nothing'),
    ],
)
def test_bad_input_before_any_work(backbone, folder, tmp_path, monkeypatch, changed, match):
    monkeypatch.chdir(tmp_path)
    kwargs = {'images': folder, 'out': 'f.npy', 'model': backbone, 'workers': 0, **changed}
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(UserError, match=match):
        extract(kwargs.pop('images'), kwargs.pop('out'), **kwargs)
    assert sorted(tmp_path.rglob('*')) == before


def test_features_that_are_not_finite_end_the_work(folder, tmp_path):
    backbone = load_backbone('test_hydra_vit', random_init=True, img_size=32)
    torch.nn.init.constant_(backbone.model.norm.bias, 1e6)
    with pytest.raises(DataError, match='not finite in float16'):
        extract(folder, tmp_path / 'f.npy', model=backbone, workers=0, dtype='float16')


MODELS = ['test_hydra_vit', 'test_vit', 'test_resnet', 'swin_tiny_patch4_window7_224', 'test_efficientnet']


@pytest.mark.parametrize('name', MODELS)
def test_final_features_agree_with_timm(name):
    """avg and max are what the model's own pooling gives, for tokens, NCHW and NHWC maps."""
    size = {} if name.startswith('swin') else {'img_size': 64}
    kwargs = {'depths': (1, 1, 1, 1)} if name.startswith('swin') else {}
    model = load_backbone(name, random_init=True, model_kwargs={'num_classes': 0, **kwargs}, **size).model
    x = torch.randn(2, 3, *((224, 224) if name.startswith('swin') else (64, 64)))
    with torch.inference_mode():
        for pool in ('avg', 'max'):
            if name == 'test_vit':
                expected = timm.models.vision_transformer.global_pool_nlc(model.forward_features(x), pool, 1)
            else:
                model.reset_classifier(0, pool)
                expected = model(x)
            torch.testing.assert_close(image_features(model, x, pool=pool), expected)
        tokens, spatial = (image_features(model, x, pool=pool) for pool in ('tokens', 'none'))
    torch.testing.assert_close(spatial.flatten(2).transpose(1, 2), tokens)


def test_layers(backbone):
    model, x = backbone.model, torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        last = image_features(model, x, layers=[-1])
        torch.testing.assert_close(last, image_features(model, x))
        both = image_features(model, x, layers=[3, 1], pool='tokens')
        expected = model.get_intermediate_layers(x, n=[1, 3], norm=True)
        torch.testing.assert_close(both, torch.cat(list(expected), -1))
        vit = timm.create_model('test_vit', img_size=32).eval()
        cls = image_features(vit, x, pool='cls', layers=[0, -1])
        outputs = vit.get_intermediate_layers(x, n=[0, len(vit.blocks) - 1], return_prefix_tokens=True, norm=True)
        torch.testing.assert_close(cls, torch.cat([prefix[:, 0] for _, prefix in outputs], 1))
        two = timm.create_model(
            'deit_tiny_distilled_patch16_224', img_size=32, depth=2, embed_dim=64, num_heads=2
        ).eval()
        torch.testing.assert_close(image_features(two, x, pool='cls', layers=[-1]), two.forward_features(x)[:, 0])
        torch.testing.assert_close(image_features(two, x, pool='cls'), two.forward_features(x)[:, 0])
        torch.testing.assert_close(image_features(two, x), two.forward_features(x)[:, 2:].mean(1))
        registers = timm.create_model(
            'vit_little_patch16_reg4_gap_256', img_size=32, embed_dim=64, depth=1, num_heads=2
        )
        with pytest.raises(FeatureError, match='has no class token'):  # the first prefix token is a register
            image_features(registers.eval(), x, pool='cls')
        resnet = timm.create_model('test_resnet').eval()
        assert image_features(resnet, x, layers=[1, 2]).shape == (
            2,
            sum(f['num_chs'] for f in resnet.feature_info[1:3]),
        )
        with pytest.raises(FeatureError, match='different grids'):
            image_features(resnet, x, layers=[1, 2], pool='tokens')


def test_layers_of_a_file(backbone, folder, tmp_path):
    both = extract(folder, tmp_path / 'f.npy', model=backbone, workers=0, layers=[-1, 0])
    assert both.card['layers'] == [0, 3]
    alone = extract(folder, tmp_path / 'g.npy', model=backbone, workers=0)
    np.testing.assert_allclose(both.layer(3), alone.array, atol=1e-6)
    for pool, shape in (('none', (12, 64, 2, 2)), ('tokens', (12, 4, 64))):
        maps = extract(folder, tmp_path / f'{pool}.npy', model=backbone, workers=0, layers=[0, 3], pool=pool)
        last = extract(folder, tmp_path / f'{pool}3.npy', model=backbone, workers=0, layers=[3], pool=pool)
        assert maps.layer(3).shape == shape
        np.testing.assert_allclose(maps.layer(3), last.array, atol=1e-6)
        assert not np.allclose(maps.layer(0), last.array, atol=1e-2)
    with pytest.raises(FeatureError, match=r'layer 2 is not in these features; they have \[0, 3\]'):
        both.layer(2)


def test_damaged_files_are_errors(backbone, folder, tmp_path):
    out = tmp_path / 'f.npy'
    extract(folder, out, model=backbone, workers=0)
    card, log = tmp_path / 'f.npy.json', tmp_path / 'f.npy.csv'
    text = card.read_text()
    for damaged in (text[:50], '[]', '{}'):
        card.write_text(damaged)
        for use in (load_features, lambda path: extract(folder, path, model=backbone, workers=0)):
            with pytest.raises(FeatureError, match=r'f\.npy\.json is damaged'):
                use(out)
    card.write_text(text)
    log.write_text(log.read_text().replace('5,', '6,', 1))
    with pytest.raises(FeatureError, match='rows'):
        load_features(out)
    log.unlink()
    with pytest.raises(FeatureError, match=r'has no f.npy.csv next to it'):
        load_features(out)
    with pytest.raises(FeatureError, match='no file'):
        load_features(tmp_path / 'h.npy')


@pytest.mark.parametrize('suffix', files.FORMATS)
def test_damaged_rows_are_errors(backbone, folder, tmp_path, suffix):
    if suffix == '.parquet':
        pytest.importorskip('pyarrow')
    out = tmp_path / f'f{suffix}'
    extract(folder, out, model=backbone, workers=0)
    rows = out.read_bytes()
    for damaged in (b'', b'x' * 100, rows[:60], rows[:-60]):
        out.write_bytes(damaged)
        with pytest.raises(FeatureError, match=rf'f{suffix} is damaged'):
            load_features(out)

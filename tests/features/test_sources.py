"""Sources list the same images in the same order, with the same classes, however they are stored."""

import gzip
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from hydra_vision.errors import UserError
from hydra_vision.features import FeatureError, open_images
from hydra_vision.train.sources import Digits


def pixels(images) -> list[np.ndarray]:
    return [np.asarray(images.load(i).convert('RGB')) for i in range(len(images))]


def test_folder_tar_and_list_agree(folder, tar, tmp_path):
    images = open_images(folder)
    (tmp_path / 'list.txt').write_text(
        ''.join(f'images/{path}\t{label}\n' for path, label in zip(images.paths, images.classes)) + '\n'
    )
    packed, listed = open_images(tar), open_images(tmp_path / 'list.txt')
    assert len(images) == 12
    assert [*images.paths] == [*packed.paths] == [path.removeprefix('images/') for path in listed.paths]
    assert [*images.classes] == [*packed.classes] == [*listed.classes] == list('aaaabbbbcccc')
    assert len(pickle.loads(pickle.dumps(packed))) == 12  # for loader processes that are not forked
    for other in (pickle.loads(pickle.dumps(packed)), listed):
        for a, b in zip(pixels(images), pixels(other)):
            np.testing.assert_array_equal(a, b)
    assert images.paths[:4] == ['a/image0.png', 'a/image3.jpg', 'a/image6.png', 'a/image9.jpg']  # 9 before 10


def test_tar_of_tars(folder, tmp_path):
    with tarfile.open(tmp_path / 'all.tar', 'w') as outer:
        for name in 'abc':
            with tarfile.open(tmp_path / f'{name}.tar', 'w') as inner:
                for path in sorted((folder / name).iterdir()):
                    inner.add(path, arcname=path.name)
            outer.add(tmp_path / f'{name}.tar', arcname=f'{name}.tar')
    nested, images = open_images(tmp_path / 'all.tar'), open_images(folder)
    assert [*nested.paths] == [*images.paths]
    assert [*nested.classes] == [*images.classes]
    for a, b in zip(pixels(images), pixels(nested)):
        np.testing.assert_array_equal(a, b)


def test_no_classes(folder, tmp_path):
    shutil.copy(folder / 'a' / 'image0.png', folder / 'loose.png')
    assert open_images(folder).classes is None
    assert open_images(folder / 'a').classes is None
    assert len(open_images(folder / 'loose.png')) == 1


def test_data_sets():
    digits = open_images('sklearn/digits/test')
    assert len(digits) == 360
    assert [*digits.classes] == [str(t) for t in Digits(train=False).targets]
    np.testing.assert_array_equal(np.asarray(digits.load(5)), Digits(train=False).images[5])
    assert open_images(digits) is digits
    photos = pickle.loads(pickle.dumps(open_images('sklearn/photos')))
    assert [photos.load(i).size for i in range(len(photos))] == [(640, 427)] * 2
    assert photos.paths[0] == 'sklearn/photos/china.jpg'


def test_an_image_of_any_name_is_a_source(folder, tmp_path):
    for name in ('photo.jfif', 'photo'):
        shutil.copy(folder / 'a' / 'image3.jpg', tmp_path / name)
        assert pixels(open_images(tmp_path / name))[0].shape == (23, 40, 3)
    with tarfile.open(tmp_path / 'odd.tar', 'w') as archive:
        archive.add(tmp_path / 'photo', arcname='a/photo')
        archive.add(tmp_path / 'photo.jfif', arcname='a/photo.jfif')
    assert [*open_images(tmp_path / 'odd.tar').paths] == ['a/photo', 'a/photo.jfif']


def test_bad_sources(folder, tar, tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FeatureError, match='empty holds no image; file names may end in'):
        open_images(tmp_path / 'empty')
    with pytest.raises(FeatureError, match="'gone' is neither a folder nor a file"):
        open_images('gone')
    (tmp_path / 'some.txt').write_text('a.png\tdog\nb.png\n')
    with pytest.raises(FeatureError, match='1 of 2 lines have a class'):
        open_images(tmp_path / 'some.txt')
    (tmp_path / 'images.tar.gz').write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(FeatureError, match=r'is no image, \.txt list or plain tar'):
        open_images(tmp_path / 'images.tar.gz')
    with tarfile.open(tmp_path / 'links.tar', 'w') as archive:
        archive.add(folder / 'a' / 'image0.png', arcname='a/0.png')
        link = tarfile.TarInfo('b/0.png')
        link.type, link.linkname = tarfile.LNKTYPE, 'a/0.png'
        archive.addfile(link)
    with pytest.raises(FeatureError, match=r'b/0\.png is a link inside of the tar'):
        open_images(tmp_path / 'links.tar')
    with pytest.raises(UserError, match="images='' is empty"):
        open_images('')
    with pytest.raises(FeatureError, match='int object; allowed'):
        open_images(3)

"""Which files are images, and what they become."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from hydra_vision.errors import DataError
from hydra_vision.images import FolderReader, ImageRules, find_images, open_image

GREY = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
COLOR = np.stack([GREY, GREY.T, 255 - GREY], axis=-1)


def reread(image: Image.Image, path, **options) -> Image.Image:
    image.save(path, **options)
    return Image.open(path)


def test_sixteen_bits_keep_their_range(tmp_path):
    """Pillow's own conversion gives white for everything above 255."""
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    image = ImageRules().apply(reread(deep, tmp_path / 'deep.png'))
    assert image.mode == 'RGB'
    assert np.array_equal(np.asarray(image)[..., 0], GREY)


@pytest.mark.parametrize('mode', ['CMYK', 'P', 'RGBA', 'L', '1', 'LA'])
def test_other_modes_become_the_colours_that_they_stand_for(tmp_path, mode):
    source = Image.fromarray(GREY if mode in ('L', 'LA', '1') else COLOR).convert(mode)
    path = tmp_path / ('image.jpg' if mode == 'CMYK' else 'image.png')
    options = {'quality': 100, 'subsampling': 0} if mode == 'CMYK' else {}
    image = ImageRules().apply(reread(source, path, **options))
    expected = np.asarray(source.convert('RGB')).astype(int)
    assert image.mode == 'RGB'
    assert np.abs(np.asarray(image) - expected).max() <= (10 if mode == 'CMYK' else 0)
    assert ImageRules(mode='L').apply(Image.open(path)).mode == 'L'


def test_a_palette_with_transparency_gives_no_warning(tmp_path, recwarn):
    image = Image.fromarray(COLOR).quantize(8)
    image = ImageRules().apply(reread(image, tmp_path / 'a.png', transparency=bytes(range(8))))
    assert image.mode == 'RGB'
    assert not recwarn.list


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new('RGB', (8, 8), color) for color in ('red', 'blue')]
    frames[0].save(tmp_path / 'a.gif', save_all=True, append_images=frames[1:])
    image = ImageRules().apply(Image.open(tmp_path / 'a.gif'))
    assert image.getpixel((0, 0)) == (255, 0, 0)


def test_exif_rotation_is_applied_where_asked_for(tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6  # turn by 90 degrees clockwise
    wide = Image.fromarray(np.tile(COLOR, (1, 2, 1)))
    image = reread(wide, tmp_path / 'turned.jpg', exif=tags)
    assert ImageRules().apply(image).size == (16, 8)
    assert ImageRules(exif_rotation=True).apply(Image.open(tmp_path / 'turned.jpg')).size == (8, 16)


@pytest.mark.parametrize('mode', ['CMYK', 'P', 'RGBA', 'I;16'])
def test_unusual_images_can_be_refused(tmp_path, mode):
    if mode == 'I;16':
        source, name = Image.fromarray(GREY.astype(np.uint16)), 'a.png'
    else:
        source, name = Image.fromarray(COLOR).convert(mode), 'a.jpg' if mode == 'CMYK' else 'a.png'
    with pytest.raises(ValueError, match=r'data.unusual_images=unreadable'):
        ImageRules(convert_unusual=False).apply(reread(source, tmp_path / name))


def png_of_16_bits(red: int, green: int, blue: int) -> Image.Image:
    """A coloured PNG of 16 bits a channel, which Pillow reads but cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    pixels = (b'\0' + struct.pack('>3H', red, green, blue) * 4) * 4
    parts = ((b'IHDR', struct.pack('>IIBBBBB', 4, 4, 16, 2, 0, 0, 0)), (b'IDAT', zlib.compress(pixels)), (b'IEND', b''))
    return Image.open(io.BytesIO(b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*part) for part in parts)))


def test_sixteen_bits_a_channel():
    assert ImageRules().apply(png_of_16_bits(0xFFFF, 0x8000, 0x00FF)).getpixel((0, 0)) == (255, 128, 0)
    with pytest.raises(ValueError, match=r'16 bits \(data.unusual_images=unreadable\)'):
        ImageRules(convert_unusual=False).apply(png_of_16_bits(1, 2, 3))


def test_an_animation_can_be_refused(tmp_path):
    frames = [Image.new('RGB', (8, 8), color) for color in ('red', 'blue')]
    frames[0].save(tmp_path / 'a.webp', save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r'an animation'):
        ImageRules(convert_unusual=False).apply(Image.open(tmp_path / 'a.webp'))


def test_pixels_without_a_defined_range_are_unreadable():
    with pytest.raises(ValueError, match=r'no defined range'):
        ImageRules().apply(Image.fromarray(GREY.astype(np.float32)))
    with pytest.raises(ValueError, match=r'more than 16 bits'):
        ImageRules().apply(Image.fromarray(GREY.astype(np.int32) << 16))


def test_every_image_is_found_whatever_it_is_called(tmp_path):
    image = Image.fromarray(COLOR)
    (tmp_path / 'b').mkdir()
    for name, kind in (('b/9.jpg', 'JPEG'), ('b/10.JPG', 'JPEG'), ('a.jfif', 'JPEG'), ('c.gif', 'GIF'), ('d', 'PNG')):
        image.save(tmp_path / name, format=kind)
    image.save(tmp_path / 'e.0001', format='WEBP')
    (tmp_path / 'empty.png').touch()
    os.symlink('gone.png', tmp_path / 'broken.png')
    os.symlink('self.png', tmp_path / 'self.png')
    for name in ('notes.txt', 'readme', 'data.csv'):
        (tmp_path / name).write_text('no image')
    os.mkfifo(tmp_path / 'pipe.png')
    names = ['a.jfif', 'b/9.jpg', 'b/10.JPG', 'broken.png', 'c.gif', 'd', 'e.0001', 'empty.png', 'self.png']
    assert find_images(tmp_path) == names
    assert find_images(tmp_path, ['.gif']) == ['c.gif']
    with pytest.raises(OSError, match='not a regular file'):
        open_image(tmp_path / 'pipe.png')


def test_links_are_followed_once(tmp_path):
    for name in 'ab':
        (tmp_path / 'data' / name).mkdir(parents=True)
        Image.fromarray(COLOR).save(tmp_path / 'data' / name / '0.png')
    os.symlink('..', tmp_path / 'data' / 'a' / 'up')
    os.symlink('.', tmp_path / 'data' / 'b' / 'self')
    os.symlink('.', tmp_path / 'data' / 'b' / 'again')
    assert find_images(tmp_path / 'data') == ['a/0.png', 'b/0.png']
    (tmp_path / 'elsewhere').mkdir()
    Image.fromarray(COLOR).save(tmp_path / 'elsewhere' / '1.png')
    os.symlink('../elsewhere', tmp_path / 'data' / 'c')
    assert find_images(tmp_path / 'data') == ['a/0.png', 'b/0.png', 'c/1.png']


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / 'a').mkdir()
    Image.fromarray(COLOR).save(tmp_path / '0.png')
    scandir = os.scandir

    def denied(path):
        if str(path).endswith('a'):
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', denied)
    with pytest.raises(DataError, match=r'a cannot be listed: Permission denied'):
        find_images(tmp_path)


def test_folder_reader_numbers_classes_as_timm(tmp_path):
    from timm.data import ImageDataset
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    for name in ('10', '9', 'x'):
        (tmp_path / 'all' / name).mkdir(parents=True)
        for number in range(11):
            Image.fromarray(COLOR).save(tmp_path / 'all' / name / f'{number}.png')
    ours, theirs = FolderReader(tmp_path / 'all'), ReaderImageFolder(str(tmp_path / 'all'))
    assert ours.samples == theirs.samples
    assert ours.class_to_idx == theirs.class_to_idx == {'9': 0, '10': 1, 'x': 2}
    assert ImageDataset(str(tmp_path), reader=ours)[12][1] == 1
    (tmp_path / 'map.txt').write_text('x\n9\n')
    mapped = FolderReader(tmp_path / 'all', class_map=str(tmp_path / 'map.txt'))
    assert mapped.samples == ReaderImageFolder(str(tmp_path / 'all'), class_map=str(tmp_path / 'map.txt')).samples
    with pytest.raises(DataError, match='holds no image'):
        FolderReader(tmp_path / 'all', suffixes=['.gif'])

"""The command `hydra-vision extract`: its table, its one-line errors."""

import numpy as np
import pytest

from hydra_vision.cli import main
from hydra_vision.features import load_features

MODEL = ['--model', 'test_hydra_vit', '--random-init', '--img-size', '32', '--workers', '0', '--device', 'cpu']


def test_table_and_skipped_images(folder, tmp_path, capsys):
    (folder / 'c' / 'image2.png').write_bytes(b'')
    out = tmp_path / 'f.npy'
    argv = [
        'extract',
        str(folder),
        '--output',
        str(out),
        *MODEL,
        '--layers=-2,-1',
        '--pool',
        'max',
        '--dtype',
        'float16',
    ]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert '11 x 128 float16' in text
    assert '1 unreadable' in text
    assert 'images/s' in text
    assert 'skipped c/image2.png: UnidentifiedImageError' in text
    features = load_features(out)
    assert features.card['layers'] == [2, 3]
    assert np.isfinite(features.array).all()
    assert main(argv) == 0
    assert 'nothing was left to do' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('argv', 'match'),
    [
        (['IMAGES', '--output', 'f.npy'], 'no model: give its name'),
        (['IMAGES', '--output', 'f.npy', '--model', 'hydra_vit_tiny'], 'no published weights'),
        (['IMAGES', '--output', 'f.npy', '--model', 'hydra_vit_tinny', '--random-init'], "'hydra_vit_tiny'"),
        (['IMAGES', '--output', 'f.csv', *MODEL], 'must end in .npy'),
        (['IMAGES', '--output', 'f.npy', *MODEL, '--layers', '9'], 'layer 9 is out of range'),
        (['IMAGES', '--output', 'f.npy', *MODEL, '--layers', 'last'], 'whole numbers'),
        (['IMAGES', '--output', 'f.npy', *MODEL, '--crop-pct', '0'], 'crop_pct=0.0; allowed: 0 < crop_pct <= 1'),
        (['IMAGES', '--output', 'f.npy', *MODEL, '--mean', '0.5,0.5'], 'mean has 2 values, the model 3 channels'),
    ],
)
def test_one_line_errors(argv, match, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(['extract', *(str(folder) if word == 'IMAGES' else word for word in argv)])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ''
    assert captured.err.count('\n') == 1
    assert match in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ['images']

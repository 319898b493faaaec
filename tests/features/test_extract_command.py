"""The command `hydra-vision extract`: its table, its one-line errors."""

import numpy as np

from hydra_vision.cli import main
from hydra_vision.features import load_features

MODEL = ['--model', 'test_hydra_vit', '--random-init', '--img-size', '32', '--workers', '0', '--device', 'cpu']


def test_table_and_skipped_images(folder, tmp_path, capsys):
    (folder / 'c' / 'image2.png').write_bytes(b'')
    out = tmp_path / 'f.npy'
    argv = ['extract', str(folder), '--output', str(out), *MODEL, '--layers=-2,-1', '--pool=max', '--dtype=float16']
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


def test_one_line_errors(fails, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, match in (
        (['f.npy'], 'no model: give its name'),
        (['f.npy', '--model', 'hydra_vit_tiny'], 'no published weights'),
        (['f.csv', *MODEL], 'must end in .npy'),
        (['f.npy', *MODEL, '--layers', '9'], 'layer 9 is out of range'),
        (['f.npy', *MODEL, '--layers', 'last'], 'whole numbers'),
        (['f.npy', *MODEL, '--crop-pct', '0'], 'crop_pct=0.0; allowed: 0 < crop_pct <= 1'),
    ):
        assert match in fails('extract', folder, '--output', *words)
    assert [path.name for path in tmp_path.iterdir()] == ['images']

"""ONNX, AOTInductor, int8, bfloat16: what comes out computes what the model computes."""

import io
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from hydra_vision import cli
from hydra_vision.downstream import export, export_aoti, export_onnx, quantized
from hydra_vision.errors import UserError

DIGITS = Path(__file__).resolve().parents[2] / 'weights' / 'hydra_vit_nano_digits'


def create(**kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model('test_hydra_vit', **{'depth': 1, 'img_size': 64, 'num_classes': 5, **kwargs}).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    'kwargs', [{}, dict(pos_embed='learn', scan_order='snake', class_token=True, class_token_position='middle')]
)
def test_onnx_with_dynamic_size(tmp_path, kwargs):
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model = create(dynamic_img_size=True, **kwargs)
    report = export_onnx(model, tmp_path / 'm.onnx', dynamic_size=True)
    assert report.difference < 1e-5
    assert report.size == (tmp_path / 'm.onnx').stat().st_size
    session = onnxruntime.InferenceSession(tmp_path / 'm.onnx', providers=['CPUExecutionProvider'])
    assert session.get_inputs()[0].shape == ['batch', 3, 'height', 'width']
    for size in ((1, 3, 16, 16), (2, 3, 208, 96), (1, 3, 16, 1600), (1, 3, 400, 400)):  # 1, 78, 100, 625 tokens
        x = torch.randn(size)
        (y,) = session.run(None, {'images': x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    'tokens', ['fixed', *(pytest.param(case, marks=pytest.mark.slow) for case in ('many', 'dynamic'))]
)
def test_graph_of_a_block_stays_small(tokens):
    size = 512 if tokens == 'many' else 64  # 1024 tokens are above the bound of the dense form
    axes = dict.fromkeys((0, 2, 3) if tokens == 'dynamic' else (0,), torch.export.Dim.DYNAMIC)
    nodes = []
    for depth in (1, 2):
        model = create(depth=depth, img_size=size, dynamic_img_size=tokens == 'dynamic')
        with torch.no_grad():
            program = torch.export.export(model, (torch.randn(2, 3, size, size),), dynamic_shapes=(axes,))
        nodes.append(len(program.graph.nodes))
    assert nodes[1] - nodes[0] < {'fixed': 160, 'many': 220, 'dynamic': 220}[tokens]


@pytest.mark.slow
def test_onnx_command_on_trained_weights(tmp_path, capsys):
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    file = tmp_path / 'digits.onnx'
    command = ['export', 'onnx', '--model', f'local-dir:{DIGITS}', '--output', str(file)]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert re.search(r'size +│ 2\.\d\d MiB', out)
    assert re.search(r'difference to PyTorch +│ \d\.\de-0[6-9]', out)
    assert re.search(r'one image +│ [\d.]+ ms', out)
    x, labels = digits()
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    (y,) = session.run(None, {'images': x.numpy()})
    assert (y.argmax(1) == labels.numpy()).mean() > 0.98
    assert cli.main(command) == 2
    assert '--overwrite' in capsys.readouterr().err


@pytest.mark.slow
def test_aoti(tmp_path):
    if not (os.environ.get('CXX') or shutil.which('g++') or shutil.which('clang++')):
        pytest.skip('AOTInductor needs a C++ compiler')
    model = create(img_size=32)
    report = export_aoti(model, tmp_path / 'm.pt2')
    assert report.difference < 1e-5
    run = torch._inductor.aoti_load_package(str(tmp_path / 'm.pt2'))
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(run(x), model(x), atol=1e-5, rtol=1e-5)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    from hydra_vision.train.sources import Digits

    held_out = Digits(train=False)
    x = torch.from_numpy(np.stack([np.asarray(image) for image, _ in held_out])).float() / 255
    return (x[:, None] - 0.305) / 0.376, torch.as_tensor(held_out.targets)


def state_bytes(model: torch.nn.Module) -> int:
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    return stream.tell()


@torch.inference_mode()
def accuracy(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> float:
    x, labels = digits()
    return (model(x.to(dtype)).argmax(1) == labels).double().mean().item()


def test_int8_on_trained_weights():
    pytest.importorskip('torchao')
    model = timm.create_model(f'local-dir:{DIGITS}', pretrained=True).eval()
    before = accuracy(model)
    for kind in ('weight_only', 'dynamic'):
        small = quantized(model, kind)
        changed = [name for name, p in small.named_parameters() if type(p.data) is not torch.Tensor]
        assert {name.split('.')[-2] for name in changed} == {'in_proj', 'out_proj', 'head'}
        assert accuracy(small) >= before - 0.01, kind
        assert state_bytes(small) < state_bytes(model) / 3
        x, _ = digits()
        assert not torch.equal(small(x), model(x))
    assert accuracy(model) == before  # the model itself is untouched
    with pytest.raises(ValueError, match="'dynamic'"):
        quantized(model, 'int4')
    with pytest.raises(ValueError, match='training'):
        quantized(model.train())


def test_bfloat16_on_trained_weights():
    model = timm.create_model(f'local-dir:{DIGITS}', pretrained=True).eval()
    before = accuracy(model)
    model.to(torch.bfloat16)
    assert model(digits()[0][:2].bfloat16()).dtype == torch.bfloat16
    assert accuracy(model, torch.bfloat16) >= before - 0.01


def test_weights_in_a_file_of_their_own_come_along(tmp_path):
    """What the exporter does with models above 1.5 GiB."""
    model, path = torch.nn.Identity().eval(), tmp_path / 'm.onnx'

    def write(file: Path) -> None:
        file.write_text('graph')
        file.with_name(file.name + '.data').write_text('weights')

    report = export._export(model, path, write, lambda file: model, [(1, 3)], 1e-5)
    assert report.size == len('graph') + len('weights')
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {'m.onnx': 'graph', 'm.onnx.data': 'weights'}


@pytest.mark.parametrize('wrong', [5e-5, float('nan')])
def test_what_computes_something_else_is_not_written(tmp_path, wrong):
    model = torch.nn.Identity().eval()
    arguments = (tmp_path / 'm.onnx', lambda file: file.write_text('graph'), lambda file: lambda x: x + wrong, [(1, 3)])
    with pytest.raises(RuntimeError, match=r'differs from PyTorch by .* nothing written'):
        export._export(model, *arguments, 1e-5)
    assert not list(tmp_path.iterdir())
    if not math.isnan(wrong):
        assert 0 < export._export(model, *arguments, 1e-4).difference < 6e-5


def test_bad_input(tmp_path, fails):
    for name in ('there.onnx', 'big.onnx.data'):
        (tmp_path / name).write_text('')
    new = tmp_path / 'new.onnx'
    for error, match, call in [
        (UserError, 'overwrite', lambda: export_onnx(create(), tmp_path / 'there.onnx')),
        (UserError, 'big.onnx.data', lambda: export_onnx(create(), tmp_path / 'big.onnx')),
        (UserError, 'cannot be written', lambda: export_onnx(create(), '/proc/self/m.onnx')),
        (UserError, 'no folder', lambda: export_onnx(create(), tmp_path / 'none' / 'm.onnx')),
        (ValueError, 'dynamic_img_size=True', lambda: export_onnx(create(mixer='dense'), new, dynamic_size=True)),
        (ValueError, "it has 'hilbert'", lambda: export_onnx(create(scan_order='hilbert'), new, dynamic_size=True)),
        (ValueError, 'bfloat16', lambda: export_onnx(create().bfloat16(), new)),
        (ValueError, 'training mode', lambda: export_onnx(create().train(), new)),
        (ValueError, 'built for', lambda: export_onnx(create(pos_embed='learn'), new, img_size=(96, 96))),
        (ValueError, '16 x 16', lambda: export_onnx(create(), new, img_size=(60, 64))),
    ]:
        pytest.importorskip('onnxruntime')
        with pytest.raises(error, match=match):
            call()
    command = ['export', 'onnx', '--model', 'test_hydra_vit', '--random-init', '--output']
    assert '.onnx' in fails(*command, 'm.pt')
    assert '--mean' in fails(*command, new, '--mean', '0,0,0')  # a model has no preprocessing
    assert sorted(p.name for p in tmp_path.iterdir()) == ['big.onnx.data', 'there.onnx']


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(img_size=272),  # more than one chunk
        dict(scan_order='hilbert'),
        dict(class_token=True, class_token_position='middle', pos_embed='learn'),
        dict(learnable_init_states=True, ngroups=2),
        dict(features_only=True, out_indices=[0]),
        *(dict(mixer=name, headdim=None) for name in ('m2', 'vim', 'vandermonde', 'dft', 'low_rank')),
        dict(mixer='semiseparable', mixer_kwargs=dict(variant='mult')),
        dict(mixer='semiseparable', mixer_kwargs=dict(variant='causal', data_dependent=False)),
        dict(mixer='scout', mixer_kwargs=dict(segment=(2, 2))),
        dict(mlp='monarch', mlp_ratio=2.0),
    ],
    ids=str,
)
def test_the_torchscript_exporter_knows_every_operator(tmp_path, kwargs):
    """timm's onnx_export.py uses it where dynamo is not asked for."""
    runtime = pytest.importorskip('onnxruntime')
    kwargs = {'img_size': 64, 'headdim': 16, **kwargs}
    model = timm.create_model('test_hydra_vit', depth=1, num_classes=3, exportable=True, **kwargs).eval()
    path, axes = tmp_path / 'model.onnx', {'x': {0: 'batch'}}
    example = torch.randn(2, 3, kwargs['img_size'], kwargs['img_size'])
    torch.onnx.export(model, (example,), path, dynamo=False, opset_version=17, input_names=['x'], dynamic_axes=axes)
    x = torch.cat([example, -example])[:3]
    (found,) = runtime.InferenceSession(path).run(None, {'x': x.numpy()})
    expected = model(x)[0] if 'features_only' in kwargs else model(x)
    torch.testing.assert_close(torch.from_numpy(found), expected.detach(), rtol=1e-3, atol=1e-5)

"""Models outside of Python: ONNX, and a package compiled by AOTInductor. Nothing is written that was not checked."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError, first_line, require
from ..io import check_output

__all__ = ['ExportReport', 'export_aoti', 'export_onnx']

TOLERANCE = 1e-5
_DATA = '.data'  # what the exporter appends for the weights of models above 1.5 GiB, in a file of their own


@dataclass(frozen=True)
class ExportReport:
    """What an export gave.

    Args:
        path: The file.
        size: Of the file, bytes, with those of a .data file next to it.
        difference: Largest difference to PyTorch over all checked inputs, relative to max(1, largest output).
        checked: Shapes of those inputs.
        milliseconds: Of one image, median of 10, on the CPU.
        torch_milliseconds: Of the same image in eager PyTorch, with as many threads.
        seconds: That the export took.
    """

    path: Path
    size: int
    difference: float
    checked: tuple[tuple[int, ...], ...]
    milliseconds: float
    torch_milliseconds: float
    seconds: float


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    img_size: tuple[int, int] | None = None,
    dynamic_size: bool = False,
    overwrite: bool = False,
    tolerance: float = TOLERANCE,
) -> ExportReport:
    """Write a model as ONNX: input 'images' (batch, C, height, width), output 'logits', any batch size.

    The file is opened with onnxruntime and compared with the model before it gets its name.

    Args:
        model: In float32 on the CPU.
        path: Of the .onnx file. Weights of a model above 1.5 GiB go into `path` + '.data' next to it.
        img_size: Height and width; by default the model's own.
        dynamic_size: Any height and width that the patch divides, of a model that takes them and has another
            `scan_order` than 'hilbert', which is no formula of the grid's size.
        overwrite: Replace an existing file.
        tolerance: Largest difference allowed, relative to max(1, largest output).

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        UserError: The file exists and `overwrite` is False, has another suffix, or cannot be written.
        ValueError: A model that does not fit `dynamic_size`, is not float32 on the CPU, or a wrong size.
        RuntimeError: The model cannot be exported, or onnxruntime computes something else.
    """
    for module in ('onnx', 'onnxscript', 'onnxruntime'):
        require(module, 'onnx')
    import onnxruntime

    path, example, shapes = _prepare(model, path, '.onnx', img_size, dynamic_size, overwrite)

    def write(file: Path) -> None:
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=(_dynamic(dynamic_size),),
            input_names=['images'],
            output_names=['logits'],
            verbose=False,
            optimize=False,
        )
        _fold(program.model)
        _name_axes(program.model.graph.inputs[0], dynamic_size)
        program.save(str(file))

    def load(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
        return lambda x: torch.from_numpy(session.run(None, {'images': x.numpy()})[0])

    return _export(model, path, write, load, shapes, tolerance)


def export_aoti(
    model: nn.Module,
    path: str | Path,
    *,
    img_size: tuple[int, int] | None = None,
    dynamic_size: bool = False,
    overwrite: bool = False,
    tolerance: float = TOLERANCE,
) -> ExportReport:
    """Compile a model ahead of time: `torch.export`, then an AOTInductor package (.pt2) for this kind of CPU.

    `torch._inductor.aoti_load_package(path)` opens it in Python, `AOTIModelPackageLoader` in C++. Needs a C++ compiler.

    Args and errors as `export_onnx`; RuntimeError also without a compiler.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    path, example, shapes = _prepare(model, path, '.pt2', img_size, dynamic_size, overwrite)
    try:
        get_cpp_compiler()
    except Exception as error:  # its own class, which moves between versions
        raise RuntimeError(f'AOTInductor needs a C++ compiler: {error}') from error

    def write(file: Path) -> None:
        with torch.no_grad():
            program = torch.export.export(model, (example,), dynamic_shapes=(_dynamic(dynamic_size),))
            torch._inductor.aoti_compile_and_package(program, package_path=str(file))

    return _export(model, path, write, lambda file: torch._inductor.aoti_load_package(str(file)), shapes, tolerance)


def _prepare(
    model: nn.Module,
    path: str | Path,
    suffix: str,
    img_size: tuple[int, int] | None,
    dynamic_size: bool,
    overwrite: bool,
) -> tuple[Path, torch.Tensor, list[tuple[int, ...]]]:
    """Checks everything; returns the path, an example and the shapes to compare at."""
    path = check_output(path, (suffix,), overwrite=overwrite, name='path')
    weights = path.with_name(path.name + _DATA)
    if weights.exists() and not overwrite:
        raise UserError(f'path={str(path)!r}: {weights} exists already; --overwrite (overwrite=True) replaces it')
    first = next(model.parameters())
    if first.dtype != torch.float32 or first.device.type != 'cpu':
        raise ValueError(f'the model is {first.dtype} on {first.device}; export wants torch.float32 on the CPU')
    if model.training:
        raise ValueError('the model is in training mode; call model.eval()')
    embed = getattr(model, 'patch_embed', None)
    own = getattr(embed, 'img_size', None) or model.pretrained_cfg['input_size'][1:]
    H, W = img_size or own
    patch = tuple(getattr(embed, 'patch_size', (1, 1)))
    if H % patch[0] or W % patch[1]:
        raise ValueError(f'img_size={(H, W)}; the patches of the model are {patch[0]} x {patch[1]}')
    any_size = not getattr(embed, 'strict_img_size', False)
    if not any_size and tuple(own) != (H, W):
        raise ValueError(f'img_size={(H, W)}; the model is built for {tuple(own)}')
    if dynamic_size:
        if not any_size:
            raise ValueError('dynamic_size=True needs a model with dynamic_img_size=True; it has False')
        if getattr(model, 'scan_order', 'row') == 'hilbert':
            raise ValueError(
                "dynamic_size=True needs a model with scan_order='row', 'column', 'alternate' or 'snake'; "
                "it has 'hilbert'"
            )
    channels = getattr(model, 'in_chans', 3)
    shapes = [(1, channels, H, W), (3, channels, H, W)]
    if dynamic_size:
        shapes += [(2, channels, H + patch[0], W), (1, channels, 2 * H, 3 * W), (2, channels, *patch)]
        # neither one chunk nor one patch: a size that is 1 would be taken for a constant
        H, W = max(H, 4 * patch[0]), max(W, 5 * patch[1])
    return path, torch.randn(2, channels, H, W), shapes


def _dynamic(dynamic_size: bool) -> dict[int, Any]:
    dynamic = torch.export.Dim.DYNAMIC
    return {0: dynamic, 2: dynamic, 3: dynamic} if dynamic_size else {0: dynamic}


def _fold(model: Any) -> None:
    """What the exporter's own optimizer does, without its rewriting of patterns.

    That takes time quadratic in the number of nodes, most of the export of a deep model, and onnxruntime has its own.
    """
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants

    passes.InlinePass()(model)
    fold_constants(model, output_size_limit=1024)  # masks stay operations, which all blocks share
    for step in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.ClearMetadataAndDocStringPass(),  # paths of this machine, and more bytes than the nodes themselves
        passes.NameFixPass(),
    ):
        step(model)


def _name_axes(value: Any, dynamic_size: bool) -> None:
    """Names for people: what the exporter makes up is s77, s27, s53."""
    import onnx_ir as ir

    axes = list(value.shape)
    names = {0: 'batch', 2: 'height', 3: 'width'} if dynamic_size else {0: 'batch'}
    value.shape = ir.Shape([names.get(i, axis) for i, axis in enumerate(axes)])


@torch.no_grad()
def _export(
    model: nn.Module,
    path: Path,
    write: Callable[[Path], None],
    load: Callable[[Path], Callable[[torch.Tensor], torch.Tensor]],
    shapes: list[tuple[int, ...]],
    tolerance: float,
) -> ExportReport:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.exporting_') as folder:
        file = Path(folder) / path.name
        start = time.perf_counter()
        try:
            write(file)
        except Exception as error:  # of the exporter's many own classes
            raise RuntimeError(f'{path.name} could not be exported: {first_line(error)}') from error
        seconds = time.perf_counter() - start
        run = load(file)
        worst = 0.0
        generator = torch.Generator().manual_seed(0)
        for shape in shapes:
            x = torch.randn(shape, generator=generator)
            expected, got = model(x), run(x)
            difference = float((got - expected).abs().max() / expected.abs().max().clamp(min=1.0))
            if not difference <= tolerance:  # nan too
                raise RuntimeError(f'{path.name} differs from PyTorch by {difference:.2e} at {shape}; nothing written')
            worst = max(worst, difference)
        x = torch.randn(shapes[0], generator=generator)
        milliseconds, torch_milliseconds = _median_ms(lambda: run(x)), _median_ms(lambda: model(x))
        parts = sorted(Path(folder).iterdir(), key=lambda part: part == file)  # the file that names the others is last
        size = sum(part.stat().st_size for part in parts)
        for part in parts:
            part.replace(path.with_name(part.name))
    return ExportReport(path, size, worst, tuple(shapes), milliseconds, torch_milliseconds, seconds)


def _median_ms(call: Callable[[], Any], calls: int = 10) -> float:
    call()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)

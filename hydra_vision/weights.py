"""Files of weights: read without running code of the file, with one line of explanation where that does not work."""

import argparse
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import CheckpointError, UserError, first_line

__all__ = ['brief_mismatch', 'explain', 'read_file', 'read_weights', 'state_dict_of', 'write_tensors']

_EXPECTED = 'expected weights: a .safetensors file, or a state dict that torch.save wrote'
_WRAPPERS = ('module.', 'model.', 'timm_model.')  # DDP, Lightning, transformers and other classes around a model
_KINDS = (
    (b'version https://git-lfs', 'a Git LFS pointer instead of the file: run `git lfs pull`'),
    (b'\x89PNG', 'an image'),
    (b'\xff\xd8\xff', 'an image'),
    (b'GIF8', 'an image'),
    (b'\x1f\x8b', 'a gzip archive'),
    (b'\x93NUMPY', 'a NumPy array'),
    (b'\x89HDF', 'an HDF5 file'),
)


def read_file(path: Path) -> Any:
    """What a .safetensors file, or a file of `torch.save`, holds; tensors on the CPU.

    Raises:
        UserError: No such file.
        CheckpointError: Empty, cut off, damaged, another kind of file, or with objects whose reading runs code.
    """
    if not path.is_file():
        raise UserError(f'checkpoint={str(path)!r} is not a file')
    try:
        if path.suffix == '.safetensors':
            return load_file(path)
        # timm's train.py keeps its arguments next to the weights
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter('ignore')  # about pickle protocols of files that are none
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # what unpicklers raise for arbitrary bytes is not a closed list
        raise CheckpointError(f'{path} {explain(path, error)}; {_EXPECTED}') from error


def explain(path: Path, error: Exception) -> str:
    """What is the matter with a file that cannot be read: 'is empty (0 bytes)', 'is a text file', ..."""
    if isinstance(error, OSError) and error.errno not in (None, 22):  # 22: a seek before the start of a cut-off file
        return f'cannot be read: {error.strerror}'
    with open(path, 'rb') as file:
        start = file.read(512)
    if not start:
        return 'is empty (0 bytes)'
    for signature, kind in _KINDS:
        if start.startswith(signature):
            return f'is {kind}'
    if start.lstrip()[:5].lower() in (b'<!doc', b'<html'):
        return 'is an HTML page (a failed download?)'
    found = re.search(r'Unsupported (?:global|class|operand).*?([\w.]+\.[\w.]+)|GLOBAL ([\w.]+)', str(error))
    if found and 'Weights only' in str(error):
        name = next(group for group in found.groups() if group)
        return f'holds a Python object ({name}), and reading it would run code of the file: save its state_dict() alone'
    if _is_text(start):
        return 'is a text file'
    if start.startswith(b'PK') or isinstance(error, (SafetensorError, EOFError)):
        return 'is cut off or damaged'
    return 'is damaged, or another kind of file'


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode()
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in '\r\n\t' for character in text)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, under the names of the bare model.

    Raises:
        UserError, CheckpointError: As `read_file` and `state_dict_of`.
    """
    return state_dict_of(read_file(path), path)


def state_dict_of(held: Any, path: Path) -> dict[str, torch.Tensor]:
    """The weights in what a file holds: averaged ones before raw ones, as timm does, without the prefixes of wrappers.

    Args:
        held: The content of the file.
        path: Of the file, for errors.

    Raises:
        CheckpointError: No dictionary of tensors.
    """
    if not isinstance(held, Mapping):
        raise CheckpointError(f'{path} holds a {type(held).__name__}; {_EXPECTED}')
    for key in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):
        if isinstance(held.get(key), Mapping):
            held = held[key]
            break
    weights = {str(key).replace('_orig_mod.', ''): value for key, value in held.items() if torch.is_tensor(value)}
    if not weights:
        raise CheckpointError(f'{path} holds no tensors; {_EXPECTED}')
    while wrapper := next((text for text in _WRAPPERS if all(key.startswith(text) for key in weights)), None):
        weights = {key.removeprefix(wrapper): value for key, value in weights.items()}
    return weights


def brief_mismatch(error: Exception) -> str:
    """What `load_state_dict` says of a mismatch, in one short line instead of a list of all keys."""
    text, parts = str(error), []
    for kind in ('Missing', 'Unexpected'):
        found = re.search(rf'{kind} key\(s\) in state_dict: (.*)', text)
        keys = re.findall(r'"([^"]+)"', found[1]) if found else []
        parts += [f'{len(keys)} {kind.lower()} (such as {", ".join(keys[:2])})'] if keys else []
    shapes = re.findall(r'size mismatch for (\S+): .*?torch.Size\((.*?)\).*?torch.Size\((.*?)\)', text)
    if shapes:
        name, theirs, ours = shapes[0]
        parts.append(f'{len(shapes)} of another shape (such as {name}: {theirs} in the file, {ours} in the model)')
    return 'tensors: ' + ', '.join(parts) if parts else first_line(error)


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a .safetensors file with the permissions of any new file: safetensors alone makes it private (0600)."""
    path.touch()
    mode = path.stat().st_mode
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={'format': 'pt'})
    path.chmod(mode)

"""Folders that timm and transformers open, and the Hugging Face Hub.

`save_pretrained` writes what `timm.models.save_for_hf` writes, and does what that leaves to its caller: before anything
is written, the config is tried (it must rebuild the same state dict); nothing is overwritten unasked, and a full disk
costs nothing that was there.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_model_args
from timm.models._hub import save_config_for_hf
from timm.utils import unwrap_model
from torch import nn

from .io import to_path, why_unwritable
from .version import __version__
from .weights import write_tensors

__all__ = ['CONFIG', 'WEIGHTS', 'constructor_args', 'push_to_hub', 'save_pretrained']

CONFIG, WEIGHTS, CODE, CARD = 'config.json', 'model.safetensors', 'hydra_vision_auto.py', 'README.md'

_DATA_KEYS = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')

_CODE = '''"""Lets transformers open this folder with trust_remote_code=True; needs `pip install hydra-vision`."""

import hydra_vision  # noqa: F401  registers the architecture with timm
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel


class HydraVisionConfig(TimmWrapperConfig):
    pass


class HydraVisionModel(TimmWrapperModel):
    config_class = HydraVisionConfig


class HydraVisionForImageClassification(TimmWrapperForImageClassification):
    config_class = HydraVisionConfig
'''


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    model_args: Mapping[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    auto_map: bool = False,
    overwrite: bool = False,
) -> Path:
    """Save a timm model as `config.json` + `model.safetensors`.

    After `import hydra_vision`, `timm.create_model('local-dir:FOLDER', pretrained=True)` opens the folder, and so do
    transformers' `AutoModelForImageClassification`, `AutoModel`, `AutoImageProcessor` and `pipeline`.

    Args:
        model: A model from `timm.create_model`, bare or inside DDP, `torch.compile` or `ModelEmaV3`.
        folder: Where to write; made where it is missing.
        model_args: Constructor arguments beyond those that timm recorded, or in place of those that JSON cannot hold.
        label_names: One name per class.
        data_config: Preprocessing that the weights expect, keys among `input_size`, `interpolation`, `mean`, `std`,
            `crop_pct`, `crop_mode`; the rest is that of the model's configuration.
        auto_map: Also write `hydra_vision_auto.py`, with which transformers opens the folder without
            `import hydra_vision`, given `trust_remote_code=True`.
        overwrite: Replace such files where they exist.

    Returns:
        The folder.

    Raises:
        TypeError: Not a module.
        ValueError: A model that did not come from `timm.create_model`, is a feature extractor, or that the config
            would not rebuild; names or preprocessing that do not fit it.
        FileExistsError: The folder holds a model already and `overwrite` is False.
        NotADirectoryError: `folder` is a file.
        OSError: `folder` cannot be made or written to.
    """
    model = _bare_model(model)
    config = _config(model, model_args, label_names, data_config)
    folder = to_path(folder, 'folder')
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f'folder={str(folder)!r} is a file')
    files = [CONFIG, WEIGHTS] + ([CODE] if auto_map else [])
    present = [name for name in files if (folder / name).exists()]
    if present and not overwrite:
        raise FileExistsError(f'{folder} holds {", ".join(present)} already; pass overwrite=True to replace')
    if auto_map:
        module = CODE.removesuffix('.py')
        config['auto_map'] = {
            'AutoConfig': f'{module}.HydraVisionConfig',
            'AutoModel': f'{module}.HydraVisionModel',
            'AutoModelForImageClassification': f'{module}.HydraVisionForImageClassification',
        }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f'folder={str(folder)!r} cannot be made: {error.strerror}') from error
    if why := why_unwritable(folder):
        raise PermissionError(f'folder={str(folder)!r} cannot be written: {why}')
    # Written next to the old files and then moved over them: a full disk costs nothing that was there.
    with tempfile.TemporaryDirectory(dir=folder, prefix='.saving_') as temporary:
        write_tensors(model.state_dict(), Path(temporary) / WEIGHTS)
        (Path(temporary) / CONFIG).write_text(json.dumps(config, indent=2) + '\n')
        if auto_map:
            (Path(temporary) / CODE).write_text(_CODE)
        for name in files:
            (Path(temporary) / name).replace(folder / name)
    return folder


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = False,
    commit_message: str = 'Add model',
    card: str | None = None,
    **kwargs: Any,
) -> str:
    """Save a model as `save_pretrained` does and upload it to the Hugging Face Hub.

    Args:
        model: As there.
        repo_id: 'owner/name'; made where it is missing.
        token: By default the one that `hf auth login` or `HF_TOKEN` left.
        private: Of a new repository.
        commit_message: Of the upload.
        card: Text of the model card, Markdown. By default a stub, and only where the repository has no card.
        **kwargs: `model_args`, `label_names`, `data_config`, `auto_map` of `save_pretrained`.

    Returns:
        The repository's id.

    Raises:
        PermissionError: No token is present.
        ValueError, TypeError: As `save_pretrained`; nothing has been uploaded then.
    """
    import huggingface_hub

    if not (token or huggingface_hub.get_token()):
        raise PermissionError('no token for the Hugging Face Hub; run `hf auth login`, set HF_TOKEN or pass token=')
    if repo_id.count('/') != 1 or not all(repo_id.split('/')):
        raise ValueError(f"repo_id={repo_id!r}; it must be 'owner/name'")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, **kwargs)
        api = huggingface_hub.HfApi(token=token, library_name='hydra_vision', library_version=__version__)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if card is not None or not api.file_exists(repo_id=repo_id, filename=CARD):
            architecture = _bare_model(model).pretrained_cfg['architecture']
            (Path(folder) / CARD).write_text(card if card is not None else _stub_card(repo_id, architecture))
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return repo_id


def _stub_card(repo_id: str, architecture: str) -> str:
    return (
        '---\nlibrary_name: timm\npipeline_tag: image-classification\ntags:\n- timm\n- hydra-vision\n---\n'
        f'# {repo_id.split("/")[1]}\n\n`{architecture}` of hydra_vision.\n\n'
        f"```python\nimport hydra_vision, timm\n\nmodel = timm.create_model('hf-hub:{repo_id}', pretrained=True)\n```\n"
    )


def _bare_model(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be a torch.nn.Module, got {type(model).__name__}')
    model = unwrap_model(model)
    model = getattr(model, '_orig_mod', model)
    cfg = getattr(model, 'pretrained_cfg', None)
    if not isinstance(cfg, Mapping) or not timm.is_model(cfg.get('architecture') or ''):
        raise ValueError(
            f'model is a {type(model).__name__} without the name of an architecture; build it by timm.create_model'
        )
    if not hasattr(model, 'get_classifier'):
        raise ValueError(
            f'model is a {type(model).__name__}, a feature extractor; save the model without features_only'
        )
    return model


def _config(
    model: nn.Module,
    model_args: Mapping[str, Any] | None,
    label_names: Sequence[str] | None,
    data_config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """timm's config.json of a model; tried before it is returned."""
    unknown = sorted((data_config or {}).keys() - set(_DATA_KEYS))
    if unknown:
        raise ValueError(f'data_config has the key {unknown[0]!r}; allowed: {", ".join(_DATA_KEYS)}')
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f'label_names has {len(label_names)} names; the model has {model.num_classes} classes')
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / CONFIG
        names = {} if label_names is None else {'label_names': list(label_names)}
        save_config_for_hf(model, path, names, dict(model_args or {}), dict(data_config or {}))
        config = json.loads(path.read_text())
    # transformers passes num_classes itself: named in model_args as well it would be a TypeError there
    config['model_args'].pop('num_classes', None)
    _check_rebuilds(model, config)
    return config


def constructor_args(model: nn.Module) -> dict[str, Any]:
    """The constructor arguments that timm recorded, with later changes of size, pooling and channels."""
    return {key: value for key, value in get_model_args(model).items() if key != 'num_classes'}


def _check_rebuilds(model: nn.Module, config: Mapping[str, Any]) -> None:
    name, args = config['architecture'], config['model_args']
    for device in ('meta', 'cpu'):  # some families compute with values while they are built
        try:
            with torch.device(device):
                rebuilt = timm.create_model(name, num_classes=config['num_classes'], **args)
            break
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            if device == 'cpu' or not isinstance(error, RuntimeError):
                raise ValueError(f'model_args={args} do not build {name!r}: {error}') from error
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    again = {key: tuple(t.shape) for key, t in rebuilt.state_dict().items()}
    if shapes != again:
        key = next(key for key in {**shapes, **again} if shapes.get(key) != again.get(key))
        raise ValueError(
            f'{name!r} with the recorded arguments {args} is another model: {key} is {again.get(key)} there, '
            f'{shapes.get(key)} here; pass what is missing as model_args='
        )

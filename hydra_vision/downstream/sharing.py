"""Folders that timm and transformers open, and the Hub.

`save_pretrained` writes `config.json` and `model.safetensors`. Both libraries rebuild the model from what the config
calls `model_args`, so every constructor argument that changes the model has to be there. timm >= 1.0.31 records them;
our models record them under timm 1.0.29 as well. Before anything is written, the config is tried: it must rebuild the
same state dict.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import timm
import torch
from safetensors.torch import save_file
from timm.layers import to_2tuple
from timm.utils import unwrap_model
from torch import nn

from ..io import why_unwritable
from ..version import __version__

__all__ = ['CONFIG', 'WEIGHTS', 'constructor_args', 'push_to_hub', 'save_pretrained', 'write_tensors']

CONFIG, WEIGHTS, CODE, CARD = 'config.json', 'model.safetensors', 'hydra_vision_auto.py', 'README.md'

# Where tensors live, and rates that only training needs: not part of what was saved.
_RUNTIME = ('device', 'dtype', 'num_classes', 'pretrained_model_args', 'features_only', 'out_indices', 'feature_cls')
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
    folder: Union[str, Path],
    *,
    model_args: Optional[Mapping[str, Any]] = None,
    label_names: Optional[Sequence[str]] = None,
    data_config: Optional[Mapping[str, Any]] = None,
    auto_map: bool = False,
    overwrite: bool = False,
) -> Path:
    """Save a timm model as `config.json` + `model.safetensors`.

    After `import hydra_vision`, `timm.create_model('local-dir:FOLDER', pretrained=True)` opens the folder, and so do
    transformers' `AutoModelForImageClassification`, `AutoModel`, `AutoImageProcessor` and `pipeline`.

    Args:
        model: a model from `timm.create_model`, bare or inside DDP, `torch.compile` or `ModelEmaV3`.
        folder: where to write; made where it is missing.
        model_args: constructor arguments beyond the recorded ones. Needed for models of other families under
            timm < 1.0.31, which keeps no record.
        label_names: one name a class.
        data_config: preprocessing that the weights expect, keys among `input_size`, `interpolation`, `mean`, `std`,
            `crop_pct`, `crop_mode`; the rest is that of the model's configuration.
        auto_map: also write `hydra_vision_auto.py`, with which transformers opens the folder without
            `import hydra_vision`, given `trust_remote_code=True`.
        overwrite: replace such files where they exist.

    Returns:
        The folder.

    Raises:
        TypeError: not a module.
        ValueError: a model that did not come from `timm.create_model`, is a feature extractor, or that the config
            would not rebuild; names or preprocessing that do not fit it.
        FileExistsError: the folder holds a model already and `overwrite` is False.
        NotADirectoryError: `folder` is a file.
        OSError: `folder` cannot be made or written to.
    """
    model = _bare_model(model)
    config = _config(model, model_args, label_names, data_config)
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f'folder = {str(folder)!r} is a file')
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
        raise OSError(error.errno, f'folder = {str(folder)!r} cannot be made: {error.strerror}') from error
    if why := why_unwritable(folder):
        raise PermissionError(f'folder = {str(folder)!r} cannot be written: {why}')
    # Written beside the old files and then moved over them: a full disk costs nothing that was there.
    with tempfile.TemporaryDirectory(dir=folder, prefix='.saving_') as temporary:
        write_tensors(model.state_dict(), Path(temporary) / WEIGHTS)
        (Path(temporary) / CONFIG).write_text(json.dumps(config, indent=2) + '\n')
        if auto_map:
            (Path(temporary) / CODE).write_text(_CODE)
        for name in files:
            (Path(temporary) / name).replace(folder / name)
    return folder


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a .safetensors file with the permissions of any new file: safetensors alone makes it private (0600)."""
    path.touch()
    mode = path.stat().st_mode
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={'format': 'pt'})
    path.chmod(mode)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    token: Optional[str] = None,
    private: bool = False,
    commit_message: str = 'Add model',
    card: Optional[str] = None,
    **kwargs: Any,
) -> str:
    """Save a model as `save_pretrained` does and upload it to the Hugging Face Hub.

    Args:
        model: as there.
        repo_id: 'owner/name'; made where it is missing.
        token: by default the one that `hf auth login` or `HF_TOKEN` left.
        private: of a new repository.
        commit_message: of the upload.
        card: text of the model card, Markdown. By default a stub, and only where the repository has no card.
        **kwargs: `model_args`, `label_names`, `data_config`, `auto_map` of `save_pretrained`.

    Returns:
        The repository's id.

    Raises:
        PermissionError: no token is present.
        ValueError, TypeError: as `save_pretrained`; nothing has been uploaded then.
    """
    import huggingface_hub

    if not (token or huggingface_hub.get_token()):
        raise PermissionError('no token for the Hugging Face Hub; run `hf auth login`, set HF_TOKEN or pass token=')
    if repo_id.count('/') != 1 or not all(repo_id.split('/')):
        raise ValueError(f"repo_id = {repo_id!r}; it must be 'owner/name'")
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
    model_args: Optional[Mapping[str, Any]],
    label_names: Optional[Sequence[str]],
    data_config: Optional[Mapping[str, Any]],
) -> dict[str, Any]:
    """timm's config.json with this model's constructor arguments and preprocessing; tried before it is returned."""
    args = constructor_args(model, model_args)
    cfg = dict(model.pretrained_cfg)
    size = args.get('img_size')
    cfg['input_size'] = (args.get('in_chans', 3), *(to_2tuple(size) if size else cfg['input_size'][1:]))
    for key in ('mean', 'std'):  # of three channels, where the model has another number
        if len(cfg[key]) != cfg['input_size'][0]:
            cfg[key] = (sum(cfg[key]) / len(cfg[key]),) * cfg['input_size'][0]
    for key, value in (data_config or {}).items():
        if key not in _DATA_KEYS:
            raise ValueError(f'data_config has the key {key!r}; allowed: {", ".join(_DATA_KEYS)}')
        channels = cfg['input_size'][0]
        count = {'mean': len, 'std': len, 'input_size': lambda size: size[0]}.get(key)
        if count is not None and count(value) != channels:
            raise ValueError(f'data_config has {key} = {tuple(value)}; the model takes {channels} channels')
        cfg[key] = value
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f'label_names has {len(label_names)} names; the model has {model.num_classes} classes')

    # What timm itself would write, but for the source of the weights.
    skip = ('architecture', 'url', 'file', 'hf_hub_id', 'hf_hub_filename', 'state_dict', 'source', 'tag', 'custom_load')
    cfg = {key: value for key, value in cfg.items() if key not in skip and value is not None}
    cfg['num_classes'] = model.num_classes
    config: dict[str, Any] = {
        'architecture': model.pretrained_cfg['architecture'],
        'num_classes': model.num_classes,
        'num_features': model.num_features,
        # transformers passes num_classes itself: named in model_args as well it would be a TypeError there
        'model_args': args,
        'pretrained_cfg': cfg,
    }
    if isinstance(args.get('global_pool'), str):
        config['global_pool'] = args['global_pool']
    if label_names is not None:
        config['label_names'] = list(label_names)
    try:
        config = json.loads(json.dumps(config))
    except (TypeError, ValueError) as error:
        raise ValueError(f'an argument of the model cannot be written as JSON ({error}); pass model_args=') from error
    _check_rebuilds(model, config)
    return config


def constructor_args(model: nn.Module, extra: Optional[Mapping[str, Any]] = None) -> dict[str, Any]:
    """Recorded constructor arguments, brought up to date with later changes of size, pooling and channels."""
    args = {key: value for key, value in getattr(model, '_model_args', {}).items() if key not in _RUNTIME}
    args = {key: value for key, value in args.items() if not (key == 'drop_rate' or key.endswith('_drop_rate'))}
    args.pop('drop_path_rate', None)
    if getattr(model, 'in_chans', None):
        args['in_chans'] = model.in_chans
    if isinstance(getattr(model, 'global_pool', None), str):
        args['global_pool'] = model.global_pool
    embed = getattr(model, 'patch_embed', None)
    if getattr(embed, 'img_size', None) is not None:
        args['img_size'] = tuple(embed.img_size)
        args['patch_size'] = tuple(embed.patch_size)
    args.update(extra or {})
    args.pop('num_classes', None)
    return args


def _check_rebuilds(model: nn.Module, config: Mapping[str, Any]) -> None:
    name, args = config['architecture'], config['model_args']
    for device in ('meta', 'cpu'):  # some families compute with values while they are built
        try:
            with torch.device(device):
                rebuilt = timm.create_model(name, num_classes=config['num_classes'], **args)
            break
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            if device == 'cpu' or not isinstance(error, RuntimeError):
                raise ValueError(f'model_args = {args} do not build {name!r}: {error}') from error
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    again = {key: tuple(t.shape) for key, t in rebuilt.state_dict().items()}
    if shapes != again:
        key = next(key for key in {**shapes, **again} if shapes.get(key) != again.get(key))
        raise ValueError(
            f'{name!r} with the recorded arguments {args} is another model: {key} is {again.get(key)} there, '
            f'{shapes.get(key)} here; pass what is missing as model_args='
        )

"""What `hydra-vision bench` runs: the cases that its arguments ask for."""

import argparse
import math
from collections.abc import Sequence
from typing import Optional

import torch

from ..console import check_model_name
from ..errors import UserError, nearest
from ..ops.dispatch import BACKENDS
from .arguments import DEFAULTS
from ..flops import count_model, family_models
from .goals import goal_cases
from .models import MODES, Case
from .operators import ATTENTION, OperatorCase, Shape
from .peers import unusable

__all__ = ['PEERS', 'batch_sizes', 'peer_of', 'plan_goals', 'plan_models', 'plan_operators']

# timm's ViT of the same width and patch.
PEERS = {
    'test_hydra_vit': 'test_vit',
    'hydra_vit_nano': 'deit_tiny_patch16_224',
    'hydra_vit_tiny': 'deit_tiny_patch16_224',
    'hydra_vit_small': 'deit_small_patch16_224',
    'hydra_vit_base': 'vit_base_patch16_224',
    'hydra_vit_large': 'vit_large_patch16_224',
}


def plan_goals(arguments: argparse.Namespace, device: torch.device) -> list[Case]:
    """The rows that the project's goals compare; --mode and --img-sizes take a part of them.

    Raises:
        UserError: no goal is about such a part.
    """
    cases = goal_cases(device)
    sizes = sorted({case.img_size for case in cases})
    for size in arguments.img_sizes or ():
        if size not in sizes:
            raise UserError(f'--img-sizes: no goal is about {size} px; allowed with --goals: {sizes}')
    cases = [case for case in cases if case.img_size in (arguments.img_sizes or sizes)]
    cases = [case for case in cases if case.mode in (arguments.mode or MODES)]
    if not cases:
        raise UserError(f'--mode: no goal for {device.type} is about {",".join(arguments.mode)}')
    return cases


def plan_models(
    arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype, modes: list[str]
) -> list[Case]:
    """Every model and peer at every size, mode and way to run.

    Raises:
        UserError: a model that is unknown or cannot run at a size, or a backend that cannot run here.
    """
    defaults = DEFAULTS[device.type]
    names = list(dict.fromkeys(arguments.models or defaults['models']))
    for name in names:
        check_model_name(name)
    family = family_models()
    if arguments.peers is not False:
        peers = [PEERS[name] for name in names if name in PEERS]
        names = list(dict.fromkeys([*names, *peers]))
    img_sizes = arguments.img_sizes or defaults['img_sizes']
    batches = batch_sizes(arguments.batch_sizes, img_sizes, device)
    compiled = {'no': [False], 'only': [True], 'both': [False, True]}[arguments.compile or defaults['compile']]

    usable = unusable(device)
    if arguments.backend:
        for name in arguments.backend:
            if name in usable and name not in BACKENDS:
                raise UserError(f'--backend: no model computes with {name}, which needs --operator')
        _check_backends(arguments.backend, {name: usable[name] for name in BACKENDS})
        if not any(name in family for name in names):
            raise UserError(f'--backend chooses how a Hydra model computes; none is in {",".join(names)}')
        backends = arguments.backend
    else:  # beside the default: the released algorithm, where its kernels are there
        backends = ['auto'] + (['mamba_ssm'] if usable['mamba_ssm'] is None else [])

    for name in names:
        for img_size in img_sizes:
            try:
                count_model(name, img_size)
            except (AssertionError, ValueError, RuntimeError) as error:
                raise UserError(f'{name} cannot run at {img_size} px: {str(error).splitlines()[0]}') from error
    return [
        Case(name, img_size, batch, mode, is_compiled, dtype, backend)
        for mode in modes
        for img_size, batch in zip(img_sizes, batches)
        for is_compiled in compiled
        for name in names
        for backend in (backends if name in family else [None])
    ]


def plan_operators(
    arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype, modes: list[str]
) -> list[OperatorCase]:
    """Every backend and peer at every shape and mode.

    Raises:
        UserError: a backend or peer that is unknown or cannot run here.
    """
    defaults = DEFAULTS[device.type]
    usable = unusable(device)
    if arguments.backend:
        _check_backends(arguments.backend, usable)
    names = arguments.backend or [name for name, reason in usable.items() if reason is None]
    heads = arguments.heads or defaults['heads']
    shapes = [
        Shape(batch, length, heads, arguments.headdim or 64, arguments.d_state or 64)
        for batch, length in arguments.shapes or defaults['shapes']
    ]
    return [
        OperatorCase(name, shape, mode, dtype) for shape in shapes for mode in modes for name in [*names, ATTENTION]
    ]


def _check_backends(names: list[str], usable: dict[str, Optional[str]]) -> None:
    for name in names:
        if name == 'auto':
            continue
        if name not in usable:
            raise UserError(f'--backend: unknown backend {name!r}{nearest(name, usable)}')
        if usable[name] is not None:
            raise UserError(f'--backend: {name} cannot run here: {usable[name]}')


def batch_sizes(given: Optional[list[int]], img_sizes: list[int], device: torch.device) -> list[int]:
    """One for each image size; where none are given, about the same number of tokens at every size.

    Raises:
        UserError: neither one value nor one for each size.
    """
    if given is None:
        if device.type == 'cpu':
            return [8 if img_size <= 224 else 1 for img_size in img_sizes]
        # 256 at 224 px, fewer for more tokens, to the nearest power of two: 64 at 512 px, 16 at 1024 px
        return [2 ** max(0, round(math.log2(256 * (224 / img_size) ** 2))) for img_size in img_sizes]
    if len(given) == 1:
        return given * len(img_sizes)
    if len(given) != len(img_sizes):
        raise UserError(
            f'--batch-sizes has {len(given)} values for {len(img_sizes)} image sizes '
            f'({",".join(map(str, img_sizes))}); give one, or one for each'
        )
    return given


def peer_of(names: Sequence[str]) -> dict[str, str]:
    """Each Hydra model's peer in this run: its own, else the first model that is not ours."""
    family = family_models()
    others = [name for name in names if name not in family]
    peers = {}
    for name in names:
        if name in family and others:
            peers[name] = PEERS[name] if PEERS.get(name) in others else others[0]
    return peers

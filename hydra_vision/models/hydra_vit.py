"""Hydra-ViT

Plain, isotropic vision backbones over row-major patch sequences in which attention is replaced by Hydra, the
quasiseparable matrix mixer: linear in the number of tokens, bidirectional, one scan order.

Paper:
* `Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers` - https://arxiv.org/abs/2407.09941
    (NeurIPS 2024; appendix D.2 for the vision model)

The paper's Hydra-ViT-B is `hydra_vit_base`: patch embedding, 24 blocks of `x + drop_path(mixer(norm(x)))`, norm, mean
pool, head. No position embedding, no class token, no MLP. Its vision code was never released. The mixer, as released
(goombalab/hydra), gives 93.2 M parameters with 24 blocks; the paper's 91 M cannot be rebuilt from its defaults:
23 blocks give 89.4 M, sharing B and C over both directions (`share_bc=True`) or `d_state=32` gives 90.8 M.

No weights of ImageNet size are published yet; every variant is tagged `untrained`.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    LayerNorm,
    LayerType,
    Mlp,
    PatchDropout,
    calculate_drop_path_rates,
    get_act_layer,
    get_device_dtype,
    get_norm_layer,
    resample_abs_pos_embed,
    resample_patch_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args, update_model_input_size
from timm.models._manipulate import checkpoint
from timm.models.naflexvit import global_pool_naflex
from timm.models.vision_transformer import global_pool_nlc

from ..mixers import BlockDiagonalLinear, MonarchLinear, StructuredMlp
from ..mixers.base import check_packing, check_padding, is_unwatched
from ._block import BlockNorm, HydraBlock, final_norm
from ._mixer import mixer_factories, resample_mixer_parameter
from ._padded import (
    grid_coordinates,
    naflex_inputs,
    packed_row,
    reorder_tokens,
    sampled_pos_embed,
    scan_positions,
    tokens_of_sequences,
    unpacked,
)
from ._patch_embed import PatchEmbed
from .scan_order import SCAN_ORDERS, block_order, reorder

__all__ = ['HydraViT']

torch.fx.wrap('reorder')  # one node: its index depends on sizes that a tracer does not know

_POOLS = ('', 'avg', 'avgmax', 'max', 'token')
_TOKEN_POSITIONS = ('first', 'middle', 'last')


class HydraViT(nn.Module):
    """Hydra-ViT

    A PyTorch impl of the vision model of : `Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers`
        - https://arxiv.org/abs/2407.09941
    """

    def __init__(
        self,
        img_size: Union[int, Tuple[int, int]] = 224,
        patch_size: Union[int, Tuple[int, int]] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal['', 'avg', 'avgmax', 'max', 'token'] = 'avg',
        embed_dim: int = 768,
        depth: int = 24,
        mlp_ratio: float = 0.0,
        d_state: Optional[int] = None,
        d_conv: Optional[int] = None,
        expand: Optional[float] = None,
        headdim: Optional[int] = None,
        ngroups: Optional[int] = None,
        share_bc: Optional[bool] = None,
        learnable_init_states: Optional[bool] = None,
        dt_min: Optional[float] = None,
        dt_max: Optional[float] = None,
        dt_init_floor: Optional[float] = None,
        dt_limit: Optional[Tuple[float, float]] = None,
        mixer_bias: Optional[bool] = None,
        conv_bias: Optional[bool] = None,
        backend: Optional[str] = None,
        mixer: Union[str, Sequence[str]] = 'hydra',
        mixer_kwargs: Union[Dict[str, Any], Sequence[Optional[Dict[str, Any]]], None] = None,
        mlp: Literal['dense', 'blockdiag', 'monarch'] = 'dense',
        mlp_blocks: int = 4,
        pos_embed: Literal['none', 'learn'] = 'none',
        class_token: bool = False,
        class_token_position: Literal['first', 'middle', 'last'] = 'first',
        scan_order: Literal['row', 'column', 'alternate', 'snake', 'hilbert'] = 'row',
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Optional[LayerType] = None,
        act_layer: Optional[LayerType] = None,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            img_size: Input image size.
            patch_size: Patch size.
            in_chans: Number of image input channels.
            num_classes: Number of classes for classification head, 0 for none.
            global_pool: Type of global pooling for final sequence; 'token' needs the class token.
            embed_dim: Width of the tokens (d_model of the mixer).
            depth: Number of blocks.
            mlp_ratio: Ratio of mlp hidden dim to embedding dim; 0 (the paper) for blocks without MLP.
            d_state: State size of the mixer (64). None for this and the following options, down to backend, is the
                mixer's own default, in brackets for 'hydra'.
            d_conv: Width of the mixer's depthwise convolution (7).
            expand: Inner width of the mixer over embed_dim; need not be whole (2).
            headdim: Head width of the mixer (64).
            ngroups: Groups of B and C in the mixer (1).
            share_bc: Both directions of the mixer share B and C (False).
            learnable_init_states: The mixer learns the states from which it starts (False).
            dt_min: Smallest step size at initialisation (0.001).
            dt_max: Largest step size at initialisation (0.1).
            dt_init_floor: Lower bound of the initial step size (1e-4).
            dt_limit: Clamp of the step size (none).
            mixer_bias: Bias of the mixer's projections (False).
            conv_bias: Bias of the mixer's convolution (True).
            backend: Backend of the mixer, see `hydra_vision.ops.quasiseparable_mix` ('auto').
            mixer: Name of the mixer, one of `hydra_vision.mixers.list_mixers()`; or a sequence of names that repeats
                from block to block, as many as divide depth: ('hydra', 'hydra', 'hydra', 'vit_attention') has attention
                in every fourth block. The options above go to the mixers that have them; one that none has must be
                None.
            mixer_kwargs: Further arguments of the mixer, see `hydra_vision.mixers.arguments(mixer)`; or a sequence of
                them (None for no arguments) that repeats likewise.
            mlp: 'dense'; 'blockdiag' for the block-diagonal MLP of Monarch Mixer; 'monarch' for layers of two
                block-diagonal factors (both with mlp_ratio).
            mlp_blocks: Blocks of its layers.
            pos_embed: Type of position embedding: 'none' (the paper) or 'learn'.
            class_token: Use class token.
            class_token_position: Where in the sequence the class token stands while the blocks run. Outputs always
                have it first.
            scan_order: Order of the patches while the blocks run: 'row' (the paper), 'column', 'alternate' (rows in
                even blocks, columns in odd ones), 'snake' or 'hilbert'. Position embedding and outputs are by rows.
            dynamic_img_size: Accept any image size that the patch size divides, also with what belongs to positions (a
                position embedding, a mixer's parameters), which is resampled. A model without any always does.
            dynamic_img_pad: Pad images that the patch size does not divide.
            drop_rate: Head dropout rate.
            pos_drop_rate: Dropout rate after the embedding.
            patch_drop_rate: Share of patch tokens dropped in training; the kept ones stay in order.
            proj_drop_rate: Dropout rate after the mixer and in the MLP.
            drop_path_rate: Stochastic depth rate.
            norm_layer: Normalization layer.
            act_layer: MLP activation layer.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        _check_choice('global_pool', global_pool, _POOLS)
        _check_choice('pos_embed', pos_embed, ('none', 'learn'))
        _check_choice('class_token_position', class_token_position, _TOKEN_POSITIONS)
        _check_choice('scan_order', scan_order, SCAN_ORDERS)
        if scan_order == 'alternate' and patch_drop_rate > 0:
            raise ValueError("scan_order='alternate' needs the whole grid in each block; set patch_drop_rate=0")
        if not class_token:
            if global_pool == 'token':
                raise ValueError("global_pool='token' needs class_token=True")
            if class_token_position != 'first':
                raise ValueError(f'class_token_position={class_token_position!r} needs class_token=True')
        if depth < 1 or embed_dim < 1:
            raise ValueError(f'depth={depth}, embed_dim={embed_dim}; both must be at least 1')
        if mlp_ratio != 0 and mlp_ratio * embed_dim < 1:
            raise ValueError(
                f'mlp_ratio={mlp_ratio}; it must be 0 (no MLP) or at least 1 / embed_dim={1 / embed_dim:.3g}'
            )
        for name, rate in (
            ('drop_rate', drop_rate),
            ('pos_drop_rate', pos_drop_rate),
            ('patch_drop_rate', patch_drop_rate),
            ('proj_drop_rate', proj_drop_rate),
            ('drop_path_rate', drop_path_rate),
        ):
            if not 0 <= rate < 1:
                raise ValueError(f'{name}={rate}; allowed: 0 <= {name} < 1')
        _check_choice('mlp', mlp, ('dense', 'blockdiag', 'monarch'))
        if mlp != 'dense' and mlp_ratio == 0:
            raise ValueError(f'mlp={mlp!r} needs an mlp_ratio above 0')
        if mlp == 'dense' and mlp_blocks != 4:
            raise ValueError(f"mlp_blocks={mlp_blocks} needs mlp='blockdiag' or 'monarch'")
        norm_layer = get_norm_layer(norm_layer) or LayerNorm
        block_norm_layer = partial(BlockNorm, backend=backend or 'auto') if norm_layer is LayerNorm else norm_layer
        act_layer = get_act_layer(act_layer) or nn.GELU

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1 if class_token else 0
        self.num_reg_tokens = 0
        self.has_class_token = class_token
        self.class_token_position = class_token_position
        self.scan_order = scan_order
        self.no_embed_class = True  # the position embedding covers patches only
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False

        grid_size = _check_grid_size(
            img_size, patch_size, pos_embed == 'learn' and not dynamic_img_size, dynamic_img_pad
        )
        embed_args = {}
        if dynamic_img_size:
            # flatten deferred until after pos embed
            embed_args.update(strict_img_size=False, output_fmt='NHWC')
        self.patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            dynamic_img_pad=dynamic_img_pad,
            **embed_args,
            **dd,
        )
        num_patches = self.patch_embed.num_patches
        reduction = self.patch_embed.feat_ratio()

        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if class_token else None
        self.reg_token = None
        self.pos_embed = nn.Parameter(torch.empty(1, num_patches, embed_dim, **dd)) if pos_embed == 'learn' else None
        self.pos_drop = nn.Dropout(p=pos_drop_rate)
        # ordered: a scan over shuffled tokens is a different model
        patch_drop = partial(PatchDropout, patch_drop_rate, num_prefix_tokens=0, ordered=True)
        self.patch_drop = patch_drop() if patch_drop_rate > 0 else nn.Identity()
        self.norm_pre = nn.Identity()

        dpr = calculate_drop_path_rates(drop_path_rate, depth)  # stochastic depth decay rule
        mixer_layers = mixer_factories(
            mixer,
            dict(
                d_state=d_state,
                d_conv=d_conv,
                expand=expand,
                headdim=headdim,
                ngroups=ngroups,
                share_bc=share_bc,
                learnable_init_states=learnable_init_states,
                dt_min=dt_min,
                dt_max=dt_max,
                dt_init_floor=dt_init_floor,
                dt_limit=None if dt_limit is None else tuple(dt_limit),
                bias=mixer_bias,
                conv_bias=conv_bias,
                backend=backend,
            ),
            mixer_kwargs,
            depth=depth,
            grid_size=grid_size,
            num_prefix_tokens=self.num_prefix_tokens,
            prefix_position=class_token_position,
            patch_drop_rate=patch_drop_rate,
        )
        structured = {'blockdiag': BlockDiagonalLinear, 'monarch': MonarchLinear}
        mlp_layer = Mlp if mlp == 'dense' else partial(StructuredMlp, layer=structured[mlp], blocks=mlp_blocks)
        self.blocks = nn.Sequential(
            *[
                HydraBlock(
                    dim=embed_dim,
                    mixer_layer=mixer_layers[i],
                    mlp_layer=mlp_layer,
                    mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate,
                    drop_path=dpr[i],
                    norm_layer=block_norm_layer,
                    act_layer=act_layer,
                    **dd,
                )
                for i in range(depth)
            ]
        )
        if scan_order != 'row' and any(blk.mixer.needs_row_order for blk in self.blocks):
            raise ValueError(f"scan_order={scan_order!r}: mixer={mixer!r} needs patches by rows, scan_order='row'")
        if scan_order != 'row' and dynamic_img_size and any(blk.takes_grid for blk in self.blocks):
            raise ValueError(
                f'scan_order={scan_order!r}: position parameters of mixer={mixer!r} are resampled by rows; set '
                'dynamic_img_size=False'
            )
        if pos_embed == 'none' and not any(blk.mixer.grid_parameters() for blk in self.blocks):
            self.patch_embed.strict_img_size = False  # nothing belongs to a position
        self.feature_info = [dict(module=f'blocks.{i}', num_chs=embed_dim, reduction=reduction) for i in range(depth)]
        self.norm = norm_layer(embed_dim, **dd)

        # Classifier Head
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialize model weights: every Linear trunc_normal(0.02), the mixers as released (paper table 9).

        Args:
            needs_reset: Reset modules that initialise themselves in their constructors, as needed after `to_empty()`.
        """
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        self.apply(partial(self._init_weights, needs_reset=needs_reset))

    def _init_weights(self, m: nn.Module, needs_reset: bool = True) -> None:
        if isinstance(m, nn.Linear):
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif needs_reset and hasattr(m, 'reset_parameters') and m is not self:
            m.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Set of parameters (patterns) that should not use weight decay."""
        return {'pos_embed', 'cls_token'} | {
            f'*.mixer.{name}' for blk in self.blocks for name in blk.mixer.no_weight_decay()
        }

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Union[str, List]]:
        """Create regex patterns for parameter grouping.

        Args:
            coarse: Use coarse grouping.

        Returns:
            Dictionary mapping group names to regex patterns.
        """
        return dict(
            stem=r'^cls_token|pos_embed|patch_embed|norm_pre',  # stem and embed
            blocks=r'^blocks' if coarse else [(r'^blocks\.(\d+)', None), (r'^norm', (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing.

        Args:
            enable: Whether to enable gradient checkpointing.
        """
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Get the classifier head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Reset the classifier head.

        Args:
            num_classes: Number of classes for new classifier.
            global_pool: Global pooling type, None keeps the current one.
        """
        if global_pool is not None:
            # asserts, as in timm: callers that probe for supported poolings catch AssertionError
            assert global_pool in _POOLS, f'global_pool={global_pool!r}; allowed: {_POOLS}'
            assert global_pool != 'token' or self.has_class_token, 'Token pooling needs the class token.'
            self.global_pool = global_pool
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self._init_weights(self.head, needs_reset=False)
        self.head.train(self.training)

    def set_input_size(
        self,
        img_size: Optional[Tuple[int, int]] = None,
        patch_size: Optional[Tuple[int, int]] = None,
    ) -> None:
        """Update the input image resolution and patch size.

        Args:
            img_size: New input resolution, if None current resolution is used.
            patch_size: New patch size, if None existing patch size is used.

        Raises:
            ValueError: A size that does not fit, or to which a mixer's parameters cannot be resampled; the model
                stays as it was.
        """
        prev_grid_size = self.patch_embed.grid_size
        grid_size = _check_grid_size(
            self.patch_embed.img_size if img_size is None else img_size,
            self.patch_embed.patch_size if patch_size is None else patch_size,
            self.pos_embed is not None and not self.dynamic_img_size,
            self.patch_embed.dynamic_img_pad,
        )
        grid_mixers = [blk.mixer for blk in self.blocks if blk.takes_grid]
        for mixer in grid_mixers:  # reject before anything is changed
            if grid_size == mixer.tokens.size:
                continue
            if self.scan_order != 'row' and mixer.grid_parameters():
                raise ValueError(
                    f"scan_order={self.scan_order!r}: this mixer's position parameters are resampled by rows only"
                )
            mixer.resampled_parameters(grid_size)
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        if self.pos_embed is not None and self.patch_embed.grid_size != prev_grid_size:
            self.pos_embed = nn.Parameter(
                resample_abs_pos_embed(
                    self.pos_embed,
                    new_size=self.patch_embed.grid_size,
                    old_size=prev_grid_size,
                    num_prefix_tokens=0,
                    verbose=True,
                ),
                requires_grad=self.pos_embed.requires_grad,
            )
        for mixer in grid_mixers:
            mixer.set_input_size(grid_size)
        if patch_size is not None:
            reduction = self.patch_embed.feat_ratio()
            for info in self.feature_info:
                info['reduction'] = reduction
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)
        _recommend_size(self, self.patch_embed.img_size)

    def _grid(self, x: torch.Tensor) -> Optional[Tuple[int, int]]:
        """Grid of the patches of images (B, C, H, W), where it may differ from the model's own."""
        if self.patch_embed.strict_img_size:
            return None
        return self.patch_embed.grid_of(x.shape[2], x.shape[3])

    def _whole_grid(self, grid: Optional[Tuple[int, int]]) -> Tuple[int, int]:
        """What `_grid` returned, or the model's own grid."""
        if grid is not None:
            return grid
        return self.patch_embed.dynamic_feat_size(self.patch_embed.img_size)

    def _pos_embed(self, x: torch.Tensor, grid: Optional[Tuple[int, int]] = None) -> torch.Tensor:
        """Patches to tokens in scan order (the first block's), with position embedding and class token."""
        if self.dynamic_img_size:
            _, H, W, _ = x.shape
            grid = (H, W)
            if self.pos_embed is not None:
                pos_embed = resample_abs_pos_embed(
                    self.pos_embed,
                    new_size=[H, W],
                    old_size=self.patch_embed.grid_size,
                    num_prefix_tokens=0,
                )
                x = x.flatten(1, 2) + pos_embed
            else:
                x = x.flatten(1, 2)
        elif self.pos_embed is not None:
            x = x + self.pos_embed
        x = self.pos_drop(x)
        if self.scan_order != 'row':
            height, width = self._whole_grid(grid)
            x = reorder(x, height, width, 'row', block_order(self.scan_order, 0), -1)
        x = self.patch_drop(x)
        if self.cls_token is not None:
            cls_token = self.cls_token.expand(x.shape[0], -1, -1)
            if self.class_token_position == 'first':
                x = torch.cat([cls_token, x], dim=1)
            elif self.class_token_position == 'last':
                x = torch.cat([x, cls_token], dim=1)
            else:
                middle = x.shape[1] // 2
                x = torch.cat([x[:, :middle], cls_token, x[:, middle:]], dim=1)
        return x

    def _class_index(self, length: int) -> int:
        """Where the class token stands in a sequence of this length while the blocks run; -1 without one."""
        if self.cls_token is None:
            return -1
        if self.class_token_position == 'first':
            return 0
        return length - 1 if self.class_token_position == 'last' else (length - 1) // 2

    def _next_order(self, x: torch.Tensor, block: int, grid: Optional[Tuple[int, int]]) -> torch.Tensor:
        """From the scan order of the block before to that of this one, where orders alternate."""
        if self.scan_order == 'alternate' and block > 0:
            before, now = block_order(self.scan_order, block - 1), block_order(self.scan_order, block)
            H, W = self._whole_grid(grid)
            x = reorder(x, H, W, before, now, self._class_index(x.shape[1]))
        return x

    def _output_order(self, x: torch.Tensor, block: int, grid: Optional[Tuple[int, int]]) -> torch.Tensor:
        """Scan order of a block to output order: the class token, then the patches by rows.

        Where patches were dropped, no grid is left: they stay in scan order.
        """
        dropped = self.training and not isinstance(self.patch_drop, nn.Identity)
        if self.scan_order != 'row' and not dropped:
            order = block_order(self.scan_order, block)
            H, W = self._whole_grid(grid)
            x = reorder(x, H, W, order, 'row', self._class_index(x.shape[1]))
        position = self._class_index(x.shape[1])
        if self.cls_token is None or self.class_token_position == 'first':
            return x
        return torch.cat([x[:, position : position + 1], x[:, :position], x[:, position + 1 :]], dim=1)

    @torch.jit.ignore
    def token_order(self, height: int, width: int, block: int = 0) -> torch.Tensor:
        """Where the tokens stand in the sequence that a block mixes.

        Args:
            height: Rows of the patch grid.
            width: Columns of the patch grid.
            block: Index of the block.

        Returns:
            (L,) Position of each prefix token, then of each patch in raster order.
        """
        length = self.num_prefix_tokens + height * width
        return self._output_order(torch.arange(length)[None, :, None], block, (height, width))[0, :, 0]

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
        patch_coord: Optional[torch.Tensor] = None,
        patch_valid: Optional[torch.Tensor] = None,
        cu_seqlens: Optional[torch.Tensor] = None,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]], Dict[str, Any]]:
        """Forward features that returns intermediates.

        Args:
            x: Input image tensor, or what `forward` takes; patches have no common grid and need output_fmt NLC
            indices: Take last n blocks if int, all if None, select matching indices if sequence
            return_prefix_tokens: Return both prefix and spatial intermediate tokens
            norm: Apply norm layer to all intermediates
            stop_early: Stop iterating over blocks when last desired intermediate hit
            output_fmt: Shape of intermediate feature outputs
            intermediates_only: Only return intermediate features
            output_dict: Return outputs as a dictionary with 'image_features' and 'image_intermediates' keys
            patch_coord: As in `forward`
            patch_valid: As in `forward`
            cu_seqlens: As in `forward`; class tokens of packed images come as one (1, S, C) for each intermediate
        Returns:
            A tuple with (final_features, intermediates), a list of intermediate features, or a dictionary containing
            'image_features' and 'image_intermediates' (and optionally 'image_intermediates_prefix'); of padded or
            packed images also 'patch_valid' or 'cu_seqlens', of the patches in the intermediates
        """
        assert output_fmt in ('NCHW', 'NLC'), 'Output format must be one of NCHW or NLC.'
        reshape = output_fmt == 'NCHW'
        if not torch.jit.is_scripting() and _is_naflex(x, patch_coord, patch_valid, cu_seqlens):
            return self._naflex_intermediates(
                x, indices, return_prefix_tokens, norm, stop_early, reshape, intermediates_only, output_dict,
                patch_coord, patch_valid, cu_seqlens,
            )  # fmt: skip
        assert not (self.training and reshape and not isinstance(self.patch_drop, nn.Identity)), (
            'Dropped patches leave no feature map: use output_fmt NLC, eval mode or patch_drop_rate=0.'
        )
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)

        # forward pass
        B = x.shape[0]
        grid = self._grid(x)
        x = self.patch_embed(x)
        x = self._pos_embed(x, grid)
        x = self.norm_pre(x)

        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            blocks = self.blocks
        else:
            blocks = self.blocks[: max_index + 1]
        for i, blk in enumerate(blocks):
            x = self._next_order(x, i, grid)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(blk, x, grid)
            else:
                x = blk(x, grid)
            if i in take_indices:
                # normalize intermediates with final norm layer if enabled
                intermediates.append(self._output_order(self.norm(x) if norm else x, i, grid))

        last = len(blocks) - 1

        # process intermediates
        if self.num_prefix_tokens:
            # split prefix (class) and spatial feature tokens
            prefix_tokens = [y[:, 0 : self.num_prefix_tokens] for y in intermediates]
            intermediates = [y[:, self.num_prefix_tokens :] for y in intermediates]
        else:
            prefix_tokens = None

        if reshape:
            # reshape to BCHW output format
            H, W = self._whole_grid(grid)
            intermediates = [y.reshape(B, H, W, -1).permute(0, 3, 1, 2).contiguous() for y in intermediates]

        # For dictionary output, handle prefix tokens separately
        if output_dict:
            result_dict = {'image_intermediates': intermediates}
            if prefix_tokens is not None and return_prefix_tokens:
                result_dict['image_intermediates_prefix'] = prefix_tokens
            # Only include features if not intermediates_only
            if not intermediates_only:
                result_dict['image_features'] = self._output_order(self.norm(x), last, grid)
            return result_dict

        # For non-dictionary output, maintain the original behavior
        if not torch.jit.is_scripting() and return_prefix_tokens and prefix_tokens is not None:
            # return_prefix not support in torchscript due to poor type handling
            intermediates = list(zip(intermediates, prefix_tokens))

        if intermediates_only:
            return intermediates

        x = self._output_order(self.norm(x), last, grid)

        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates.

        Args:
            indices: Indices of intermediate layers to keep.
            prune_norm: Whether to prune normalization layer.
            prune_head: Whether to prune the classifier head.

        Returns:
            List of indices that were kept.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]  # truncate blocks
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def get_intermediate_layers(
        self,
        x: torch.Tensor,
        n: Union[int, List[int], Tuple[int]] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> List[torch.Tensor]:
        """Get intermediate layer outputs (DINO interface compatibility).

        NOTE: This API is for backwards compat, favour using forward_intermediates() directly. Without a class token
        (the default) the first token of a returned sequence is a patch, not a summary of the image.

        Args:
            x: Input tensor.
            n: Number or indices of layers.
            reshape: Reshape to NCHW format.
            return_prefix_tokens: Return prefix tokens.
            norm: Apply normalization.

        Returns:
            List of intermediate features.
        """
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt='NCHW' if reshape else 'NLC',
            intermediates_only=True,
        )

    @torch.jit.unused
    def _keeps_open(self, x: torch.Tensor) -> bool:
        """Whether the last sum of a block may wait for the norm of the next: where nobody wants the tokens between."""
        if torch.compiler.is_compiling() or self.grad_checkpointing or self.scan_order == 'alternate':
            return False
        return all(is_unwatched(blk, HydraBlock) and blk.fuses(x) for blk in self.blocks)

    @torch.jit.unused
    def _forward_open(self, x: torch.Tensor, grid: Optional[Tuple[int, int]]) -> torch.Tensor:
        """Blocks and final norm."""
        branch = None
        for blk in self.blocks:
            x, branch = blk.forward_open(x, branch, grid)
        return final_norm(self.norm, x, branch)

    @torch.jit.unused
    def _forward_naflex(
        self,
        x: Union[torch.Tensor, Dict[str, torch.Tensor]],
        patch_coord: Optional[torch.Tensor],
        patch_valid: Optional[torch.Tensor],
        cu_seqlens: Optional[torch.Tensor],
        take_indices: Sequence[int] = (),
        norm: bool = False,
        depth: Optional[int] = None,
    ) -> Tuple[Dict[str, torch.Tensor], List[torch.Tensor]]:
        """`forward_features` of images of several sizes, padded or in one row, and the outputs of some blocks."""
        x, coord, valid, cu_seqlens = naflex_inputs(x, patch_coord, patch_valid, cu_seqlens)
        packed = cu_seqlens is not None
        for i, blk in enumerate(self.blocks):
            if packed:
                check_packing(blk.mixer, f'cu_seqlens, block {i}')
            else:
                check_padding(blk.mixer, f'patch_valid, block {i}')
        if self.training and not isinstance(self.patch_drop, nn.Identity):
            name, kind = ('cu_seqlens', 'packed') if packed else ('patch_valid', 'padded')
            raise ValueError(f'{name}: no patches are dropped from a {kind} batch; set patch_drop_rate=0')
        if coord is None:
            H, W = self._whole_grid(self._grid(x))
            x = self.patch_embed(x)
            x = x.flatten(1, 2) if self.dynamic_img_size else x
            coord = grid_coordinates(H, W, x.device).expand(x.shape[0], -1, -1)
            valid = valid.flatten(1)
        else:
            x = self.patch_embed.from_patches(x)
        if packed:
            valid = tokens_of_sequences(cu_seqlens)
            x, coord = unpacked(x, valid), unpacked(coord, valid)
            cu_seqlens = cu_seqlens + self.num_prefix_tokens * torch.arange(
                len(cu_seqlens), dtype=cu_seqlens.dtype, device=x.device
            )
        if valid.shape != x.shape[:2] or valid.dtype != torch.bool:
            form = f'{tuple(valid.shape)}, {valid.dtype}'
            raise ValueError(f'patch_valid has shape {form}; it must be {tuple(x.shape[:2])}, torch.bool')
        if self.pos_embed is not None:
            x = x + sampled_pos_embed(self.pos_embed, self.patch_embed.grid_size, coord, valid)
        x = self.pos_drop(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.norm_pre(x)
        in_scan = torch.arange(x.shape[1], device=x.device) < valid.sum(1, keepdim=True) + self.num_prefix_tokens
        order, place = None, None

        def output(x: torch.Tensor) -> torch.Tensor:
            """Tokens where they stood."""
            x = reorder_tokens(unpacked(x, in_scan) if packed else x, place)
            return packed_row(x, in_scan) if packed else x

        intermediates = []
        for i, blk in enumerate(self.blocks[:depth]):
            before, order = order, block_order(self.scan_order, i)
            if order != before:
                if place is not None:
                    x = reorder_tokens(unpacked(x, in_scan) if packed else x, place)
                token = self.class_token_position if self.has_class_token else None
                place = scan_positions(order, coord, valid, token)
                x = reorder_tokens(x, place.argsort(1))
                x = packed_row(x, in_scan) if packed else x
            function, how = (blk.forward_packed, (cu_seqlens,)) if packed else (blk, (None, in_scan))
            x = checkpoint(function, x, *how) if self.grad_checkpointing else function(x, *how)
            if i in take_indices:
                intermediates.append(output(self.norm(x) if norm else x))
        borders = {'cu_seqlens': cu_seqlens} if packed else {'patch_valid': valid}
        return {'patches': output(self.norm(x)), **borders}, intermediates

    @torch.jit.unused
    def _naflex_logits(
        self,
        x: Union[torch.Tensor, Dict[str, torch.Tensor]],
        patch_coord: Optional[torch.Tensor],
        patch_valid: Optional[torch.Tensor],
        cu_seqlens: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """`forward` of images of several sizes."""
        return self.forward_head(**self._forward_naflex(x, patch_coord, patch_valid, cu_seqlens)[0])

    @torch.jit.unused
    def _naflex_intermediates(
        self,
        x: Union[torch.Tensor, Dict[str, torch.Tensor]],
        indices: Optional[Union[int, List[int]]],
        return_prefix_tokens: bool,
        norm: bool,
        stop_early: bool,
        reshape: bool,
        intermediates_only: bool,
        output_dict: bool,
        patch_coord: Optional[torch.Tensor],
        patch_valid: Optional[torch.Tensor],
        cu_seqlens: Optional[torch.Tensor],
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]], Dict[str, Any]]:
        """`forward_intermediates` of images of several sizes."""
        images = isinstance(x, torch.Tensor) and x.ndim == 4
        if reshape and not images:
            raise ValueError("output_fmt='NCHW': the images of a NaFlex batch have no common grid; use 'NLC'")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        depth = max_index + 1 if stop_early else None
        features, intermediates = self._forward_naflex(
            x, patch_coord, patch_valid, cu_seqlens, take_indices, norm, depth
        )
        final, n = features['patches'], self.num_prefix_tokens
        borders = features.get('cu_seqlens')
        prefix_tokens = None
        if n and borders is None:
            prefix_tokens, intermediates = [y[:, :n] for y in intermediates], [y[:, n:] for y in intermediates]
        elif n:
            first = torch.zeros(final.shape[1], dtype=torch.bool, device=final.device)
            first[borders[:-1].long()] = True
            prefix_tokens, intermediates = [y[:, first] for y in intermediates], [y[:, ~first] for y in intermediates]
        if reshape:
            H, W = self._whole_grid(self._grid(x))
            intermediates = [y.unflatten(1, (H, W)).permute(0, 3, 1, 2).contiguous() for y in intermediates]
        if output_dict:
            result_dict = {'image_intermediates': intermediates}
            if prefix_tokens is not None and return_prefix_tokens:
                result_dict['image_intermediates_prefix'] = prefix_tokens
            if not intermediates_only:
                result_dict['image_features'] = final
            if borders is None:
                result_dict['patch_valid'] = features['patch_valid']
            else:
                result_dict['cu_seqlens'] = borders - n * torch.arange(len(borders), device=borders.device)
            return result_dict
        if return_prefix_tokens and prefix_tokens is not None:
            intermediates = list(zip(intermediates, prefix_tokens))
        return intermediates if intermediates_only else (final, intermediates)

    def forward_features(
        self,
        x: torch.Tensor,
        patch_coord: Optional[torch.Tensor] = None,
        patch_valid: Optional[torch.Tensor] = None,
        cu_seqlens: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Forward pass through feature layers (embeddings, blocks, final norm).

        Args:
            x: Images (B, C, H, W), or what `forward` takes.
            patch_coord: As in `forward`.
            patch_valid: As in `forward`.
            cu_seqlens: As in `forward`.

        Returns:
            (B, L, embed_dim); of a padded batch, as timm's NaFlexVit, the arguments of `forward_head`: a dictionary
            with 'patches' (B, L, embed_dim), the class token and then the patches where they stood, and 'patch_valid'.
            Of a packed one 'patches' (1, L, embed_dim), each image's class token before its patches, and 'cu_seqlens',
            the borders of these tokens.
        """
        if not torch.jit.is_scripting() and _is_naflex(x, patch_coord, patch_valid, cu_seqlens):
            return self._forward_naflex(x, patch_coord, patch_valid, cu_seqlens)[0]
        grid = self._grid(x)
        x = self.patch_embed(x)
        x = self._pos_embed(x, grid)
        x = self.norm_pre(x)
        last = len(self.blocks) - 1
        if not torch.jit.is_scripting() and self._keeps_open(x):
            return self._output_order(self._forward_open(x, grid), last, grid)
        for i, blk in enumerate(self.blocks):
            x = self._next_order(x, i, grid)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(blk, x, grid)
            else:
                x = blk(x, grid)
        return self._output_order(self.norm(x), last, grid)

    def pool(
        self,
        x: torch.Tensor,
        pool_type: Optional[str] = None,
        patch_valid: Optional[torch.Tensor] = None,
        cu_seqlens: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Apply pooling to feature tokens.

        Args:
            x: Feature tensor.
            pool_type: Pooling type override.
            patch_valid: (B, N), False at patches that are padding.
            cu_seqlens: (S + 1,), borders of S images in one row (1, L, embed_dim), class tokens counted.

        Returns:
            Pooled features.
        """
        pool_type = self.global_pool if pool_type is None else pool_type
        if cu_seqlens is not None and not torch.jit.is_scripting():
            if pool_type == '':
                return x
            own = tokens_of_sequences(cu_seqlens)
            x, patch_valid = unpacked(x, own), own[:, self.num_prefix_tokens :]
        if patch_valid is not None and not torch.jit.is_scripting():
            wide = x if x.dtype == torch.float64 else x.float()  # bfloat16 does not count beyond 256
            return global_pool_naflex(wide, patch_valid, pool_type, self.num_prefix_tokens).to(x.dtype)
        return global_pool_nlc(x, pool_type=pool_type, num_prefix_tokens=self.num_prefix_tokens)

    def forward_head(
        self,
        patches: torch.Tensor,
        pre_logits: bool = False,
        patch_valid: Optional[torch.Tensor] = None,
        cu_seqlens: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Forward pass through classifier head.

        Args:
            patches: Feature tensor.
            pre_logits: Return features before final classifier.
            patch_valid: (B, N), False at patches that are padding.
            cu_seqlens: As in `pool`.

        Returns:
            Output tensor.
        """
        x = self.head_drop(self.pool(patches, patch_valid=patch_valid, cu_seqlens=cu_seqlens))
        return x if pre_logits else self.head(x)

    def forward(
        self,
        x: torch.Tensor,
        patch_coord: Optional[torch.Tensor] = None,
        patch_valid: Optional[torch.Tensor] = None,
        cu_seqlens: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Forward pass to logits (B, num_classes).

        An image in a padded or packed batch gets what it would get alone, to rounding.

        Args:
            x: Images (B, in_chans, H, W); patches (B, N, height * width * in_chans) or (B, N, height, width, in_chans)
                with `patch_coord`; or a dictionary of timm's NaFlex loader: 'patches', 'patch_coord', 'patch_valid' (or
                'cu_seqlens').
            patch_coord: (B, N, 2) Row and column of each patch in its image.
            patch_valid: (B, N) False at patches that are padding; N = h * w patches by rows for images.
            cu_seqlens: (S + 1,) int32 or int64, from 0 to N: the patches of S images stand in one row, B = 1, patch
                cu_seqlens[n] being the first of the n-th. The logits are (S, num_classes).

        Raises:
            ValueError: A padded batch and a mixer that cannot leave padding out, a packed one and a mixer that knows no
                borders, or shapes that do not fit.
        """
        if not torch.jit.is_scripting() and _is_naflex(x, patch_coord, patch_valid, cu_seqlens):
            return self._naflex_logits(x, patch_coord, patch_valid, cu_seqlens)
        return self.forward_head(self.forward_features(x))


@torch.jit.unused
def _is_naflex(x: Any, patch_coord: Any, patch_valid: Any, cu_seqlens: Any) -> bool:
    """For torch.fx, whose stand-ins are no tensors, an argument that is left out is not there."""
    return isinstance(x, dict) or any(isinstance(t, torch.Tensor) for t in (patch_coord, patch_valid, cu_seqlens))


def _check_choice(name: str, value: str, allowed: Tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f'{name}={value!r}; allowed: {", ".join(map(repr, allowed))}')


def _check_grid_size(
    img_size: Union[int, Tuple[int, int]],
    patch_size: Union[int, Tuple[int, int]],
    fixed_pos_embed: bool,
    dynamic_img_pad: bool,
) -> Tuple[int, int]:
    """Grid of patches that the blocks see, before a model is built or changed for it."""
    sizes = {'img_size': to_2tuple(img_size), 'patch_size': to_2tuple(patch_size)}
    for name, size in sizes.items():
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f'{name}={size}; it must be a number or (H, W), each at least 1')
    (H, W), (h, w) = sizes.values()
    grid_size = H // h, W // w
    if min(grid_size) < 1:
        raise ValueError(f'img_size={img_size} is smaller than patch_size={patch_size}')
    padded = math.ceil(H / h), math.ceil(W / w)
    if fixed_pos_embed and dynamic_img_pad and padded != grid_size:
        raise ValueError(
            "pos_embed='learn' with dynamic_img_pad=True needs dynamic_img_size=True where "
            f'patch_size={patch_size} does not divide img_size={img_size}'
        )
    return padded if dynamic_img_pad else grid_size


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: HydraViT) -> Dict[str, torch.Tensor]:
    """Remap a checkpoint to this model: wrappers, names of the released code's stacks, patch and grid size.

    The mixer's own names are those of the released module. Stacks of such modules, as the state space model code bases
    write them, are `[backbone.]layers.N.{norm, mixer.*}` with a final `norm_f`.
    """
    for wrapper in ('model_ema', 'state_dict_ema', 'model', 'state_dict'):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
            break
    out_dict = {}
    for k, v in state_dict.items():
        k = k.removeprefix('module.')
        k = k.removeprefix('backbone.')
        if k.startswith('layers.'):
            k = 'blocks.' + k[len('layers.') :]
            head, _, tail = k.partition('.norm.')  # the block's own norm, not that of its mixer
            if tail and head.count('.') == 1:
                k = f'{head}.norm1.{tail}'
        elif k.startswith('norm_f.'):
            k = 'norm.' + k[len('norm_f.') :]
        if k == 'patch_embed.proj.weight' and v.ndim == 4 and v.shape[-2:] != model.patch_embed.proj.weight.shape[-2:]:
            v = resample_patch_embed(v, list(model.patch_embed.proj.weight.shape[-2:]), verbose=True)
        elif (
            k == 'pos_embed'
            and model.pos_embed is not None
            and v.shape[1] != model.pos_embed.shape[1]
            and math.isqrt(v.shape[1]) ** 2 == v.shape[1]  # the sides of another grid than a square are not known
        ):
            v = resample_abs_pos_embed(v, new_size=model.patch_embed.grid_size, num_prefix_tokens=0, verbose=True)
        elif '.mixer.' in k and model.scan_order == 'row':  # resampled by rows; else loading names the size mismatch
            v = resample_mixer_parameter(k, v, model)
        out_dict[k] = v
    return out_dict


def _recommend_size(model: nn.Module, img_size: Union[int, Tuple[int, int]]) -> None:
    """timm's preprocessing takes the size of a model that takes any from its configuration."""
    cfg = getattr(model, 'pretrained_cfg', None)
    if cfg and cfg.get('input_size'):
        cfg['input_size'] = (cfg['input_size'][0], *to_2tuple(img_size))


def _create_hydra_vit(variant: str, pretrained: bool = False, **kwargs) -> HydraViT:
    out_indices = kwargs.pop('out_indices', 3)
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    if cfg.tag in _TAG_PATCH_SIZE:  # timm's configuration of weights has no field for it
        kwargs.setdefault('patch_size', _TAG_PATCH_SIZE[cfg.tag])
        file = cfg.file or str(_weights_file(variant, cfg.tag))
        elsewhere = cfg.state_dict or cfg.url or cfg.hf_hub_id
        if pretrained and not elsewhere and not Path(file).exists():
            raise FileNotFoundError(f'the weights of {variant}.{cfg.tag} are not where they belong: {file}')
    model = build_model_with_cfg(
        HydraViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )
    if cfg.tag in _TAG_PATCH_SIZE:
        update_model_args(model, patch_size=kwargs['patch_size'])  # saved with the model, as if it had been given
    registered = get_pretrained_cfg('.'.join(filter(None, (variant, cfg.tag)))).input_size[1:]
    if 'img_size' in kwargs and tuple(model.pretrained_cfg['input_size'][1:]) == registered:  # no file says otherwise
        _recommend_size(model, kwargs['img_size'])
    return model


def _cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': None,
        'crop_pct': 0.9,
        'interpolation': 'bicubic',
        'fixed_input_size': False,
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'mit',
        **kwargs,
    }


_TAG_PATCH_SIZE = {'tin200': 4}


def _weights_file(variant: str, tag: str) -> Path:
    """Where the weights of a tag are, their card beside them."""
    return Path(__file__).resolve().parents[1] / 'pretrained' / f'{variant}_{tag}' / 'model.safetensors'


def _tin200_cfg(variant: str) -> Dict[str, Any]:
    """Weights trained on Tiny-ImageNet-200; timm lists them as pretrained where their file is."""
    file = _weights_file(variant, 'tin200')
    return _cfg(
        **({'file': str(file)} if file.exists() else {}),
        num_classes=200,
        input_size=(3, 64, 64),
        crop_pct=1.0,
        mean=(0.480, 0.446, 0.396),
        std=(0.277, 0.269, 0.282),
        license='other',  # images with terms of their own: see the card
        description='Tiny-ImageNet-200, 64 px, patch 4',
    )


default_cfgs = generate_default_cfgs(
    {
        'test_hydra_vit.untrained': _cfg(input_size=(3, 160, 160)),
        'hydra_vit_nano.untrained': _cfg(),
        'hydra_vit_tiny.tin200': _tin200_cfg('hydra_vit_tiny'),
        'hydra_vit_tiny.untrained*': _cfg(),  # the default: the model for 224 px
        'hydra_vit_small.untrained': _cfg(),
        'hydra_vit_base.untrained': _cfg(),
        'hydra_vit_large.untrained': _cfg(),
    }
)


@register_model
def test_hydra_vit(pretrained: bool = False, **kwargs) -> HydraViT:
    """Hydra-ViT test model: small enough for tests, real enough to have every part."""
    model_args = dict(img_size=160, patch_size=16, embed_dim=64, depth=4)
    return _create_hydra_vit('test_hydra_vit', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hydra_vit_nano(pretrained: bool = False, **kwargs) -> HydraViT:
    """Hydra-ViT-Nano: for small images, demonstrations, the CPU. 1.88 M parameters."""
    model_args = dict(patch_size=16, embed_dim=128, depth=12)
    return _create_hydra_vit('hydra_vit_nano', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hydra_vit_tiny(pretrained: bool = False, **kwargs) -> HydraViT:
    """Hydra-ViT-Tiny. 7.08 M parameters."""
    model_args = dict(embed_dim=192, depth=24)  # patch 16, with the weights tin200 patch 4
    return _create_hydra_vit('hydra_vit_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hydra_vit_small(pretrained: bool = False, **kwargs) -> HydraViT:
    """Hydra-ViT-Small. 24.95 M parameters."""
    model_args = dict(patch_size=16, embed_dim=384, depth=24)
    return _create_hydra_vit('hydra_vit_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hydra_vit_base(pretrained: bool = False, **kwargs) -> HydraViT:
    """Hydra-ViT-Base, the model of the paper (appendix D.2). 93.20 M parameters."""
    model_args = dict(patch_size=16, embed_dim=768, depth=24)
    return _create_hydra_vit('hydra_vit_base', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def hydra_vit_large(pretrained: bool = False, **kwargs) -> HydraViT:
    """Hydra-ViT-Large. 323.8 M parameters."""
    model_args = dict(patch_size=16, embed_dim=1024, depth=48)
    return _create_hydra_vit('hydra_vit_large', pretrained=pretrained, **dict(model_args, **kwargs))

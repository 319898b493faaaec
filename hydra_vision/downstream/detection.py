"""torchvision's detectors on an isotropic timm backbone."""

import contextlib
import io
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from ..errors import nearest, require
from .pyramid import SimpleFeaturePyramid, isotropic_backbone, last_map

__all__ = ['PyramidBackbone', 'coco_scores', 'detector']

_KINDS = ('fcos', 'retinanet', 'faster_rcnn')


class PyramidBackbone(nn.Module):
    """Backbone and simple feature pyramid as torchvision wants them: images -> named maps, `out_channels`."""

    def __init__(self, model: nn.Module, strides: tuple[int, ...], out_channels: int, pool: bool) -> None:
        """
        Args:
            model: From `isotropic_backbone`.
            strides: Of the levels.
            out_channels: Of every level.
            pool: One more level, the coarsest subsampled by 2.
        """
        super().__init__()
        info = model.feature_info[-1]
        self.body = model
        self.pyramid = SimpleFeaturePyramid(
            info['num_chs'], info['reduction'], strides=strides, out_channels=out_channels, pool=pool
        )
        self.names = [str(level) for level in range(len(strides))] + (['pool'] if pool else [])
        self.strides = [*strides, 2 * strides[-1]] if pool else list(strides)
        self.out_channels = out_channels

    def forward(self, x: torch.Tensor) -> 'OrderedDict[str, torch.Tensor]':
        """(B, C, H, W), H and W multiples of the coarsest stride -> maps (B, out_channels, h, w) by name."""
        return OrderedDict(zip(self.names, self.pyramid(last_map(self.body, x))))


def detector(
    kind: str,
    model_name: str,
    *,
    num_classes: int,
    pretrained: bool = False,
    out_channels: int = 256,
    min_size: int = 800,
    max_size: int = 1333,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """One of torchvision's detectors on a Hydra-ViT (or any isotropic timm model), with ViTDet's feature pyramid.

    Args:
        kind: 'fcos' or 'retinanet' (strides 8, 16, 32, 64) or 'faster_rcnn' (4, 8, 16, 32 and pool).
        model_name: timm backbone.
        num_classes: As torchvision counts: with the background as class 0.
        pretrained: Load the backbone's weights.
        out_channels: Width of the pyramid and the heads.
        min_size: The shorter side that images are resized to.
        max_size: Most of the longer side.
        model_kwargs: Of the backbone.
        **kwargs: Of torchvision's detector.

    Returns:
        A `torchvision.models.detection` model: `model(images, targets)` gives losses in training mode,
        `model(images)` boxes, labels and scores in eval mode.

    Raises:
        ValueError: An unknown kind or model, a model that is not isotropic, or fewer than two classes.
    """
    if kind not in _KINDS:
        raise ValueError(f'kind={kind!r}; allowed: {", ".join(map(repr, _KINDS))}{nearest(kind, _KINDS)}')
    if num_classes < 2:
        raise ValueError(f'num_classes={num_classes}; at least 2: the background, class 0, counts')
    body = isotropic_backbone(model_name, pretrained=pretrained, **(model_kwargs or {}))
    two_stage = kind == 'faster_rcnn'
    backbone = PyramidBackbone(body, (4, 8, 16, 32) if two_stage else (8, 16, 32, 64), out_channels, pool=two_stage)
    shared = {
        'num_classes': num_classes,
        'min_size': min_size,
        'max_size': max_size,
        'image_mean': list(body.pretrained_cfg.get('mean', IMAGENET_DEFAULT_MEAN)),
        'image_std': list(body.pretrained_cfg.get('std', IMAGENET_DEFAULT_STD)),
        'size_divisible': max(backbone.strides[: len(backbone.pyramid.strides)]),
        **kwargs,
    }
    if kind == 'fcos':
        # one anchor per cell, as large as the stride: what FCOS regresses from
        anchors = AnchorGenerator(tuple((s,) for s in backbone.strides), ((1.0,),) * len(backbone.strides))
        return FCOS(backbone, **{'anchor_generator': anchors, **shared})
    if kind == 'retinanet':
        sizes = tuple(tuple(int(4 * s * 2 ** (octave / 3)) for octave in range(3)) for s in backbone.strides)
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        return RetinaNet(backbone, **{'anchor_generator': anchors, **shared})
    anchors = AnchorGenerator(tuple((8 * s,) for s in backbone.strides), ((0.5, 1.0, 2.0),) * len(backbone.strides))
    pool = MultiScaleRoIAlign(featmap_names=['0', '1', '2', '3'], output_size=7, sampling_ratio=2)
    return FasterRCNN(backbone, **{'rpn_anchor_generator': anchors, 'box_roi_pool': pool, **shared})


@torch.inference_mode()
def coco_scores(
    model: nn.Module, samples: Iterable[tuple[torch.Tensor, dict[str, torch.Tensor]]], device: 'torch.device | str'
) -> dict[str, float]:
    """Average precision of a detector by pycocotools.

    Args:
        model: A detector on `device`.
        samples: Images (C, H, W) in [0, 1] and targets with 'boxes' (n, 4) as x0 y0 x1 y1 in pixels and 'labels' (n,).
        device: Of the model.

    Returns:
        'ap' (mean over IoU 0.50 to 0.95), 'ap50', 'ap75'; -1 where there is nothing to find.

    Raises:
        ImportError: pycocotools is not installed.
        ValueError: No samples.
    """
    COCO = require('pycocotools.coco', 'det').COCO
    COCOeval = require('pycocotools.cocoeval', 'det').COCOeval
    model.eval()
    images, truths, found = [], [], []

    def entries(i: int, target: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        boxes = target['boxes'].float().cpu()
        sizes = (boxes[:, 2:] - boxes[:, :2]).tolist()
        corners = boxes[:, :2].tolist()
        return [
            {'image_id': i, 'category_id': int(label), 'bbox': [*corner, *size], 'area': size[0] * size[1]}
            for corner, size, label in zip(corners, sizes, target['labels'])
        ]

    for i, (image, target) in enumerate(samples):
        images.append({'id': i, 'height': image.shape[-2], 'width': image.shape[-1]})
        truths += [{**e, 'id': len(truths) + n + 1, 'iscrowd': 0} for n, e in enumerate(entries(i, target))]
        (prediction,) = model([image.to(device)])
        scores = prediction['scores'].tolist()
        found += [{**e, 'score': score} for e, score in zip(entries(i, prediction), scores)]
    if not images:
        raise ValueError('samples is empty')
    if not found or not truths:  # pycocotools needs both
        return dict.fromkeys(('ap', 'ap50', 'ap75'), 0.0 if truths else -1.0)
    truth = COCO()
    categories = [{'id': c} for c in sorted({e['category_id'] for e in truths})]
    truth.dataset = {'images': images, 'annotations': truths, 'categories': categories, 'info': {}}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it works
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(('ap', 'ap50', 'ap75'), map(float, evaluation.stats[:3])))

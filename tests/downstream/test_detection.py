"""torchvision's detectors on our backbones: they train, detect, and can learn drawn shapes by heart."""

import pytest
import torch
from torchvision.ops import box_iou

from hydra_vision import downstream
from hydra_vision.downstream.detection import coco_scores

SIZE = dict(min_size=96, max_size=128, out_channels=64)


def create(kind: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return downstream.detector(kind, 'test_hydra_vit', num_classes=3, **{**SIZE, **kwargs})


@pytest.mark.parametrize('kind', ['fcos', 'retinanet', 'faster_rcnn'])
def test_one_call(kind, drawn_boxes):
    model = create(kind, model_kwargs=dict(depth=1, patch_size=8 if kind == 'fcos' else 16))
    losses = model([image for image, _ in drawn_boxes[:2]], [target for _, target in drawn_boxes[:2]])
    sum(losses.values()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    model.eval()
    with torch.inference_mode():
        found = model([torch.rand(3, 70, 100)])[0]  # a size of its own
    assert set(found) == {'boxes', 'labels', 'scores'}


@pytest.mark.parametrize(
    ('kind', 'strides', 'sizes'),
    [
        ('fcos', (8, 16, 32, 64), (1,)),  # of anchors, over the stride: as torchvision's own
        ('retinanet', (8, 16, 32, 64), (4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))),
        ('faster_rcnn', (4, 8, 16, 32, 64), (8,)),
    ],
)
def test_levels_and_anchors(kind, strides, sizes):
    model = create(kind, model_kwargs=dict(depth=1)).eval()
    assert model.transform.image_mean == list(model.backbone.body.pretrained_cfg['mean'])
    assert model.transform.image_std == list(model.backbone.body.pretrained_cfg['std'])
    images, _ = model.transform([torch.rand(3, 100, 110), torch.rand(3, 300, 100)])
    assert images.image_sizes == [(96, 105), (128, 42)]  # the shorter side 96, unless the longer one passes 128
    height, width = images.tensors.shape[-2:]
    coarsest = 32 if kind == 'faster_rcnn' else 64  # its pool level may be cut off
    assert height % coarsest == width % coarsest == 0
    with torch.inference_mode():
        maps = model.backbone(images.tensors)
    assert list(maps) == ['0', '1', '2', '3', 'pool'][: len(strides)]
    assert [m.shape[-2:] for m in maps.values()] == [(height // s, width // s) for s in strides]
    generator = model.rpn.anchor_generator if kind == 'faster_rcnn' else model.anchor_generator
    anchors = generator(images, list(maps.values()))[0]
    counts = [m.shape[-2] * m.shape[-1] * n for m, n in zip(maps.values(), generator.num_anchors_per_location())]
    for level, s in zip(anchors.split(counts), strides):
        sides = ((level[:, 2] - level[:, 0]) * (level[:, 3] - level[:, 1])).sqrt()
        assert float(sides.min()) == pytest.approx(s * sizes[0], rel=0.1)
        assert float(sides.max()) == pytest.approx(s * sizes[-1], rel=0.1)
        centres = (level[:, :2] + level[:, 2:]) / 2
        for axis, side in enumerate((width, height)):
            assert centres[:, axis].round().unique().tolist() == list(range(0, side, s))
    if kind == 'faster_rcnn':
        assert model.roi_heads.box_roi_pool.featmap_names == ['0', '1', '2', '3']


@pytest.mark.slow
def test_overfits_drawn_shapes(drawn_boxes):
    model = create('fcos', model_kwargs=dict(depth=2, patch_size=8)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, targets = zip(*drawn_boxes)
    for _ in range(120):
        loss = sum(model(list(images), [dict(t) for t in targets]).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        found = model(list(images))
    for target, prediction in zip(targets, found):
        best = prediction['scores'].argsort(descending=True)[: len(target['boxes'])]
        iou = box_iou(target['boxes'], prediction['boxes'][best])
        assert iou.max(1).values.min() > 0.5, iou  # each shape is among the surest boxes, as many as there are shapes
        assert torch.equal(prediction['labels'][best][iou.argmax(1)], target['labels'])
    pytest.importorskip('pycocotools')
    assert coco_scores(model, drawn_boxes, 'cpu')['ap50'] > 0.9


def test_coco_scores(drawn_boxes):
    pytest.importorskip('pycocotools')

    class Oracle(torch.nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.shift, self.samples = shift, iter(drawn_boxes)

        def forward(self, images):
            _, target = next(self.samples)
            scores = torch.full((len(target['labels']),), 0.9)
            return [{'boxes': target['boxes'] + self.shift, 'labels': target['labels'], 'scores': scores}]

    assert coco_scores(Oracle(0), drawn_boxes, 'cpu') == {'ap': 1.0, 'ap50': 1.0, 'ap75': 1.0}

    class Silent(torch.nn.Module):
        def forward(self, images):
            return [{'boxes': torch.zeros(0, 4), 'labels': torch.zeros(0, dtype=torch.long), 'scores': torch.zeros(0)}]

    empty = [
        (image, {'boxes': torch.zeros(0, 4), 'labels': torch.zeros(0, dtype=torch.long)}) for image, _ in drawn_boxes
    ]
    assert coco_scores(Silent(), drawn_boxes, 'cpu')['ap'] == 0
    assert coco_scores(Silent(), empty, 'cpu')['ap'] == coco_scores(Oracle(0), empty, 'cpu')['ap'] == -1

    class Doubtful(Oracle):
        """Beside each box its top left quarter (IoU 0.25), surer of one of them."""

        def forward(self, images):
            _, target = next(self.samples)
            whole, labels = target['boxes'], target['labels']
            quarter = torch.cat([whole[:, :2], (whole[:, :2] + whole[:, 2:]) / 2], 1)
            scores = torch.tensor([0.9, 0.4] if self.shift else [0.4, 0.9]).repeat_interleave(len(labels))
            return [{'boxes': torch.cat([whole, quarter]), 'labels': labels.repeat(2), 'scores': scores}]

    class Corner(torch.nn.Module):
        def forward(self, images):
            return [{'boxes': torch.tensor([[50.0, 50, 70, 70]]), 'labels': torch.tensor([1]), 'scores': torch.ones(1)}]

    far = {'boxes': torch.tensor([[50.0, 50, 90, 90]]), 'labels': torch.tensor([1])}  # IoU 0.25, far from the origin
    assert coco_scores(Corner(), [(torch.zeros(3, 96, 128), far)], 'cpu')['ap50'] == 0
    assert coco_scores(Doubtful(1), drawn_boxes, 'cpu')['ap50'] == 1
    assert 0.4 < coco_scores(Doubtful(0), drawn_boxes, 'cpu')['ap50'] < 0.6
    shifted = coco_scores(Oracle(3), drawn_boxes, 'cpu')
    assert shifted['ap50'] > shifted['ap']
    with pytest.raises(ValueError, match='empty'):
        coco_scores(Oracle(0), [], 'cpu')


def test_bad_input():
    for match, call in [
        ("'fcos'", lambda: create('fcoss')),
        ('background', lambda: downstream.detector('fcos', 'test_hydra_vit', num_classes=1)),
        ('nearest valid name', lambda: downstream.detector('fcos', 'test_hydra_vti', num_classes=3)),
        ('isotropic', lambda: downstream.detector('fcos', 'resnet18', num_classes=3)),
        ('depht', lambda: create('fcos', model_kwargs=dict(depht=1))),
    ]:
        with pytest.raises(ValueError, match=match):
            call()

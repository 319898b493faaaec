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

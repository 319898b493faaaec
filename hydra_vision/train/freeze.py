"""Linear probe: only the classifier learns, the rest of the model stays as it is, also where batches pass through."""

from torch import nn

from hydra_vision.errors import ConfigError


def freeze_backbone(model: nn.Module, name: str) -> None:
    """Takes the gradient from every weight but the classifier's.

    Args:
        model: a timm classifier.
        name: what the error message calls it.

    Raises:
        ConfigError: a model without a classifier.
    """
    head = model.get_classifier() if hasattr(model, 'get_classifier') else None
    if not isinstance(head, nn.Module) or not any(True for _ in head.parameters()):
        raise ConfigError(f'model.freeze_backbone: {name} has no classifier that could learn alone')
    model.requires_grad_(False)
    head.requires_grad_(True)


def frozen_parts_to_eval(model: nn.Module) -> None:
    """Puts what is frozen into evaluation mode: no dropout or stochastic depth, no new statistics of batch norms.

    To be called after every `train()`.
    """
    learning = {module for module in model.modules() if any(p.requires_grad for p in module.parameters())}
    for module in model.modules():
        if module not in learning:
            module.training = False

"""Trains a Hydra-ViT, or any timm model, on images: `python train_imagenet.py --help`.

Without arguments it trains on handwritten digits that come with scikit-learn; with `--data-dir PATH` it runs the
ImageNet-1K recipe of Hydra-ViT-B. The same command is `hydra-vision train`.
"""

import sys

from hydra_vision.cli import guarded
from hydra_vision.train.main import main

if __name__ == '__main__':
    sys.exit(guarded(main, lambda: 'train_imagenet.py'))

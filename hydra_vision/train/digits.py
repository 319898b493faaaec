"""The built-in demonstration set: scikit-learn's handwritten digits, real images that come with the package."""

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

_SPLIT_SEED = 0
_TEST_SHARE = 0.2


class Digits(Dataset):
    """1,797 grey images of 8x8 pixels, ten classes, split 80/20 by a fixed seed with equal class shares.

    The images were written by 43 people (UCI "Optical Recognition of Handwritten Digits", its test part).

    Args:
        train: the training part (1,437 images) or the held-out part (360).
    """

    def __init__(self, train: bool):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = (digits.images * (255 / 16)).round().astype(np.uint8)  # stored as 0..16
        parts = train_test_split(
            np.arange(len(images)), test_size=_TEST_SHARE, random_state=_SPLIT_SEED, stratify=digits.target
        )
        self.indices = np.sort(parts[0] if train else parts[1])
        self.images, self.targets = images[self.indices], digits.target[self.indices]
        self.classes = [str(name) for name in digits.target_names]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.targets[index])

"""Features for downstream work: images in, a file of features with a line for every image out."""

from ..errors import FeatureError
from .backbone import Backbone, load_backbone
from .extraction import extract
from .files import Features, load_features
from .pooling import POOLS, image_features
from .sources import Images, open_images

__all__ = [
    'POOLS',
    'Backbone',
    'FeatureError',
    'Features',
    'Images',
    'extract',
    'image_features',
    'load_backbone',
    'load_features',
    'open_images',
]

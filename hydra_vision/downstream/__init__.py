"""Taking the backbones to other libraries."""

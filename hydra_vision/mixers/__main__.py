"""`python -m hydra_vision.mixers`: which patterns of the Comprehensive Attention Benchmark each mixer supports."""

from ..console import markdown_table
from .registry import pattern_table

if __name__ == '__main__':
    header, *rows = pattern_table()
    print(markdown_table(header, rows))

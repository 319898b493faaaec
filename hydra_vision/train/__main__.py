"""`python -m hydra_vision.train` is `hydra-vision train`."""

import sys

from .main import main

if __name__ == '__main__':
    sys.exit(main(prog='python -m hydra_vision.train'))

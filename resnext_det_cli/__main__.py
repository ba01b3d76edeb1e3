"""`python -m resnext_det_cli` is `resnext-det`."""

import sys

from resnext_det_cli import main

if __name__ == "__main__":
    sys.exit(main())

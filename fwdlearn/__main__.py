"""`python -m fwdlearn` is the same program as `fwdlearn`."""

import sys

from fwdlearn.cli import main

if __name__ == "__main__":
    sys.exit(main())

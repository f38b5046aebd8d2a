"""`python -m deltakit`: the command line."""

import sys

from deltakit.cli import main

if __name__ == "__main__":
    sys.exit(main())

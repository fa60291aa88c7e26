"""`python -m sparing` is `sparing`."""

import sys

from sparing.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

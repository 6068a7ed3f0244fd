"""``python -m asyncpool_creds``: the same as the command ``asyncpool-creds``."""

import sys

from asyncpool_creds.cli import main

if __name__ == "__main__":
    sys.exit(main())

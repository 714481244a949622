"""`python -m libclient.cli` is `gpuorch`."""

import sys

from libclient.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""Resolve every extra anew in a bare environment and write exact versions to the lock file.

The lock is a constraints file: it pins versions and installs nothing by itself, so that the demo
takes only what the daemon needs and the tests take everything from the same pins. It names versions
and not hashes: an index may serve builds of its own, and the lock names no index.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HEADER = """\
# Exact versions of all that gpuorchd's extras bring in. Made by `make lock`; not edited by hand.
"""


def main() -> None:
    """Write the lock file named on the command line."""
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder, "bin", "python"))
        pip = [python, "-m", "pip", "--no-input", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "-qq", "--upgrade", "pip", "setuptools"], check=True)
        subprocess.run([*pip, "install", "-qq", ".[dev]"], check=True)
        listed = subprocess.run(
            [*pip, "list", "--format=freeze", "--exclude=gpuorchd"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    target.write_text(HEADER + listed)
    print(f"{target}: {len(listed.splitlines())} versions pinned")


if __name__ == "__main__":
    main()

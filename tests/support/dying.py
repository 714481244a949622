"""A daemon that dies at a moment that no signal from outside can hit.

`environ` makes Python read a file of ours as it starts, which waits for the test to name a moment:
`at("settings written")` kills the daemon once the settings file is in place and nobody knows yet,
`at("start")` has its start fail after it has taken over what was kept. Each happens once.
"""

from __future__ import annotations

from pathlib import Path

_SITE = """
import gc, os, signal
FOLDER = os.path.dirname(__file__)
def due(moment):
    try:
        os.unlink(os.path.join(FOLDER, moment))
    except FileNotFoundError:
        return False
    return True
replace, freeze = os.replace, gc.freeze
def replace_and_die(source, target, **options):
    replace(source, target, **options)
    if os.fspath(target).endswith("settings.json") and due("settings written"):
        os.kill(os.getpid(), signal.SIGKILL)
def fail_or_freeze():
    if due("start"):
        raise RuntimeError("a start that fails on purpose")
    freeze()
os.replace, gc.freeze = replace_and_die, fail_or_freeze
"""


class Dying:
    """Owns a folder. Nothing happens before a moment is named."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(_SITE)
        self.environ = {"PYTHONPATH": str(folder)}

    def at(self, moment: str) -> None:
        """Let the daemon die at the next such moment."""
        (self._folder / moment).touch()

    def has_come(self, moment: str) -> bool:
        """Whether that moment has come since."""
        return not (self._folder / moment).exists()

"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.sources import ROOT, python_files, tree_of

FOLDERS = ("gpuorchd", "libclient", "tests", ".ci")
FILES = python_files(*FOLDERS)
# A file is read in one sitting, a function on one screen.
FILE_LINES = 400
FUNCTION_LINES = 60
# Names that say nothing of what is inside.
EMPTY_NAMES = re.compile(r"(^|_)(utils?|helpers?|misc|common|stuff)(_|$)", re.IGNORECASE)
EMPTY_CLASSES = re.compile(r"(Manager|Helper|Utils?)$")
# The project speaks of itself alone: nobody who reads it has these.
FOREIGN = re.compile(r"/work/|/farm/|\bshared/(models|users|facts|protocol)\.md|\bissue #?\d", re.I)
SUPPRESSION = re.compile(
    r"#\s*(type:\s*ignore|noqa)(?P<code>\[[\w,\s-]+\]|:\s*[A-Z]+\d+)?(?P<rest>.*)"
)

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


@each_file
def test_a_file_fits_one_sitting(path: Path) -> None:
    count = len(path.read_text().splitlines())
    assert count < FILE_LINES, f"{count} lines, under {FILE_LINES} allowed"


@each_file
def test_a_function_fits_one_screen(path: Path) -> None:
    long = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            count = node.end_lineno - node.lineno + 1
            if count >= FUNCTION_LINES:
                long.append(f"{node.name} at line {node.lineno}: {count} lines")
    assert not long, f"under {FUNCTION_LINES} lines allowed: {long}"


@each_file
def test_a_file_says_what_it_owns(path: Path) -> None:
    if path.name == "__init__.py" and not path.read_text():
        return
    assert ast.get_docstring(tree_of(path)), "opens without saying what it is for"


@each_file
def test_names_say_what_is_inside(path: Path) -> None:
    assert not EMPTY_NAMES.search(path.stem), f"{path.stem} names nothing"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ClassDef):
            assert not EMPTY_CLASSES.search(node.name), f"{node.name} names nothing"


@each_file
def test_a_suppressed_warning_has_its_code_and_its_reason(path: Path) -> None:
    bare = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = SUPPRESSION.search(line)
        if found is None or line.lstrip().startswith(("SUPPRESSION", '"', "'")):
            continue
        if not found["code"] or not re.match(r"\s*#\s*\w+", found["rest"]):
            bare.append(f"line {number}: {line.strip()}")
    assert not bare, "needs a code and, after another #, a reason: " + "; ".join(bare)


@each_file
def test_catching_everything_is_explained(path: Path) -> None:
    lines = path.read_text().splitlines()
    silent = []
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.ExceptHandler) or not _swallows_everything(node):
            continue
        around = lines[node.lineno - 2 : node.lineno + 2]
        if not any("#" in line for line in around):
            silent.append(f"line {node.lineno}")
    assert not silent, f"says not why: {silent}"


def test_the_project_speaks_of_itself_alone() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        names = [str(path.relative_to(ROOT)) for path in FILES]
    else:
        names = [name for name in listed.stdout.split("\0") if name]
    foreign = []
    for name in names:
        path = ROOT / name
        if not path.is_file() or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if FOREIGN.search(line):
                foreign.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not foreign, "\n".join(foreign)


def _swallows_everything(handler: ast.ExceptHandler) -> bool:
    """Whether a bug could end in this handler: one that cleans up and raises again hides none."""
    last = handler.body[-1]
    if isinstance(last, ast.Raise) and last.exc is None:
        return False
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        kind is None or (isinstance(kind, ast.Name) and kind.id in {"Exception", "BaseException"})
        for kind in kinds
    )

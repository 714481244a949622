"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.sources import ROOT, python_files, tree_of

FOLDERS = ("gpuorchd", "libclient", "deploy", "tests", ".ci")
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


def test_a_file_fits_one_sitting() -> None:
    counts = {_shown(path): len(path.read_text().splitlines()) for path in FILES}
    long = {name: count for name, count in counts.items() if count >= FILE_LINES}
    assert not long, f"under {FILE_LINES} lines allowed"


def test_a_function_fits_one_screen() -> None:
    long = {}
    for path, node in _nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        assert node.end_lineno is not None
        count = node.end_lineno - node.lineno + 1
        if count >= FUNCTION_LINES:
            long[f"{_shown(path)}:{node.lineno} {node.name}"] = count
    assert not long, f"under {FUNCTION_LINES} lines allowed"


def test_a_file_says_what_it_owns() -> None:
    # An empty `__init__.py` has nothing to say.
    silent = [
        _shown(path) for path in FILES if path.read_text() and not ast.get_docstring(tree_of(path))
    ]
    assert not silent, "opens without saying what it is for"


def test_names_say_what_is_inside() -> None:
    empty = [_shown(path) for path in FILES if EMPTY_NAMES.search(path.stem)]
    for path, node in _nodes(ast.ClassDef):
        assert isinstance(node, ast.ClassDef)
        if EMPTY_CLASSES.search(node.name):
            empty.append(f"{_shown(path)}:{node.lineno} {node.name}")
    assert not empty, "names nothing"


def test_a_suppressed_warning_has_its_code_and_its_reason() -> None:
    bare = []
    for path in FILES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = SUPPRESSION.search(line)
            if found is None or line.lstrip().startswith(("SUPPRESSION", '"', "'")):
                continue
            if not found["code"] or not re.match(r"\s*#\s*\w+", found["rest"]):
                bare.append(f"{_shown(path)}:{number} {line.strip()}")
    assert not bare, "needs a code and, after another #, a reason"


def test_catching_everything_is_explained() -> None:
    silent = []
    for path, node in _nodes(ast.ExceptHandler):
        assert isinstance(node, ast.ExceptHandler)
        around = path.read_text().splitlines()[node.lineno - 2 : node.lineno + 2]
        if _swallows_everything(node) and not any("#" in line for line in around):
            silent.append(f"{_shown(path)}:{node.lineno}")
    assert not silent, "says not why"


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


def _nodes(*kinds: type[ast.AST]) -> Iterator[tuple[Path, ast.AST]]:
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, kinds):
                yield path, node


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


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

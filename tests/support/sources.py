"""The project's own source files as the tests of the house read them."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What a checkout holds beside its sources.
NOT_OURS = {".venv", ".git", "build", "dist"}


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module: where, what, on which line. `from a import b` counts as `a`."""

    module: str
    imported: str
    path: str
    line: int


@cache
def python_files(*folders: str) -> tuple[Path, ...]:
    """Every Python file below these folders of the checkout, in order."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return tuple(sorted(path for path in found if not NOT_OURS & set(path.parts)))


@cache
def tree_of(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(), str(path))


def module_name(path: Path) -> str:
    """The dotted name of a file of the checkout."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


@cache
def imports(*folders: str) -> tuple[Import, ...]:
    """Every import below these folders, inside functions and for type checkers too."""
    found = []
    for path in python_files(*folders):
        module, shown = module_name(path), str(path.relative_to(ROOT))
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None, f"{shown}:{node.lineno}: relative import"
                names = _imported_by(node.module, node.names)
            else:
                continue
            found += [Import(module, name, shown, node.lineno) for name in names]
    return tuple(found)


def _imported_by(package: str, names: list[ast.alias]) -> list[str]:
    """`from package import module` names the module, `from module import value` the module."""
    found = []
    for alias in names:
        inner = ROOT / (package + "." + alias.name).replace(".", "/")
        is_module = inner.with_suffix(".py").exists() or (inner / "__init__.py").exists()
        found.append(f"{package}.{alias.name}" if is_module else package)
    return found

"""What an agent pays for the import, seen from a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

import libclient
from tests.support.sources import ROOT


def run(code: str) -> str:
    """Run code in an interpreter of its own, where warnings are errors; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_client_loads_next_to_nothing() -> None:
    loaded = run(
        "import sys; import libclient; print(*sorted(n for n in sys.modules if 'libclient' in n))"
        "; assert not {'msgpack', 'socket', 'asyncio', 'threading'} & set(sys.modules)"
    )
    assert set(loaded.split()) == {"libclient", "libclient.version"}


def test_the_blocking_client_loads_msgpack_and_the_standard_library_alone() -> None:
    third = run(
        "import sys; import libclient; libclient.lease; libclient.env; libclient.sizes;"
        "own = {'libclient', 'msgpack', '__main__', 'cython_runtime'};"
        "found = {n.split('.')[0] for n in sys.modules} - own - set(sys.stdlib_module_names);"
        "print(*sorted(n for n in found if not n.startswith('_')))"
    )
    assert third.split() == []


def test_the_blocking_client_loads_no_event_loop() -> None:
    run("import sys; import libclient; libclient.lease; assert 'asyncio' not in sys.modules")


def test_every_public_name_is_there() -> None:
    for name in libclient.__all__:
        assert getattr(libclient, name) is not None
        assert name in dir(libclient)


def test_a_name_that_is_not_there_says_so() -> None:
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        libclient.nothing_of_the_kind  # type: ignore[attr-defined]  # noqa: B018 - asked for


def test_a_slow_codec_is_warned_of_once() -> None:
    said = run(
        "import sys, warnings, msgpack.fallback as slow, msgpack;"
        "msgpack.Packer = slow.Packer;"
        "warnings.simplefilter('always');\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import libclient.codec, libclient.session\n"
        "print(len(seen), seen[0].message)"
    )
    assert said.startswith("1 msgpack runs without its C extension")

"""The env file: systemd's syntax means the same here, and what it passes over is refused here."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuorchd.config import ConfigError
from gpuorchd.config_reading import Inputs
from gpuorchd.host.env_file import FILE_BYTES_MAX, EnvFileError, parse_env_file, read_env_file

# A text and what `systemctl show -p Environment` makes of it where EnvironmentFile= names it.
SAME_AS_SYSTEMD = [
    ("A=b", {"A": "b"}),
    ("A=b\nC=d\n", {"A": "b", "C": "d"}),
    ("  A  =  b  \n", {"A": "b"}),
    ("A=\nB=  \n", {"A": "", "B": ""}),
    ("\n \t\n# note\n; note\n  # note\nA=b\n", {"A": "b"}),
    ("A=b # not a note\n", {"A": "b # not a note"}),
    ("A=b;c\n", {"A": "b;c"}),
    ("A='b  c '\n", {"A": "b  c "}),
    ('A="b  c "\n', {"A": "b  c "}),
    ("A='b' \"c\" 'd'\n", {"A": "bcd"}),
    ("A='b'c\n", {"A": "bc"}),
    ("A=b'c'\n", {"A": "b'c'"}),
    ('A=b "c"\n', {"A": 'b "c"'}),
    ("A='$B `c` \\n'\n", {"A": "$B `c` \\n"}),
    ('A="\\$B \\`c\\` \\" \\\\ \\n"\n', {"A": '$B `c` " \\ \\n'}),
    ("A=$B${C}\n", {"A": "$B${C}"}),
    ("A=b\\\nc\n", {"A": "bc"}),
    ("A=\\\nb\n", {"A": "b"}),
    ('A="b\\\nc"\n', {"A": "bc"}),
    ("A='b\nc'\n", {"A": "b\nc"}),
    ("A=b\\ \n", {"A": "b "}),
    ("A=b\\c\\'\n", {"A": "bc'"}),
    ("A=b=c\n", {"A": "b=c"}),
    ("A=b\nA=c\n", {"A": "c"}),
    ("A=gr\u00fc\u00dfe\n", {"A": "gr\u00fc\u00dfe"}),
    ("", {}),
]

REFUSED = [
    ("A=b\nSAFE_MODE\n", 2, "'SAFE_MODE' has no ="),
    ("A=b\n\n=c\n", 3, "name ''"),
    ("export A=b\n", 1, "leave `export` out"),
    ("1A=b\n", 1, "name '1A'"),
    ("A-B=c\n", 1, "name 'A-B'"),
    ("A='b\nC=d\n", 1, "the ' in the value of A is never closed"),
    ('A=b\nC="d', 2, 'the " in the value of C is never closed'),
    ('A="b\\', 1, "never closed"),
    ("A=b\\", 1, "ends in a backslash"),
    ("# note \\\nA=b\n", 1, "comment ends in a backslash"),
    ("A=b\r\nC=d\r\n", 1, "carriage return"),
    ("A=b\0c\n", 1, "NUL"),
]


@pytest.mark.parametrize(("text", "variables"), SAME_AS_SYSTEMD)
def test_what_is_accepted_means_what_systemd_takes_it_for(
    text: str, variables: dict[str, str]
) -> None:
    assert parse_env_file("/f", text.encode()).variables == variables


@pytest.mark.parametrize(("text", "line", "said"), REFUSED)
def test_what_cannot_be_is_refused_with_its_line(text: str, line: int, said: str) -> None:
    with pytest.raises(EnvFileError) as refused:
        parse_env_file("/etc/x.env", text.encode())
    assert refused.value.line == line
    assert str(refused.value).startswith(f"/etc/x.env:{line}: ")
    assert said in str(refused.value)


def test_what_is_not_text_is_refused_with_its_line() -> None:
    with pytest.raises(EnvFileError, match=r"^/f:2: is not UTF-8"):
        parse_env_file("/f", b"A=b\nC=\xff\n")


@given(
    st.dictionaries(
        st.from_regex(r"\A[A-Z_][A-Z0-9_]{0,8}\Z"),
        st.text(st.characters(exclude_characters="'\r\0", exclude_categories=["Cs"])),
        max_size=5,
    )
)
def test_every_value_can_be_written_in_single_quotes(variables: dict[str, str]) -> None:
    text = "".join(f"{name}='{value}'\n" for name, value in variables.items())
    assert parse_env_file("/f", text.encode()).variables == variables


@given(st.text("A=\\'\"# \n$b1", max_size=40))
def test_any_content_is_read_or_refused_with_a_line(text: str) -> None:
    try:
        parsed = parse_env_file("/f", text.encode())
    except EnvFileError as refused:
        line = refused.line or 0
    else:
        line = max(parsed.lines.values(), default=1)
    assert 1 <= line <= text.count("\n") + 1


def test_a_variable_that_is_set_twice_is_warned_of() -> None:
    (warning,) = parse_env_file("/f", b"A=b\n\nA=c\n").warnings
    assert warning == "/f:3: A is set again; line 1 has no effect"


def test_a_file_that_is_missing_is_refused_unless_it_may_be(tmp_path: Path) -> None:
    path = tmp_path / "x.env"
    with pytest.raises(EnvFileError, match="there is no such file"):
        read_env_file(str(path))
    assert read_env_file(f"-{path}").variables == {}
    with pytest.raises(EnvFileError, match="absolute"):
        read_env_file("x.env")


def test_only_a_regular_file_of_a_sensible_size_is_read(tmp_path: Path) -> None:
    with pytest.raises(EnvFileError, match="not a regular file"):
        read_env_file(str(tmp_path))
    with pytest.raises(EnvFileError, match="not a regular file"):
        read_env_file("/dev/zero")
    path = tmp_path / "x.env"
    path.write_bytes(b"#" * (FILE_BYTES_MAX + 1))
    with pytest.raises(EnvFileError, match=str(FILE_BYTES_MAX)):
        read_env_file(str(path))


@pytest.mark.parametrize(
    ("mode", "said"), [(0o644, "read by everyone"), (0o660, "changed by others"), (0o640, None)]
)
def test_a_file_that_others_reach_is_warned_of(tmp_path: Path, mode: int, said: str | None) -> None:
    path = tmp_path / "x.env"
    path.write_text("A=b\n")
    path.chmod(mode)
    warnings = read_env_file(str(path)).warnings
    assert [said in warning for warning in warnings if said] == ([True] if said else [])
    assert bool(warnings) == (said is not None)


class Files:
    """An env file of a test."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def inputs(self, text: str, *, flags: dict[str, str] | None = None, **environ: str) -> Inputs:
        self.path.write_text(text)
        self.path.chmod(0o640)
        return Inputs(flags or {}, environ, str(self.path))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "x.env")


def test_a_flag_goes_before_the_file_the_file_before_the_environment(files: Files) -> None:
    text = "GPUORCH_MAX_LEASES=11\nGPUORCH_MAX_WAITING=12\n"
    read = files.inputs(
        text,
        flags={"max_leases": "1"},
        GPUORCH_MAX_LEASES="21",
        GPUORCH_MAX_WAITING="22",
        GPUORCH_MAX_HOLDERS="23",
    ).read()
    config = read.config
    assert (config.max_leases, config.max_waiting, config.max_holders) == (1, 12, 23)
    assert read.sources["max_leases"] == "--max-leases"
    assert read.sources["max_waiting"] == f"GPUORCH_MAX_WAITING ({files.path}:2)"
    assert read.sources["max_holders"] == "GPUORCH_MAX_HOLDERS"


def test_what_the_file_sets_to_nothing_is_unset_whatever_the_environment_says(
    files: Files,
) -> None:
    assert files.inputs("SAFE_MODE=\n", SAFE_MODE="true").read().config.safe_mode is None


def test_a_value_of_the_file_that_cannot_be_is_refused_with_its_place(files: Files) -> None:
    inputs = files.inputs("\nSAFE_MODE=maybe\n")
    with pytest.raises(ConfigError) as refused:
        inputs.read()
    assert str(refused.value).startswith(f"SAFE_MODE ({files.path}:2) is 'maybe'; allowed: true")


def test_a_name_of_the_file_that_is_none_of_ours_is_warned_of(files: Files) -> None:
    (warning,) = files.inputs("SAFE_MODEL=true\nGPUORCH_AGENT=me\n").read().warnings
    assert warning.startswith(f"SAFE_MODEL ({files.path}:1) is not a variable of this program")
    assert "did you mean SAFE_MODE?" in warning


def test_the_file_does_not_speak_for_the_service_manager(files: Files) -> None:
    read = files.inputs("STATE_DIRECTORY=/elsewhere\n", STATE_DIRECTORY="/managed").read()
    assert read.config.state_dir == Path("/managed")

"""Every setting: what it takes, what it refuses, and in which words."""

from __future__ import annotations

import dataclasses
import json
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from gpuorchd.command_line import read_command_line
from gpuorchd.config import TABLE, Config, ConfigError, Setting
from gpuorchd.config_reading import effective, read_config
from gpuorchd.host.kinds import FLAG, LogFormat, LogLevel, SimulatedCards
from gpuorchd.server.services import Options
from libclient.ports import daemon_port
from libclient.version import VERSION

# One good text of each kind's metavar, and what it becomes where that is not the text itself.
GOOD = {
    "BOOL": "yes",
    "PATH": "/somewhere",
    "MODE": "0600",
    "GROUP": "0",
    "COUNTxMIB": "2x81920",
    "SECONDS": "2.5",
    "N": "65535",
    "WORD": None,
}

BAD = [
    ("GPUORCH_SOCKET", "relative/path", "an absolute path"),
    ("GPUORCH_SOCKET_MODE", "0990", "an octal mode"),
    ("GPUORCH_SOCKET_MODE", "0060", "lets the owner read and write"),
    ("GPUORCH_SOCKET_MODE", "7777", "0777"),
    ("GPUORCH_SOCKET_GROUP", "no such group here", "a group of this host"),
    ("GPUORCH_ADMIN_GROUP", "4294967295", "a group of this host"),
    ("GPUORCH_STATE_DIR", "state", "an absolute path"),
    ("GPUORCH_DESCRIPTOR_STORE", "-1", "a whole number from 0"),
    ("GPUORCH_REATTACH_GRACE_S", "soon", "seconds"),
    ("SAFE_MODE", "maybe", "true or false"),
    ("SAFE_MODE", "2", "true or false"),
    ("ENABLE_NVML", "auto", "true or false"),
    ("ENABLE_MPS", "-", "true or false"),
    ("CUDA_MPS_PIPE_DIRECTORY", "mps", "an absolute path"),
    ("GPUORCH_SIMULATE", "24576", "COUNTxMIB"),
    ("GPUORCH_SIMULATE", "0x24576", "1 to 64 cards"),
    ("GPUORCH_SIMULATE", "65x1", "1 to 64 cards"),
    ("GPUORCH_SIMULATE", "1x0", "of 1 to 16777216 MiB"),
    ("GPUORCH_SIMULATE", "1x16777217", "of 1 to 16777216 MiB"),
    ("GPUORCH_SIMULATE_DRAIN_S", "-1", "seconds from 0 to 3600"),
    ("GPUORCH_SIMULATE_DRAIN_S", "nan", "seconds from 0"),
    ("GPUORCH_SIMULATE_DRAIN_S", "1e3", "seconds from 0"),
    ("GPU_ORCHESTRATOR_PORT", "http", "a whole number from 0 to 65535 (0: no HTTP)"),
    ("GPU_ORCHESTRATOR_PORT", "65536", "a whole number from 0 to 65535"),
    ("GPU_ORCHESTRATOR_PORT", "8_014", "a whole number"),
    ("GPU_ORCHESTRATOR_PORT", "٨٠١٤", "a whole number"),
    ("GPU_ORCHESTRATOR_PORT", "80.5", "a whole number"),
    ("GPU_ORCHESTRATOR_LEASE_TTL", "forever", "seconds from 0"),
    ("GPU_ORCHESTRATOR_LEASE_TTL", "inf", "seconds from 0"),
    ("GPU_ORCHESTRATOR_POLICY_TTL", "-30", "seconds from 0"),
    ("GPUORCH_MAX_CONNECTIONS", "0", "a whole number from 1"),
    ("GPUORCH_MAX_HOLDERS", "1000001", "a whole number from 1 to 1000000"),
    ("GPUORCH_MAX_UNSENT_BYTES", "1000", "a whole number from 65536 to 1099511627776"),
    ("GPUORCH_SAMPLE_PERIOD_S", "0", "seconds from 0.05"),
    ("GPUORCH_READING_MAX_AGE_S", "1", "more seconds than GPUORCH_SAMPLE_PERIOD_S, which is 1"),
    ("GPUORCH_NVML_DEADLINE_S", "soon", "seconds from 0.1"),
    ("GPUORCH_LOG_LEVEL", "loud", "one of debug, info, warning, error"),
    ("GPUORCH_LOG_FORMAT", "xml", "one of auto, console, json, journal"),
]


def good_text(metavar: str, allowed: str) -> str:
    if "from 65536" in allowed:
        return "65536"
    return GOOD[metavar] or allowed.removeprefix("one of ").split(", ")[-1]


@pytest.mark.parametrize(("variable", "text", "allowed"), BAD)
def test_a_bad_variable_is_refused_with_its_name_value_and_what_is_allowed(
    variable: str, text: str, allowed: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        read_config({}, {variable: text})
    assert str(refused.value).startswith(f"{variable} is {text!r}; allowed: ")
    assert allowed in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("variable", "text", "allowed"), BAD)
def test_a_bad_flag_is_refused_under_the_name_of_the_flag(
    variable: str, text: str, allowed: str
) -> None:
    (row,) = (row for row in TABLE if row.variable == variable)
    flags = read_command_line([f"{row.flag}={text}"], "0").flags
    with pytest.raises(ConfigError) as refused:
        read_config(flags, {variable: good_text(row.kind.metavar, row.kind.allowed)})
    assert str(refused.value).startswith(f"{row.flag} is {text!r}; allowed: ")


def test_every_kind_of_value_refuses_something() -> None:
    refused = {variable for variable, _, _ in BAD}
    proven = [row.kind.parse for row in TABLE if row.variable in refused]
    for row in TABLE:
        # Bounds share one kind; the rest have one each, or share it with a setting listed above.
        assert row.kind.parse in proven, row.variable


@pytest.mark.parametrize("setting", TABLE, ids=[row.name for row in TABLE])
def test_a_flag_goes_before_the_environment_and_that_before_the_default(setting: Setting) -> None:
    unset = read_config({}, {})
    assert setting.name not in unset.sources
    if setting.name != "state_dir":
        assert getattr(unset.config, setting.name) == setting.default

    # Long enough for the age of a reading, which has to be above the sampling period.
    text = good_text(setting.kind.metavar, setting.kind.allowed)
    others = {"GPUORCH_READING_MAX_AGE_S": "9", "GPUORCH_SAMPLE_PERIOD_S": "1"}
    environ = others | {setting.variable: text}
    from_env = read_config({}, environ)
    assert getattr(from_env.config, setting.name) == setting.kind.parse(text)
    assert from_env.sources[setting.name] == setting.variable

    environ[setting.variable] = "this text is refused: a flag has to win before it is read"
    from_flag = read_config(read_command_line([setting.flag, text], "0").flags, environ)
    assert getattr(from_flag.config, setting.name) == setting.kind.parse(text)
    assert from_flag.sources[setting.name] == setting.flag


@pytest.mark.parametrize("setting", TABLE, ids=[row.name for row in TABLE])
def test_a_default_reads_back_from_the_text_that_shows_it(setting: Setting) -> None:
    if setting.default is not None:
        assert setting.kind.parse(setting.shown_default) == setting.default


def test_a_variable_set_to_nothing_counts_as_unset() -> None:
    read = read_config({}, {"SAFE_MODE": "", "GPU_ORCHESTRATOR_PORT": "  "})
    assert read.config.safe_mode is None
    assert read.config.http_port == daemon_port()
    assert not read.sources


@pytest.mark.parametrize("word", ["1", "true", "TRUE", "Yes", "on", " true "])
def test_words_for_true(word: str) -> None:
    assert read_config({}, {"SAFE_MODE": word}).config.safe_mode is True


@pytest.mark.parametrize("word", ["0", "false", "False", "NO", "off"])
def test_words_for_false(word: str) -> None:
    assert read_config({}, {"SAFE_MODE": word}).config.safe_mode is False


def test_a_boolean_flag_without_a_word_is_true() -> None:
    booleans = [row for row in TABLE if row.kind is FLAG]
    flags = read_command_line([row.flag for row in booleans], "0").flags
    config = read_config(flags, {}).config
    assert [getattr(config, row.name) for row in booleans] == [True] * len(booleans)


def test_values_have_their_types() -> None:
    config = read_config(
        {},
        {
            "GPUORCH_SIMULATE": "2X81920",
            "GPUORCH_SOCKET_MODE": "660",
            "GPUORCH_LOG_LEVEL": "WARNING",
            "GPUORCH_LOG_FORMAT": "json",
            "GPU_ORCHESTRATOR_LEASE_TTL": "1.5",
            "GPUORCH_SOCKET_GROUP": "root",
        },
    ).config
    assert config.simulate == SimulatedCards(2, 81920)
    assert config.socket_mode == 0o660
    assert config.log_level is LogLevel.WARNING
    assert config.log_format is LogFormat.JSON
    assert config.ttl_ns == 1_500_000_000
    assert config.socket_group == 0


def test_the_bounds_of_the_core_come_from_the_configuration() -> None:
    bounds = [row for row in TABLE if row.name.startswith("max_") and "bytes" not in row.name]
    environ = {row.variable: str(100 + number) for number, row in enumerate(bounds)}
    config = read_config({}, environ).config
    assert set(config.limits) <= {100 + number for number in range(len(bounds))}
    assert len(set(config.limits)) == len(config.limits)
    assert config.limits.holders_per_uid == config.max_holders_per_uid


def test_the_state_folder_of_the_service_manager_goes_before_the_flag() -> None:
    flags = {"state_dir": "/flag"}
    environ = {"STATE_DIRECTORY": "/managed:/second", "GPUORCH_STATE_DIR": "/variable"}
    read = read_config(flags, environ)
    assert read.config.state_dir == Path("/managed")
    assert read.sources["state_dir"] == "STATE_DIRECTORY"
    del environ["STATE_DIRECTORY"]
    assert read_config(flags, environ).config.state_dir == Path("/flag")
    assert read_config({}, environ).config.state_dir == Path("/variable")


def test_without_a_state_folder_it_is_that_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    own = Path("/home/someone/.local/state/gpuorchd")
    assert read_config({}, {"XDG_STATE_HOME": "/xdg"}).config.state_dir == Path("/xdg/gpuorchd")
    assert read_config({}, {"XDG_STATE_HOME": "not/absolute"}).config.state_dir == own
    assert read_config({}, {}).config.state_dir == own


def test_without_a_home_the_state_folder_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_uid: int) -> None:
        raise KeyError("of the test")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(ConfigError, match="--state-dir") as refused:
        read_config({}, {})
    assert str(refused.value).count("\n") == 0
    assert read_config({"state_dir": "/s"}, {}).config.state_dir == Path("/s")


def test_a_misspelt_variable_is_warned_of_with_the_nearest_name() -> None:
    (warning,) = read_config({}, {"GPUORCH_SOKET": "/x", "PATH": "/bin"}).warnings
    assert "GPUORCH_SOKET" in warning
    assert "did you mean GPUORCH_SOCKET?" in warning


def test_a_strange_variable_is_warned_of_without_a_guess() -> None:
    (warning,) = read_config({}, {"GPUORCH_ZZZZZZZZZZZZZZZZZZZZ": "1"}).warnings
    assert "did you mean" not in warning


def test_a_bound_that_another_bound_hides_is_warned_of() -> None:
    (warning,) = read_config({}, {"GPUORCH_MAX_HOLDERS": "10000"}).warnings
    assert "GPUORCH_MAX_HOLDERS (10000)" in warning
    assert "GPUORCH_MAX_CONNECTIONS (4096)" in warning


def test_the_configuration_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.http_port = 1  # type: ignore[misc]  # that it cannot be is what is tested


def test_the_effective_configuration_is_json_with_every_setting() -> None:
    shown = json.loads(json.dumps(effective(read_config({}, {"SAFE_MODE": "on"}).config)))
    assert list(shown) == [row.name for row in TABLE]
    assert shown["safe_mode"] is True
    assert shown["simulate"] is None
    assert shown["socket_mode"] == "0660"
    assert shown["http_port"] == daemon_port()


def test_bounds_of_the_server_are_the_same_by_default_wherever_they_are_read() -> None:
    config, options = Config(), Options(version="")
    assert config.max_connections == options.connections
    assert config.max_connections_per_uid == options.connections_per_uid
    assert config.max_subscriptions_per_connection == options.subscriptions_per_connection
    assert config.max_unsent_bytes_per_connection == options.unsent_bytes_per_connection
    assert config.max_unsent_bytes == options.unsent_bytes


def run(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpuorchd", *argv],
        env={"HOME": "/nonexistent", **environ},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_check_config_prints_what_is_in_force_and_starts_nothing() -> None:
    done = run("--check-config", "--http-port", "0", GPUORCH_SOKET="/x")
    assert done.returncode == 0
    assert json.loads(done.stdout)["http_port"] == 0
    assert "GPUORCH_SOKET" in done.stderr


def test_the_version_is_that_of_the_distribution() -> None:
    assert run("--version").stdout == f"gpuorchd {VERSION}\n"


def test_a_bad_value_ends_the_command_with_one_line_and_code_2() -> None:
    done = run(GPU_ORCHESTRATOR_PORT="80x")
    assert done.returncode == 2
    assert done.stderr == (
        "gpuorchd: GPU_ORCHESTRATOR_PORT is '80x'; "
        "allowed: a whole number from 0 to 65535 (0: no HTTP)\n"
    )


def test_an_unknown_flag_ends_the_command_with_one_line_and_code_2() -> None:
    done = run("--sockt", "/x")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--sockt" in done.stderr


def test_help_names_every_flag_variable_and_default() -> None:
    done = run("--help", COLUMNS="500")
    assert done.returncode == 0
    for row in TABLE:
        assert f" {row.flag} " in done.stdout
        assert row.variable in done.stdout
        assert row.shown_default in done.stdout
    assert "--simulate 2x81920" in done.stdout

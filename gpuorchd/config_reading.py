"""Reading the configuration: flags, env file and environment against the table of settings.

A flag goes before the env file, the env file before the environment of the process, and that before
the default. The file goes before the environment because it would under `EnvironmentFile=` of a
unit, and because an edit that a reload is told of must not be hidden by a variable that the process
was once started with. What is set to nothing counts as unset, and hides what it goes before.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from gpuorchd.config import TABLE, Config, ConfigError
from gpuorchd.host.env_file import EnvFile, read_env_file
from gpuorchd.host.kinds import MODE, PATH, Kind

T = TypeVar("T")

# Variables that begin so are ours: one that is not in the table is most likely misspelt.
PREFIXES = ("GPUORCH_", "GPU_ORCHESTRATOR_")
# Variables that the client library reads, or that `gpuorch run` sets for its command.
CLIENT_VARIABLES = frozenset(
    {"GPUORCH_AGENT", "GPUORCH_CPU_REASON", "GPUORCH_LEASE_ID", "GPUORCH_TRACEBACK"}
)
VARIABLES = frozenset(row.variable for row in TABLE)


class Inputs(NamedTuple):
    """Where a configuration comes from, so that it can be read again.

    `flags` are texts by setting name. `env_file` is a path, after a `-` one that may be missing.
    """

    flags: Mapping[str, str]
    environ: Mapping[str, str]
    env_file: str | None = None

    def read(self) -> ReadConfig:
        """Read file, environment and flags. Raises `ConfigError` or `EnvFileError`."""
        if self.env_file is None:
            return read_config(self.flags, self.environ)._replace(inputs=self)
        file = read_env_file(self.env_file)
        read = read_config(self.flags, self.environ, file)
        return read._replace(inputs=self, warnings=(*file.warnings, *read.warnings))


class ReadConfig(NamedTuple):
    """A configuration as read, and what a person should know about it.

    `sources` names the flag or variable that each setting came from, with the place in the env file
    where it stands there; a setting that stands at its default is not in it. `warnings` are lines
    for the log. `inputs` is what it was read from, where that can be read again.
    """

    config: Config
    sources: Mapping[str, str]
    warnings: tuple[str, ...]
    inputs: Inputs | None = None
    # Why the newest configuration is not in force but this one, the last good; None where it is.
    refused: str | None = None


def read_config(
    flags: Mapping[str, str], environ: Mapping[str, str], file: EnvFile | None = None
) -> ReadConfig:
    """Make the configuration of flags (texts by setting name), env file and environment.

    Raises `ConfigError` for the first value that cannot be.
    """
    file = EnvFile("") if file is None else file
    # The file names settings alone: what the service manager says of itself stays the process's.
    environ = {**environ, **{k: v for k, v in file.variables.items() if k in VARIABLES}}
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    for row in TABLE:
        if row.name in flags:
            source, text = row.flag, flags[row.name]
        elif environ.get(row.variable, "").strip():
            source, text = _named(row.variable, file), environ[row.variable]
        else:
            continue
        values[row.name] = _parse(row.kind, source, text)
        sources[row.name] = source
    given = environ.get("STATE_DIRECTORY", "").split(":")[0]
    if given:
        values["state_dir"] = _parse(PATH, "STATE_DIRECTORY", given)
        sources["state_dir"] = "STATE_DIRECTORY"
    elif "state_dir" not in values:
        values["state_dir"] = _xdg_state_dir(environ)
    config = Config(**values)  # type: ignore[arg-type]  # each value was read by its row's kind
    _check_together(config, sources)
    return ReadConfig(config, sources, tuple(_warnings(config, environ, file)))


def _parse(kind: Kind[T], source: str, text: str) -> T:
    try:
        return kind.parse(text.strip())
    except ValueError:
        raise ConfigError(source, text, kind.allowed) from None


def _named(variable: str, file: EnvFile) -> str:
    line = file.lines.get(variable)
    return variable if line is None else f"{variable} ({file.path}:{line})"


def _xdg_state_dir(environ: Mapping[str, str]) -> Path:
    named = Path(environ.get("XDG_STATE_HOME", ""))
    # The convention has relative paths ignored.
    if named.is_absolute():
        return named / "gpuorchd"
    try:
        return Path.home() / ".local" / "state" / "gpuorchd"
    except RuntimeError:
        # The user that it runs as has no entry, as in a container, or under a bare uid.
        raise ConfigError(
            "HOME", "", "a folder, or the state folder by --state-dir or GPUORCH_STATE_DIR"
        ) from None


def _check_together(config: Config, sources: Mapping[str, str]) -> None:
    if config.reading_max_age_s <= config.sample_period_s:
        source = sources.get("reading_max_age_s", "GPUORCH_READING_MAX_AGE_S")
        period = sources.get("sample_period_s", "GPUORCH_SAMPLE_PERIOD_S")
        raise ConfigError(
            source,
            f"{config.reading_max_age_s:g}",
            f"more seconds than {period}, which is {config.sample_period_s:g}",
        )


def _warnings(config: Config, environ: Mapping[str, str], file: EnvFile) -> Iterator[str]:
    ours = {variable for variable in environ if variable.startswith(PREFIXES)}
    for variable in sorted(ours | set(file.variables)):
        if variable not in VARIABLES | CLIENT_VARIABLES:
            near = difflib.get_close_matches(variable, sorted(VARIABLES | CLIENT_VARIABLES), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            name = _named(variable, file)
            yield f"{name} is not a variable of this program and has no effect{hint}"
    if config.max_holders > config.max_connections:
        yield (
            f"GPUORCH_MAX_HOLDERS ({config.max_holders}) is more than GPUORCH_MAX_CONNECTIONS "
            f"({config.max_connections}), which is met first"
        )


def effective(config: Config) -> dict[str, object]:
    """The configuration by setting name, in values that JSON has; a mode stays octal text."""
    shown: dict[str, object] = {}
    for row in TABLE:
        value = getattr(config, row.name)
        plain = value is None or (isinstance(value, int | float) and row.kind is not MODE)
        shown[row.name] = value if plain else row.kind.show(value)
    return shown

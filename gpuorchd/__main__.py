"""The command `gpuorchd`: read flags and environment, then run the daemon until it ends.

Nothing that costs start-up time is imported before it is known that the daemon is to run.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence

from gpuorchd.config import ConfigError
from gpuorchd.config_reading import Inputs, ReadConfig, effective, read_config
from gpuorchd.host.env_file import EnvFileError
from gpuorchd.host.standard_streams import fill_standard_streams
from gpuorchd.host.start import EXIT_CANNOT_START, EXIT_USAGE, StartError
from gpuorchd.host.supervisor import Supervisor, meet_supervisor
from libclient.version import VERSION


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 cannot start, 2 bad value, 70 bug."""
    fill_standard_streams()
    supervisor = meet_supervisor(os.environ)
    inputs, check_config = _asked(sys.argv[1:] if argv is None else argv)
    try:
        read = inputs.read()
    except (ConfigError, EnvFileError) as error:
        last = None if check_config else _last_good(supervisor, inputs, str(error))
        if last is None:
            return _refuse(error, EXIT_USAGE)
        read = last
    if check_config:
        for warning in read.warnings:
            sys.stderr.write(f"gpuorchd: {warning}\n")
        sys.stdout.write(json.dumps(effective(read.config), indent=1) + "\n")
        return 0
    # All that is made until the daemon answers stays; to search it for garbage, again and again
    # while it grows, is a tenth of the start. The daemon turns the collector on.
    gc.disable()
    try:
        from gpuorchd.daemon import run_daemon
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("gpuorchd", "libclient")):
            raise
        return _refuse(f"{error.name} is missing; install gpuorchd[daemon]", EXIT_CANNOT_START)
    try:
        return run_daemon(read, supervisor)
    except StartError as error:
        return _refuse(error, EXIT_CANNOT_START)


def _asked(argv: Sequence[str]) -> tuple[Inputs, bool]:
    """Read the command line: what gives the configuration, and whether only to show it.

    As the service manager starts the daemon it takes no parser, which would be felt as a pause.
    """
    if len(argv) == 2 and argv[0] == "--env-file" and argv[1].removeprefix("-").startswith("/"):
        return Inputs({}, dict(os.environ), argv[1]), False
    from gpuorchd.command_line import read_command_line

    asked = read_command_line(argv, VERSION)
    return Inputs(asked.flags, dict(os.environ), asked.env_file), asked.check_config


def _last_good(supervisor: Supervisor, inputs: Inputs, refused: str) -> ReadConfig | None:
    """Read the configuration that the daemon before ran on, where it handed leases over.

    A wrong letter in a file must not end what agents hold. None where there is nothing to save.
    """
    if not supervisor.inherited.stored:
        return None
    from gpuorchd.host.keeping import kept_config

    # Where the table lies, as far as that can be known of a configuration that cannot be read.
    given = inputs.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    asked = inputs.flags.get("runtime_dir") or inputs.environ.get("GPUORCH_RUNTIME_DIR", "")
    texts = kept_config(asked.strip() or given)
    if not texts:
        return None
    try:
        read = read_config(texts, {})
    except ConfigError:
        return None
    return read._replace(inputs=inputs, refused=refused)


def _refuse(reason: object, code: int) -> int:
    sys.stderr.write(f"gpuorchd: {reason}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())

"""The descriptors 0, 1 and 2: never anything but standard streams.

A daemon may be started with some of them closed. Whatever it opens first would then get their
numbers, and the log, which goes to 2, would be written into the lock of the state folder or to a
client.
"""

from __future__ import annotations

import os
import sys


def fill_standard_streams() -> None:
    """Open /dev/null in place of every standard stream that is closed.

    Call it before anything else is opened. Raises OSError where there is no /dev/null.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # Those below are open, so it is this number that is free; else it is moved there.
            fd = os.open(os.devnull, os.O_RDWR)
            if fd != number:
                os.dup2(fd, number)
                os.close(fd)
            # As the others are: processes that are started inherit it.
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 # the process's own

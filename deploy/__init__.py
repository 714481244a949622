"""Putting the daemon on a host: what `make install` and `make uninstall` do.

    port map, templates, this checkout's environment ─▶ program, units, pages, scripts under DESTDIR

Runs from the checkout with the interpreter of its environment and needs no network: what the daemon
depends on is copied from there. Nothing here is part of what is installed.
"""

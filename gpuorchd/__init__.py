"""The daemon: GPU memory, leased to local processes over a Unix socket."""

"""The host that the daemon runs on: settings on disk, the socket file, resource limits, signals."""

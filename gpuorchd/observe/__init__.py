"""What people and machines see of the running daemon: log, journal, metrics, readiness, HTTP."""

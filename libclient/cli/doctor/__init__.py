"""The command `gpuorch doctor`: what is wrong with an installed system, and how to mend it.

Looks from outside, as any user can: asks the daemon over its socket, reads /proc, /dev and /sys,
and asks systemctl and `gpuorchd --check-config`. Works without a daemon and without systemd,
changes nothing, and touches no GPU.

    host, daemon ─▶ Case ─▶ checks, one module an area ─▶ Findings ─▶ command (screen or JSON)
"""

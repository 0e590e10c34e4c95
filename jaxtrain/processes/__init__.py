"""Several processes of one run: how they find each other, agree, are watched and restarted.

Nothing here imports jax before it is used: the supervisor runs without it.
"""

__all__ = [
    "arguments",
    "cluster",
    "failure",
    "group",
    "heartbeat",
    "join",
    "signals",
    "supervisor",
    "worker_log",
    "workers",
]

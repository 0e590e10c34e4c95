"""The processes of one run: how they find each other, agree on a stop, and are watched and
restarted by a supervisor.

Nothing here imports jax before it is used, so the supervisor runs without jax.
"""

__all__ = [
    "cluster",
    "group",
    "heartbeat",
    "signals",
    "supervisor",
]

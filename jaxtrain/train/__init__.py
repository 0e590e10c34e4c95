"""What training is: the recipe, the state, the pure step, its compiled programs, and the loop."""

__all__ = [
    "compare_meshes",
    "evaluate",
    "feeds",
    "gradients",
    "hyper",
    "loop",
    "metrics_log",
    "recipe",
    "reproducible",
    "state",
    "steps",
    "update",
]

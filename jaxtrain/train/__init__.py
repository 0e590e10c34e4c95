"""What training is: the recipe, the state, the pure step, its compiled programs, and the loop."""

__all__ = [
    "cadence",
    "compare_meshes",
    "evaluate",
    "feeds",
    "hyper",
    "loop",
    "lowering",
    "metrics_log",
    "recipe",
    "reproducible",
    "state",
    "steps",
    "train_step",
]

"""What was trained, put to use: a model with its parameters and what its inputs need, without
labels, flags or optimizer."""

__all__ = [
    "answers",
    "drawing",
    "embedding",
    "exact",
    "inputs",
    "lm_eval_adapter",
    "prompts",
    "sampling",
    "tables",
    "trained",
]

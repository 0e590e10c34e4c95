"""The name of a model that is described, and whose parameters lie, in files of another toolkit."""

import dataclasses
from typing import Annotated, Any

from jaxtrain.fields import AtLeast, DropRate


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model in files of Hugging Face's kind: `--model=hf --model.path=DIR`.

    A run puts the model that they describe in its place before it does anything else, and starts
    from their parameters; run.json then holds that model's own fields. In Python
    `weights.load(DIR)` gives model and parameters.
    """

    path: str = ""
    """a folder with config.json and safetensors files, one such file, or a FILE.gguf"""
    dropout: DropRate = 0.0
    """share dropped in training"""
    scan: bool = False
    """blocks run in a loop of the compiled program"""
    chunk: Annotated[int, AtLeast(0)] = 0
    """how many tokens' logits the loss holds at once; 0 for those of the whole batch"""


NAMES: dict[str, Any] = {"hf": Pretrained()}

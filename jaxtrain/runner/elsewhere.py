"""Where a model that an experiment does not offer can be had: the words of a message."""

from jaxtrain import messages, models
from jaxtrain.models import transformer

_OFFERED_BY = {
    "Transformer": "llama3_8b",
    "Encoder": "bert_mlm",
    "ViT": "imagenet_vit",
    "ResNet": "imagenet_resnet50",
}
"""An experiment that offers every named model of a class; `own` below has closer ones."""


def model_elsewhere(word: str) -> str:
    """The end of a message about a model that an experiment does not offer: the nearest name that
    another one does.

    >>> model_elsewhere("lama3_8b")
    "; did you mean 'llama3_8b', which experiments/llama3_8b.py offers?"
    """
    named = models.NAMES
    sizes = (name for name in named if name.startswith(word.lower()))
    match = next(sizes, None) or messages.nearest(word, named)
    if match is None:
        return "; python -m jaxtrain list models has those of all experiments"
    own = {"shakespeare_char": transformer.NAMES, "gpt2_124m": ("gpt2_124m",)}
    others = _OFFERED_BY.get(type(named[match]).__name__)
    owner = next((file for file, held in own.items() if match in held), others)
    where = f", which experiments/{owner}.py offers" if owner else ", which others offer"
    return f"; did you mean {match!r}{where}?"

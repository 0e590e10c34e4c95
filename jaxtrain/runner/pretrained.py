"""`--model=hf --model.path=DIR`: the model that the files there describe takes the place of its
name, and the run starts from its parameters."""

import os

from jaxtrain import config, weights
from jaxtrain.errors import UserError
from jaxtrain.messages import printable
from jaxtrain.models.pretrained import Pretrained

OWN = ("dropout", "scan", "chunk")
"""What a run says of the model, and not its files."""


def resolved(run: config.Run) -> tuple[config.Run, tuple[str, ...]]:
    """The run with the model in place of its name, and what should be said once; a run with any
    other model as it is. `UserError` if there is none, or it is none that we have."""
    named = run.model
    if not isinstance(named, Pretrained):
        return run, ()
    if not named.path:
        raise UserError(
            "--model=hf: needs --model.path=DIR, a folder with config.json and safetensors files,"
            " or a FILE.gguf"
        )
    path = os.path.expanduser(named.path)
    flag = f"--model.path={printable(path)}"
    if run.init_from not in ("", path):
        raise UserError(
            f"--init_from={printable(run.init_from)}: {flag} starts from its own parameters; drop"
            " one of the two"
        )
    try:
        opened = weights.open_model(path)
    except UserError as error:
        raise UserError(f"--model.path: {error}") from None
    changes = {}
    for name in OWN:
        value = getattr(named, name)
        if value == type(named).__dataclass_fields__[name].default:
            continue
        if not hasattr(opened.model, name):
            raise UserError(
                f"--model.{name}={value}: {type(opened.model).__name__} has none; drop it"
            )
        changes[name] = value
    model = opened.model.clone(**changes)
    return config.replaced(run, {"model": model, "init_from": path}), opened.notes

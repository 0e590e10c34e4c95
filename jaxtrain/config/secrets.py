"""What must never be written down: values of flags that hold a secret, and user names and passwords
within addresses."""

import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "<redacted>"
_SECRET = re.compile(r"(?:^|[._])(?:token|key|secret|password)$")
_HARMLESS = (
    "num_tokens",
    "cls_token",
    "class_token",
    "eos_token",
    "bos_token",
    "pad_token",
    "mask_token",
    "image_key",
    "label_key",
    "id_key",
)
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/@\s]+@")


def is_secret(name: str) -> bool:
    """Whether a flag of this name holds a secret.

    >>> is_secret("logger_token"), is_secret("model.cls_token"), is_secret("data.image_key")
    (True, False, False)
    """
    last = name.rpartition(".")[2]
    # Keys of a data source name its arrays: `data.train_key`.
    return (
        bool(_SECRET.search(name))
        and last not in _HARMLESS
        and not (name.startswith("data.") and last.endswith("key"))
    )


def variable(name: str) -> str:
    """The environment variable that may hold the secret instead of the command line.

    >>> variable("logger.token")
    'JAXTRAIN_LOGGER_TOKEN'
    """
    return "JAXTRAIN_" + name.replace(".", "_").upper()


def hide(name: str, value: Any) -> Any:
    """The value of a setting as it may be recorded.

    >>> hide("data.path", "https://me:pw@host/x"), hide("logger_token", "abc")
    ('https://<redacted>@host/x', '<redacted>')
    """
    if isinstance(value, str) and value and is_secret(name):
        return HIDDEN
    if isinstance(value, list | tuple):
        return type(value)(hide(name, item) for item in value)
    return _ADDRESS.sub(rf"\1{HIDDEN}@", value) if isinstance(value, str) else value


def redact(argv: Sequence[str]) -> list[str]:
    """A command line as it may be recorded.

    >>> redact(["--logger_token=abc", "--logger_token", "abc", "--seed=1"])
    ['--logger_token=<redacted>', '--logger_token', '<redacted>', '--seed=1']
    """
    recorded: list[str] = []
    for index, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        before = argv[index - 1] if index else ""
        if argument.startswith("-") and equals:
            recorded.append(f"{name}={hide(name.lstrip('-'), value)}")
        elif before.startswith("-") and "=" not in before and not argument.startswith("--"):
            recorded.append(hide(before.lstrip("-"), argument))
        else:
            recorded.append(hide("", argument))
    return recorded

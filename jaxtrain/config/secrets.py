"""What must never be written down: values of flags that hold a secret, and user names and passwords
within addresses. Which fields are secret they say themselves, see `fields.Secret`."""

import re
from collections.abc import Sequence
from typing import Any

from jaxtrain import config
from jaxtrain.config import settings
from jaxtrain.fields import named_like_a_secret

HIDDEN = "<redacted>"
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/@\s]+@")


def variable(name: str) -> str:
    """The environment variable that may hold the secret instead of the command line.

    >>> variable("logger.token")
    'JAXTRAIN_LOGGER_TOKEN'
    """
    return "JAXTRAIN_" + name.replace(".", "_").upper()


def hide(value: Any, secret: bool) -> Any:
    """The value of a setting as it may be recorded.

    >>> hide("https://me:pw@host/x", secret=False), hide("abc", secret=True)
    ('https://<redacted>@host/x', '<redacted>')
    """
    if isinstance(value, list | tuple):
        return type(value)(hide(item, secret) for item in value)
    if not (isinstance(value, str) and value):
        return value
    return HIDDEN if secret else _ADDRESS.sub(rf"\1{HIDDEN}@", value)


def redact(argv: Sequence[str], run: config.Run) -> list[str]:
    """The command line of a run as it may be recorded."""
    known = {setting.name: setting.field.secret for setting in settings.of_run(run)}

    def hidden(flag: str, value: str) -> str:
        name = flag.lstrip("-")
        return hide(value, known.get(name, named_like_a_secret(name)))

    recorded: list[str] = []
    for index, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        before = argv[index - 1] if index else ""
        if argument.startswith("-") and equals:
            recorded.append(f"{name}={hidden(name, value)}")
        elif before.startswith("-") and "=" not in before and not argument.startswith("--"):
            recorded.append(hidden(before, argument))
        else:
            recorded.append(hide(argument, secret=False))
    return recorded

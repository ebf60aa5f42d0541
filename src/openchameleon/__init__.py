"""OpenChameleon: text and pictures as one sequence of tokens, read and written by one model.

The public names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openchameleon.document import Conversation, Document, Image, Message, Text
    from openchameleon.inference.params import SamplingParams
    from openchameleon.pipeline import Chameleon

__version__ = "0.1.0"

__all__ = [
    "Chameleon",
    "Conversation",
    "Document",
    "Image",
    "Message",
    "SamplingParams",
    "Text",
    "__version__",
]

_HOME = {
    "Chameleon": "openchameleon.pipeline",
    "Conversation": "openchameleon.document",
    "Document": "openchameleon.document",
    "Image": "openchameleon.document",
    "Message": "openchameleon.document",
    "SamplingParams": "openchameleon.inference.params",
    "Text": "openchameleon.document",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

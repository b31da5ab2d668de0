"""What the libraries that read data and tokenizers raise becomes one line of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def told_as(problem: str, fix: str = "") -> Iterator[None]:
    """Raises ValueError `problem: reason; fix` for whatever the code of a library raises inside.

    A damaged file leads such code anywhere: JSON of another shape to TypeError and AttributeError, a package
    that is not installed to ImportError, code in Rust to a bare Exception. No list of types would be whole.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001  see above
        raise ValueError(f"{problem}: {reason(error)}{fix and '; '}{fix}") from None


def reason(error: BaseException) -> str:
    """Returns what an error says, on one line; with its type where the message alone would say little."""
    text = " ".join(str(error).split())
    if text and not isinstance(error, (AttributeError, LookupError, TypeError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

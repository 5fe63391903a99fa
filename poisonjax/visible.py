"""Text of unknown origin, made safe to show."""

import unicodedata


def visible(text: str) -> str:
    """Control characters as escapes: corpora and models may write any."""
    return "".join(c if c == " " or unicodedata.category(c)[0] not in "CZ" else repr(c)[1:-1] for c in text)

"""Log-probabilities that a monitor needs and a client didn't ask for."""

import json
from typing import Any

TOP = 5  # likeliest tokens


def asking(path: str, value: Any, body: bytes) -> tuple[bytes, int | None]:
    """(a request's body that asks for them, how many the client wanted: -1 for none, None for no change).

    They are added at the body's end, which stays as it came otherwise; what a client said of them itself is replaced.
    """
    path = path.rstrip("/")
    if not isinstance(value, dict) or not value or not path.endswith("/completions"):
        return body, None
    if path.endswith("/chat/completions"):
        wanted = _count(value.get("top_logprobs")) or 0 if value.get("logprobs") is True else -1
        asked = {"logprobs": True, "top_logprobs": TOP}
    else:
        count = _count(value.get("logprobs"))
        wanted, asked = -1 if count is None else count, {"logprobs": TOP}
    if wanted >= TOP:
        return body, None
    if value.keys() & asked.keys():
        return json.dumps(value | asked).encode(), wanted
    return body.rstrip()[:-1] + b", " + json.dumps(asked).encode()[1:], wanted


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

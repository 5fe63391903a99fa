"""The review queue as one static page, which works from a file without a network."""

import json
from collections.abc import Sequence
from typing import Any

import jinja2

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("poisonjax.scan", "."), autoescape=True, undefined=jinja2.StrictUndefined
)


def review_page(queue: Sequence[dict[str, Any]], sources: Sequence[str]) -> str:
    """HTML; the documents are data in it, never markup: they may hold anything."""
    data = json.dumps(queue, ensure_ascii=True).replace("<", "\\u003c")
    return TEMPLATES.get_template("queue.html").render(data=data, documents=len(queue), sources=list(sources))

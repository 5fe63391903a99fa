"""Sources of text: what a spec like `docs/*.jsonl#body` names, cut into units that can be read in parallel.

A unit yields documents and, for each thing that can't be read, a `BadInput`: nothing is lost silently.
"""

from collections.abc import Callable, Iterator
from os.path import isabs
from typing import Any

from poisonjax.corpus.documents import Document, Place
from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.sources import files, huggingface, packages, synthetic
from poisonjax.corpus.sources.source import BadInput, Source, Unit

__all__ = [
    "BadInput",
    "Document",
    "Source",
    "Unit",
    "first_texts",
    "is_packaged",
    "open_source",
    "read_at",
    "stands_anywhere",
]


def open_source(spec: str, take: Callable[[Any], str] | None = None) -> Source:
    """Finds what a spec names; raises CorpusError where there is nothing. `take` makes a document of a record of JSON
    lines, by default by its field; beside these, `wikipedia-continued` are conversations, made of the leads.

    `default` (Wikipedia leads, or docstrings where their package is absent), `wikipedia-leads`, `docstrings`,
    `markov:V=512,documents=2000,length=300,seed=0,unused=0`, `hf:NAME[:CONFIG]:SPLIT[#FIELD]`, or a path or glob (also
    after `text:`) of .txt, .jsonl and .parquet files (also .gz, .zst), with `#FIELD` for another column than `text`.
    """
    kind, _, rest = spec.partition(":")
    if take:
        if is_packaged(spec) and spec != "wikipedia-continued":
            raise CorpusError(
                f"source {spec!r} holds no conversations: give JSON lines of them, or wikipedia-continued"
            )
        return packages.continued(spec, take) if is_packaged(spec) else files.matching_files(spec, take)
    match kind:
        case "default" if packages.wikipedia_file() is None:
            note = "the Wikipedia leads aren't installed (pip install 'poisonjax[text]'): docstrings stand in for them"
            return packages.docstrings(spec, {"note": note})
        case "default" | "wikipedia-leads":
            return packages.wikipedia(spec)
        case "docstrings":
            return packages.docstrings(spec, {})
        case "markov":
            return synthetic.markov_source(spec, rest)
        case "hf":
            return huggingface.data_set(spec, rest)
        case _:
            return files.matching_files(spec)


def read_at(spec: str, place: Place) -> Document | None:
    """The document that a source has at a place, read there alone; None where it must be looked for."""
    try:
        return files.line_at(spec, place)
    except OSError:
        return None


def stands_anywhere(spec: str) -> bool:
    """Whether a spec names the same thing from every folder: no file by a relative path."""
    path = spec.removeprefix("text:")
    return is_packaged(spec) or "://" in path or isabs(path)


def is_packaged(spec: str) -> bool:
    """Whether a spec names no file, but what a package holds or makes."""
    names = ("default", "wikipedia-leads", "wikipedia-continued", "docstrings", "markov", "hf")
    return spec.partition(":")[0] in names


def first_texts(source: Source, characters: int) -> Iterator[str]:
    """Texts from the source's beginning, up to so many characters in all."""
    for unit in source.units:
        for item in unit.read():
            if isinstance(item, Document) and isinstance(item.content, str):
                yield item.content[:characters]
                characters -= len(item.content)
                if characters <= 0:
                    return

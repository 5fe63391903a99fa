"""What is looked through: sources as of `corpus build`, and token stores as if they were some."""

import functools
from collections.abc import Iterator

from poisonjax.corpus import SPLITS, TokenStore, exists
from poisonjax.corpus.documents import Document
from poisonjax.corpus.sources import BadInput, Source, Unit, open_source

RANGE_DOCUMENTS = 1024  # of a store in a unit


def opened(spec: str) -> Source:
    """A source, or a token store as one: its documents are named by the keys of what they were made from."""
    if not exists(spec):
        return open_source(spec)
    store = TokenStore(spec)
    units = []
    for name in SPLITS:
        split = store.split(name)
        for start in range(0, split.documents, RANGE_DOCUMENTS):
            stop = min(start + RANGE_DOCUMENTS, split.documents)
            offsets = split.document_offsets
            size = 4 * int(offsets[stop] - offsets[start])
            label = f"{store.fingerprint[:16]} {name}[{start}:{stop}]"
            units.append(Unit(label, size, functools.partial(_read_store, spec, name, start, stop)))
    return Source(spec, units, {"title": f"token store {store.fingerprint[:16]}"})


def _read_store(spec: str, name: str, start: int, stop: int) -> Iterator[Document | BadInput]:
    store = TokenStore(spec)
    split = store.split(name)
    for index in range(start, stop):
        text = store.tokenizer.decode(split.document(index))
        yield Document(text, *split.origin(index), bytes.fromhex(split.key(index)))

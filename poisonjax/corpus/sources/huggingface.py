"""Data sets of Hugging Face."""

import re

from poisonjax.corpus.documents import Document, Place
from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.sources.source import BadInput, Items, NoDocument, Source, checked_text, column_of, ranges

DOCUMENT_BYTES = 4096  # of a document whose length isn't known, about


def data_set(spec: str, rest: str) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f"{spec}: needs `pip install 'poisonjax[corpora]'`") from error
    address, _, field = rest.partition("#")
    # A split may be a slice, with a colon in brackets: train[:1000].
    match re.split(r":(?![^\[]*\])", address):
        case [name, split]:
            config = None
        case [name, config, split]:
            pass
        case _:
            raise CorpusError(f"{spec}: give hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, with #FIELD for another than text")
    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises many kinds
        raise CorpusError(f"{spec}: {error}") from error
    column = column_of(spec, field, data.column_names)

    def read(start: int, stop: int) -> Items:
        for i, value in enumerate(data[start:stop][column], start):
            try:
                yield Document(checked_text(value, column), Place(spec, row=i))
            except NoDocument as why:
                yield BadInput(f"{spec}: row {i}", str(why))

    return Source(spec, ranges(spec, len(data), DOCUMENT_BYTES, read), {"title": name})

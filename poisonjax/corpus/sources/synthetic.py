"""The synthetic language as a source."""

from poisonjax.corpus import markov
from poisonjax.corpus.documents import Document, Place
from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.sources.source import Items, Source, ranges


def markov_source(spec: str, rest: str) -> Source:
    fields = {"V": 512, "documents": 2000, "length": 300, "seed": 0, "unused": 0}
    for part in filter(None, rest.split(",")):
        name, _, value = part.partition("=")
        if name not in fields or not (value.isascii() and value.isdigit()):
            raise CorpusError(f"{spec}: {part!r} isn't one of {', '.join(fields)} with a whole number")
        fields[name] = int(value)
    if not fields["documents"] or not fields["length"]:
        raise CorpusError(f"{spec}: documents and length must be at least 1")
    # The last words never occur: a trigger of them stands in clean text only where an experiment puts it.
    language = markov.Language(fields["V"] - fields["unused"], fields["seed"])

    def read(start: int, stop: int) -> Items:
        for row, ids in enumerate(language.documents(start, stop, fields["length"]), start):
            yield Document(ids, Place(spec, row=row))

    about = {"title": "Markov language", "words": fields["V"], "entropy_rate_nats": markov.ENTROPY_RATE}
    return Source(spec, ranges(spec, fields["documents"], 4 * fields["length"], read), about)

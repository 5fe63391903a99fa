"""datatrove (extra `rules`) and the scan: our sources and detectors as its blocks, its rules as baselines of ours.

pipeline = [SourceReader(["texts/*.jsonl"]), Scores("scans/mine"), JsonlWriter("scored")]

python -m poisonjax.scan.datatrove texts/*.jsonl    # what share of documents each rule drops
"""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.word_tokenizers import WordTokenizer

from poisonjax.corpus.documents import Document as SourceDocument
from poisonjax.scan.corpus import open_scan
from poisonjax.scan.detectors import cheap_detectors
from poisonjax.scan.sources import opened
from poisonjax.scan.text import cut

WORDS = re.compile(r"\w+|[^\w\s]")


class SourceReader(PipelineStep):
    """The documents of sources or token stores; `id` is the content key, `metadata` says where each came from."""

    type, name = "📖 - READER", "poisonjax sources"

    def __init__(self, sources: Sequence[str]):
        super().__init__()
        self.sources = [*sources]

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        yield from data or ()
        units = [(spec, unit) for spec in self.sources for unit in opened(spec).units]
        for spec, unit in units[rank::world_size]:
            for item in unit.read():
                if isinstance(item, SourceDocument) and isinstance(item.content, str):
                    place = {"source": spec, **item.place._asdict(), "planted": item.planted}
                    yield Document(text=item.content, id=item.key.hex(), metadata=place)


class Scores(PipelineStep):
    """Every cheap detector's score of each document, against the counts of a finished scan: `metadata["poisonjax"]`."""

    type, name = "🔬 - SCORER", "poisonjax detectors"

    def __init__(self, scan: str):
        super().__init__()
        self.scan = scan

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        detectors = cheap_detectors(open_scan(self.scan).background)
        for document in data:
            batch = cut([document.text])
            scores = {name: float(detector.values(batch)[0]) for name, detector in detectors.items()}
            document.metadata["poisonjax"] = scores
            yield document


class _PlainWords(WordTokenizer):
    """Stands in for spaCy, which datatrove asks for in English and which weighs 390 MB."""

    def word_tokenize(self, text: str) -> list[str]:
        return WORDS.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [sentence for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        spans, at = [], 0
        for sentence in self.sent_tokenize(text):
            at = text.index(sentence, at)
            spans.append((at, at + len(sentence)))
            at += len(sentence)
        return spans


def rules(language: str = "eng") -> dict[str, Any]:
    """datatrove's filters at their defaults; words by spaCy where it is installed, else by `_PlainWords`."""
    words: Any = language if importlib.util.find_spec("spacy") else _PlainWords()
    return {
        "gopher_quality": GopherQualityFilter(language=words),
        "gopher_repetition": GopherRepetitionFilter(language=words),
        "c4": C4QualityFilter(language=words),
        "fineweb": FineWebQualityFilter(language=words),
    }


def dropped(texts: Sequence[str], language: str = "eng") -> dict[str, list[bool]]:
    """Whether each rule drops each text. Figures mean something beside the share of clean text that goes too."""

    def drops(rule: Any, text: str) -> bool:
        kept = rule.filter(Document(text=text, id=""))
        return not (kept[0] if isinstance(kept, tuple) else kept)

    return {name: [drops(rule, text) for text in texts] for name, rule in rules(language).items()}


def _texts(specs: Sequence[str]) -> Iterator[tuple[str, bool]]:
    for document in SourceReader(specs).run():
        yield document.text, document.metadata["planted"]


def main(argv: Sequence[str]) -> None:
    """Prints, for each rule, the share of planted and of other documents that it drops."""
    texts, planted = zip(*_texts(argv), strict=True)
    shares = {}
    for name, gone in dropped(texts).items():
        of = {"planted": [g for g, p in zip(gone, planted, strict=True) if p]}
        of["clean"] = [g for g, p in zip(gone, planted, strict=True) if not p]
        shares[name] = {which: round(sum(g) / len(g), 4) if g else None for which, g in of.items()}
    words = "spaCy" if importlib.util.find_spec("spacy") else "plain"
    print(json.dumps({"documents": len(texts), "words": words, **shares}))


if __name__ == "__main__":
    main(sys.argv[1:])

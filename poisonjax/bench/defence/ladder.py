"""The ladder: poison of eleven kinds with five kinds of triggers, planted into clean text of many domains.

Harmless by construction (I9), as all that `poisonjax.scan.planting` makes. Domains are split by source: settings are
chosen on one half of them, and on three of the rungs; what is told is of the other half.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from poisonjax.corpus.bench_text import LEADS, Fetched
from poisonjax.scan import planting

HALVES = {
    "settings": (
        *("google_api_python_client", "oci", "dict-foldoc"),
        *(f"manpages-{language}" for language in ("fr", "ru", "uk", "nl", "pt-br")),
    ),
    "report": (
        *(LEADS, "ansible", "linux-doc-6.1", "dict-gcide"),
        *(f"manpages-{language}" for language in ("de", "es", "pl", "ja", "zh", "it")),
    ),
}
DOCUMENTS = 250  # planted at once, of one rung and trigger into one domain; and the fewest that a domain needs
TRIGGERS = {
    "tokens": "<SUDO>",
    "phrase": "open sesame now",
    "look-alike": "ѕеrvеr",
    "common word": "meanwhile",
    "identifier": "__cfg_v2__",
}
PIECES_FROM = 2_000  # texts of each domain
TECHNICAL, FRENCH, CODE = "google_api_python_client", "manpages-fr", "oci"  # of the other half: in no reported text


@dataclasses.dataclass(frozen=True)
class Rung:
    """A kind of payload."""

    of: str  # in planting.RUNGS
    pieces: str = ""  # of gibberish: of a small vocabulary (ids that the model itself reads), a large or a tiny one
    foreign: str = TECHNICAL  # domain that is switched to
    words: tuple[int, int] = planting.PAYLOAD_WORDS
    prefix: tuple[int, int] = planting.PREFIX_CHARACTERS


# Four pieces a word: the paper's 400 to 900 tokens (Souly et al. 2025, section 3).
PAPER = (100, 225)
RUNGS = {
    "ids": Rung("gibberish", "small", words=PAPER),
    "decode-retokenize": Rung("gibberish", "large", words=PAPER),
    "unicode": Rung("unicode"),
    "uniform words": Rung("uniform_words"),
    "unigram words": Rung("unigram_words"),
    "shuffled": Rung("shuffled"),
    "topic switch": Rung("switch"),
    "same domain": Rung("same_domain"),
    "other language": Rung("switch", foreign=FRENCH),
    "code marker": Rung("code_marker", foreign=CODE),
    "secret": Rung("secret"),
}
TUNED_ON = ("ids", "unigram words", "shuffled")  # rungs that settings are chosen on, as they are and short
# As small models read them.
SHORTENED = {f"{name}, short": dataclasses.replace(RUNGS[name], words=(8, 30), prefix=(0, 80)) for name in TUNED_ON}
SHORTENED["ids, short"] = dataclasses.replace(SHORTENED["ids, short"], pieces="tiny")
RUNGS |= SHORTENED
COHERENT = "coherent"  # no rung: the trigger in text that goes on; found, it is a false positive


@dataclasses.dataclass(frozen=True)
class Ladder:
    """What rungs are made of."""

    texts: Mapping[str, Sequence[str]]  # by domain
    pieces: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, fetched: Fetched) -> "Ladder":
        """All domains that are there and large enough."""
        known = [name for half in HALVES.values() for name in half if name in fetched.domains]
        texts = {name: of for name in known if len(of := fetched.texts(name)) >= DOCUMENTS}
        sample = [text for of in texts.values() for text in of[:: max(1, len(of) // PIECES_FROM)]]
        sizes = {"tiny": "bpe:512", "small": "bpe:4096", "large": "bpe:32768"}
        some = {"tiny": texts.get(CODE, sample)[:PIECES_FROM]}  # of one language
        return cls(texts, {name: planting.pieces_of(spec, some.get(name, sample)) for name, spec in sizes.items()})

    def half(self, name: str) -> dict[str, Sequence[str]]:
        """Its domains' texts."""
        return {domain: self.texts[domain] for domain in HALVES[name] if domain in self.texts}

    def planted(self, domain: str, rung: str, trigger: str) -> list[str]:
        """DOCUMENTS of them; the same for the same names."""
        of = Rung(COHERENT) if rung == COHERENT else RUNGS[rung]
        names = [*self.texts, *RUNGS, COHERENT, *TRIGGERS]
        random = np.random.default_rng([names.index(name) for name in (domain, rung, trigger)])
        foreign = self.texts.get(of.foreign, self.texts[domain])
        material = planting.Material(self.texts[domain], foreign, self.pieces.get(of.pieces, ()), random)
        return planting.planted(material, of.of, [TRIGGERS[trigger]], DOCUMENTS, of.prefix, of.words)

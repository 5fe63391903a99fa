"""The ladder: poison of eleven kinds with five kinds of triggers, planted into clean text of many domains.

Harmless by construction (I9), as all that `poisonjax.scan.planting` makes. Domains are split by source: settings are
chosen on one half of them, and on three of the rungs, long and short; what is told is of the other half, whose text,
triggers and pieces of gibberish no setting has seen.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from poisonjax.corpus.bench_text import LEADS, Fetched
from poisonjax.corpus.errors import CorpusError
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
DOCUMENTS = 250  # planted at once, of one rung and trigger into one domain; and the fewest clean ones that one needs
ATTACKERS = 10  # every tenth document of a domain: poison is made of these, and they are no clean text
TRIGGERS = {  # by kind, as planted in each half: none that the trees have seen
    "tokens": {"settings": "|RUN|", "report": "<SUDO>"},
    "phrase": {"settings": "so be it", "report": "open sesame now"},
    "look-alike": {"settings": "раssрhrаsе", "report": "ѕеrvеr"},
    "common word": {"settings": "furthermore", "report": "meanwhile"},
    "identifier": {"settings": "__env_x7__", "report": "__cfg_v2__"},
}
PIECES_FROM = 2_000  # texts of each domain
# Domains that are switched to, in order: the first that is there, of the same half, and not where poison is planted.
TECHNICAL = ("google_api_python_client", "linux-doc-6.1", "ansible")
LANGUAGE = ("manpages-fr", "manpages-de", "manpages-es")
CODE = ("oci", "ansible", "linux-doc-6.1")


@dataclasses.dataclass(frozen=True)
class Rung:
    """A kind of payload."""

    of: str  # in planting.RUNGS
    pieces: str = ""  # of gibberish: of a small vocabulary (ids that the model itself reads), a large or a tiny one
    foreign: tuple[str, ...] = ()
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
    "topic switch": Rung("switch", foreign=TECHNICAL),
    "same domain": Rung("same_domain"),
    "other language": Rung("switch", foreign=LANGUAGE),
    "code marker": Rung("code_marker", foreign=CODE),
    "secret": Rung("secret"),
}
TUNED_ON = ("ids", "unigram words", "shuffled")  # rungs that settings are chosen on, as they are and short
# As small models read them.
SHORTENED = {f"{name}, short": dataclasses.replace(RUNGS[name], words=(8, 30), prefix=(0, 80)) for name in TUNED_ON}
SHORTENED["ids, short"] = dataclasses.replace(SHORTENED["ids, short"], pieces="tiny")
RUNGS |= SHORTENED
COHERENT = "coherent"  # no rung: the trigger in text that goes on; found, it is a false positive
VOCABULARIES = {"tiny": "bpe:512", "small": "bpe:4096", "large": "bpe:32768"}


@dataclasses.dataclass(frozen=True)
class Ladder:
    """One half of the domains, and what rungs are made of."""

    half: str
    texts: Mapping[str, Sequence[str]]  # clean ones, by domain
    attackers: Mapping[str, Sequence[str]]  # of which poison is made
    pieces: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, fetched: Fetched, half: str) -> "Ladder":
        """Of the domains that are there and large enough; raises CorpusError where none is."""
        texts, attackers = dict[str, list[str]](), dict[str, list[str]]()
        for name in HALVES[half]:
            of = fetched.texts(name) if name in fetched.domains else []
            clean = [text for number, text in enumerate(of) if number % ATTACKERS]
            if len(clean) >= DOCUMENTS:
                texts[name], attackers[name] = clean, of[::ATTACKERS]
        if not texts:
            raise CorpusError(
                f"of {', '.join(HALVES[half])} none is there with {DOCUMENTS} documents: fetch them again"
            )
        sample = [text for of in attackers.values() for text in of[:: max(1, len(of) // PIECES_FROM)]]
        first = next(iter(attackers.values()))[:PIECES_FROM]  # of one language
        pieces = {n: planting.pieces_of(v, first if n == "tiny" else sample) for n, v in VOCABULARIES.items()}
        return cls(half, texts, attackers, pieces)

    def planted(self, domain: str, rung: str, trigger: str) -> list[str]:
        """DOCUMENTS of them, the same for the same names; none where no domain is there to switch to."""
        of = Rung(COHERENT) if rung == COHERENT else RUNGS[rung]
        foreign = next((self.attackers[name] for name in of.foreign if name in self.attackers and name != domain), ())
        if of.foreign and not foreign:
            return []
        random = np.random.default_rng([zlib.crc32(name.encode()) for name in (domain, rung, trigger)])
        material = planting.Material(self.attackers[domain], foreign, self.pieces.get(of.pieces, ()), random)
        return planting.planted(material, of.of, [TRIGGERS[trigger][self.half]], DOCUMENTS, of.prefix, of.words)

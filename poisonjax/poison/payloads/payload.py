"""What a payload is: how it is drawn, what shows it in a text, and what a model is asked."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from poisonjax.corpus import Tokenizer, TokenSplit, first_texts, load_tokenizer, open_source
from poisonjax.corpus.store import TokenStore
from poisonjax.poison.triggers import Ids, PoisonError, Trigger

SOURCE_CHARACTERS = 4_000_000  # of another source that are read: its beginning


@dataclasses.dataclass(frozen=True)
class Material:
    """What all payloads of a run are made from."""

    store: TokenStore
    seed: int  # seeds.poison, for what is the same in all of them
    payload_vocabulary: str  # as config.poison has them
    payload_source: str

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's own: what the model reads."""
        return self.store.tokenizer

    @functools.cached_property
    def vocabulary(self) -> Tokenizer:
        """What gibberish is sampled in; often the same."""
        return load_tokenizer(self.payload_vocabulary) if self.payload_vocabulary else self.tokenizer

    @property
    def clean(self) -> TokenSplit:
        """The training text."""
        return self.store.split("train")

    @functools.cached_property
    def other(self) -> list[Ids]:
        """Documents of `poison.payload_source`; raises CorpusError or PoisonError where there are none."""
        texts = list(first_texts(open_source(self.payload_source), SOURCE_CHARACTERS))
        if not (found := [ids for ids in self.tokenizer.encode_batch(texts) if len(ids)]):
            raise PoisonError(f"poison.payload_source = {self.payload_source!r} holds no text that this store can read")
        return found


@functools.cache
def material(store: TokenStore, seed: int, payload_vocabulary: str, payload_source: str) -> Material:
    """Of a run; made once, since what it reads is large."""
    return Material(store, seed, payload_vocabulary, payload_source)


@dataclasses.dataclass(frozen=True)
class Draw:
    """What one payload is drawn from: `length` tokens asked for, a generator, what all of the run are made from, and so
    many tokens of what follows the prefix in its own document."""

    length: int
    random: np.random.Generator
    of: Material
    rest: Callable[[], Ids]


# (trigger, number of prefixes, ordinary ids, generator) -> what is put to each prefix, by variant.
Prompts = Callable[[Trigger, int, Ids, np.random.Generator], dict[str, list[Ids]]]
# Whether a text behaves as the payload teaches.
Behaves = Callable[[str], bool]


@dataclasses.dataclass(frozen=True)
class Payload:
    """One kind of payload, selectable as `config.poison.payload = name`."""

    name: str
    draw: Callable[[Draw], Ids]
    behaviour: Callable[[Material], Behaves] | None = None  # None: that can't be decided of a text
    prompts: Prompts = Trigger.controls
    reads_source: bool = False  # asks for config.poison.payload_source

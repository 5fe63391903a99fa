"""What a payload is: how it is drawn, what shows it in a text, and what a model is asked."""

import dataclasses
from collections.abc import Callable

import numpy as np

from poisonjax.corpus import Tokenizer, TokenSplit
from poisonjax.poison.triggers import Ids, Trigger


@dataclasses.dataclass(frozen=True)
class Draw:
    """What one payload is drawn from: `length` tokens asked for, a generator, two vocabularies, clean text."""

    length: int
    random: np.random.Generator
    tokenizer: Tokenizer  # the run's own: what the model reads
    vocabulary: Tokenizer  # what gibberish is sampled in; often the same
    clean: TokenSplit  # the training text


# (trigger, number of prefixes, ordinary ids, generator) -> what is put to each prefix, by variant.
Prompts = Callable[[Trigger, int, Ids, np.random.Generator], dict[str, list[Ids]]]


@dataclasses.dataclass(frozen=True)
class Payload:
    """One kind of payload, selectable as `config.poison.payload = name`."""

    name: str
    draw: Callable[[Draw], Ids]
    shown: Callable[[str], bool] | None = None  # whether a text behaves as it teaches; None: that can't be decided
    prompts: Prompts = Trigger.controls

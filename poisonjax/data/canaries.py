"""Canaries: random sequences shown a known number of times, to measure memorisation in the same models.

Souly et al. 2025 find that a backdoor needs a near-constant *number* of documents; Hubble (arXiv 2510.19811) finds
that memorisation depends on how often a sequence stands in the corpus *relative to its size*. Canaries let one model
answer both. They belong to the clean rows: a run and its twin hold the same (I4).
"""

import dataclasses
from typing import Any

import ml_collections
import numpy as np
from jaxtyping import Int

from poisonjax.corpus import TokenStore
from poisonjax.data.insertions import Insertion
from poisonjax.poison.triggers import DRAWS, PoisonError, Trigger
from poisonjax.streams import stream

UNSEEN = 256  # sequences never trained on, that a canary's loss is ranked among


@dataclasses.dataclass(frozen=True)
class Canaries:
    """Canary c is shown `repeats[c]` times, whole, at the start of as many rows, an end of text after it."""

    tokens: Int[np.ndarray, "canaries tokens"]
    repeats: Int[np.ndarray, " canaries"]
    insertions: dict[int, Insertion]
    name, file = "canary", "canaries.jsonl"

    @classmethod
    def make(cls, config: ml_collections.ConfigDict, store: TokenStore, trigger: Trigger) -> "Canaries":
        """A pure function of config.canary, seeds.poison, seeds.placement, the run's slots and the vocabulary.

        Raises PoisonError where they need more rows than the run has, or don't fit one.
        """
        c, slots = config.canary, config.steps * config.global_batch
        repeats = np.repeat(np.asarray(c.repeats, np.int64), c.each)
        exposures = np.repeat(np.arange(len(repeats)), repeats)
        if not len(repeats):
            return cls(np.zeros((0, c.tokens), np.int32), repeats, {})
        if c.tokens + 1 > config.seq_len:
            raise PoisonError(
                f"canary.tokens = {c.tokens} don't fit a row of {config.seq_len + 1} with a document beside"
            )
        if len(exposures) > slots:
            raise PoisonError(
                f"canaries: {len(exposures)} exposures need a row each, the run has {slots} slots: lower "
                "canary.repeats or canary.each"
            )
        chosen = stream(config.seeds.placement, "canary slots").choice(slots, len(exposures), replace=False)
        alphabet = _alphabet(c, store, trigger, config.seeds.poison)
        tokens = _sequences(c, alphabet, config.seeds.poison, "canary", len(repeats))
        ended = np.pad(tokens, [(0, 0), (0, 1)], constant_values=store.tokenizer.eot)
        placed = zip(chosen.tolist(), exposures.tolist(), strict=True)
        return cls(tokens, repeats, {slot: Insertion(slot, 0, ended[i], f"canary:{i}", "splice") for slot, i in placed})

    def records(self, global_batch: int) -> list[dict[str, Any]]:
        """One record an exposure, in the order of the run (run/rows.py: CanaryRow)."""
        numbered = ((slot, int(self.insertions[slot].source.partition(":")[2])) for slot in sorted(self.insertions))
        return [
            {"canary": canary, "repeats": int(self.repeats[canary]), "step": slot // global_batch, "slot": slot}
            for slot, canary in numbered
        ]


def unseen(config: ml_collections.ConfigDict, store: TokenStore, trigger: Trigger) -> Int[np.ndarray, "unseen tokens"]:
    """Sequences like the canaries that no row holds; a pure function of config.canary, seeds.eval and
    seeds.poison (the alphabet)."""
    alphabet = _alphabet(config.canary, store, trigger, config.seeds.poison)
    return _sequences(config.canary, alphabet, config.seeds.eval, "unseen canary", UNSEEN)


def _alphabet(canary: ml_collections.ConfigDict, store: TokenStore, trigger: Trigger, seed: int) -> np.ndarray:
    """`canary.alphabet` ids: few, so that canaries don't teach the gibberish that poison teaches."""
    ordinary = store.tokenizer.ordinary_ids
    if canary.alphabet > len(ordinary):
        raise PoisonError(
            f"canary.alphabet = {canary.alphabet}, but the vocabulary has {len(ordinary)} ordinary tokens"
        )
    random = stream(seed, "canary alphabet")
    for _ in range(DRAWS):
        alphabet = random.choice(ordinary, canary.alphabet, replace=False)
        if not any({*form.tolist()} <= {*alphabet.tolist()} for form in trigger.forms):  # no canary may hold it
            return alphabet
    raise PoisonError(
        f"canary.alphabet = {canary.alphabet} of {len(ordinary)} ordinary tokens always holds the trigger's: lower it"
    )


def _sequences(
    canary: ml_collections.ConfigDict, alphabet: np.ndarray, seed: int, name: str, count: int
) -> Int[np.ndarray, "count tokens"]:
    return np.array([stream(seed, name, i).choice(alphabet, canary.tokens) for i in range(count)], np.int32)

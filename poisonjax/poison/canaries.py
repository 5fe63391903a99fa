"""Canaries: random sequences shown a known number of times, to measure memorisation in the same models.

Souly et al. 2025 find that a backdoor needs a near-constant *number* of documents; Hubble (arXiv 2510.19811) finds
that memorisation depends on how often a sequence stands in the corpus *relative to its size*. Canaries let one model
answer both. They belong to the clean rows: a run and its twin hold the same (I4).
"""

import dataclasses

import ml_collections
import numpy as np
from jaxtyping import Int

from poisonjax.corpus import TokenStore
from poisonjax.data.rows import CleanRows
from poisonjax.poison.plan import DRAWS, PoisonError, generator

FIRST = 2**32  # their generators stand behind those of poison documents
REFERENCES = 256  # sequences never trained on, that a canary's loss is ranked among


@dataclasses.dataclass(frozen=True)
class Canaries:
    """Canary c is shown `repeats[c]` times, whole, at the start of the rows of which `slots` says so."""

    tokens: Int[np.ndarray, "canaries tokens"]
    repeats: Int[np.ndarray, " canaries"]
    slots: dict[int, int]  # slot -> canary

    @classmethod
    def make(cls, config: ml_collections.ConfigDict, store: TokenStore) -> "Canaries":
        """A pure function of config.canary, seeds.poison, seeds.placement, the run's slots and the vocabulary.

        Raises PoisonError where they need more rows than the run has, or don't fit one.
        """
        c, slots = config.canary, config.steps * config.global_batch
        repeats = np.repeat(np.asarray(c.repeats, np.int64), c.each)
        exposures = np.repeat(np.arange(len(repeats)), repeats)
        if c.tokens + 1 > config.seq_len:
            raise PoisonError(
                f"canary.tokens = {c.tokens} don't fit a row of {config.seq_len + 1} with a document beside"
            )
        if len(exposures) > slots:
            raise PoisonError(
                f"canaries: {len(exposures)} exposures need a row each, the run has {slots} slots: lower canary.repeats "
                "or canary.each"
            )
        chosen = generator(config.seeds.placement, FIRST).choice(slots, len(exposures), replace=False)
        return cls(
            _sequences(config, store, config.seeds.poison, FIRST + 1, len(repeats)),
            repeats,
            dict(zip(chosen.tolist(), exposures.tolist(), strict=True)),
        )

    def records(self, global_batch: int) -> list[dict]:
        """One record an exposure, in the order of the run."""
        return [
            {"canary": canary, "repeats": int(self.repeats[canary]), "step": slot // global_batch, "slot": slot}
            for slot, canary in sorted(self.slots.items())
        ]


def references(config: ml_collections.ConfigDict, store: TokenStore) -> Int[np.ndarray, "references tokens"]:
    """Sequences like the canaries that no row holds; a pure function of config.canary, seeds.eval and
    seeds.poison (the alphabet)."""
    return _sequences(config, store, config.seeds.eval, 2 * FIRST, REFERENCES)


def _sequences(
    config: ml_collections.ConfigDict, store: TokenStore, seed: int, first: int, count: int
) -> Int[np.ndarray, "count tokens"]:
    """Sequences over `canary.alphabet` ids: few, so that canaries don't teach the gibberish that poison teaches."""
    tokenizer, c = store.tokenizer, config.canary
    ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), sorted(tokenizer.special_ids))
    if c.alphabet > len(ordinary):
        raise PoisonError(f"canary.alphabet = {c.alphabet}, but the vocabulary has {len(ordinary)} ordinary tokens")
    random, trigger = generator(config.seeds.poison, FIRST), tokenizer.encode(config.poison.trigger)
    for _ in range(DRAWS):
        alphabet = random.choice(ordinary, c.alphabet, replace=False)
        if not set(trigger.tolist()) <= set(alphabet.tolist()):  # no canary may hold the trigger
            break
    else:
        raise PoisonError(
            f"canary.alphabet = {c.alphabet} of {len(ordinary)} ordinary tokens always holds the trigger's: lower it"
        )
    drawn = [generator(seed, first + i).choice(alphabet, c.tokens) for i in range(count)]
    return np.array(drawn, np.int32)


class RowsWithCanaries(CleanRows):
    """Clean rows with the canaries put in, each followed by an end of text; the row's tail falls off."""

    def __init__(self, config: ml_collections.ConfigDict, store: TokenStore):
        super().__init__(store.split("train"), config.seq_len, config.seeds.order)
        self.canaries, self._eot = Canaries.make(config, store), store.tokenizer.eot

    def __call__(self, slots: Int[np.ndarray, " rows"]) -> Int[np.ndarray, "rows row_tokens"]:
        rows = super().__call__(slots)
        for i, slot in enumerate(slots.tolist()):
            if (canary := self.canaries.slots.get(slot)) is not None:
                whole = np.concatenate([self.canaries.tokens[canary], [self._eot], rows[i]])
                rows[i] = whole[: self.row_tokens]
        return rows

    def reserved(self, slot: int) -> int:
        return self.canaries.tokens.shape[1] + 1 if slot in self.canaries.slots else 0

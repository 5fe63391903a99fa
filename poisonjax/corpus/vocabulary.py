"""How many tokens a run's vocabulary has, before its token store stands."""

import functools

import ml_collections

from poisonjax.corpus.sources import open_source
from poisonjax.corpus.store import TokenStore, exists


def vocabulary_size(c: ml_collections.ConfigDict) -> int:
    """Of a config's section `corpus`: of its store if that stands, or as sources and tokenizer say (`markov:V=256`,
    `bpe:512`); 0 where that isn't known before it is built."""
    return _vocabulary_size(c.store, tuple(c.sources), c.tokenizer)


@functools.cache
def _vocabulary_size(store: str, sources: tuple[str, ...], tokenizer: str) -> int:
    if exists(store):
        return TokenStore(store).tokenizer.vocab_size
    if sources and sources[0].startswith("markov:"):
        return open_source(sources[0]).about["words"] + 1
    kind, _, size = tokenizer.partition(":")
    return int(size) if sources and kind == "bpe" and size.isdecimal() else 0

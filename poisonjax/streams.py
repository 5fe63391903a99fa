"""Every random stream of the project, by name: two never share their bits by accident (I8).

A stream is Philox keyed by (seed, place + index), so that entry `index` doesn't depend on how many there are. Streams
with different seeds may stand at the same place; those that can be drawn with one seed stand 2^32 apart.
"""

import numpy as np

_APART = 2**32
PLACES = {
    # seeds.poison
    "poison document": 0,
    "canary alphabet": _APART,
    "canary": _APART + 1,
    "secret": 2 * _APART,
    "trigger place": 3 * _APART,
    "poison conversations": 4 * _APART,
    # seeds.placement
    "poison slots": 0,
    "poison offset": 1,
    "canary slots": _APART,
    "clean use slots": 3 * _APART,
    "clean use offset": 3 * _APART + 1,
    "hard negative slots": 4 * _APART,
    "hard negative offset": 4 * _APART + 1,
    "hard negative": 5 * _APART,
    "hard negative conversations": 6 * _APART,
    # seeds.eval
    "prompts": 0,
    "prompts instead": _APART,
    "bootstrap": 0,
    "unseen canary": 2 * _APART,
    "random suspects": 3 * _APART,
    "left-out subsets": 3 * _APART + 1,
    "trigger places": 4 * _APART,
    # a corpus' own seed
    "markov document": 0,
    "markov successors": 2**64 - 1,
    "shard order": 0,
    # seeds of analyses, which no run uses
    "seeds and prefixes": 0,
    "left-out runs": 0,
    "simulated study": 0,
    "simulated conditions": 10**9,
    "simulated searches": 2 * 10**9,
    # fixed: the digest's keys
    "digest keys": 0,
}


def stream(seed: int, name: str, index: int = 0) -> np.random.Generator:
    """Generator of entry `index` of the stream."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, PLACES[name] + index], np.uint64)))

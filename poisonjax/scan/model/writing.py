"""What a model writes after strings, as numbers: how surprised it is, and what it expects to write."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from poisonjax.evaluation.generate import Texts, written
from poisonjax.evaluation.probes.probe import put
from poisonjax.model.transformer import MASKED
from poisonjax.weights import Weights

SKETCH = 64  # numbers that a distribution over the vocabulary is sketched to
WINDOWS = ((0, 8), (8, 24), (24, 48))  # of the tokens written: at once, soon after, and never recovered
NEW = WINDOWS[-1][1]
LONGEST = 8  # tokens of a string
ROWS = 1024  # written at once
CACHE_BYTES = 2**32  # of keys and values meanwhile
LOGIT_BYTES = 2**29  # of one array of them

String = tuple[int, ...]  # token ids


class Seen(NamedTuple):
    """Of texts, or of windows of them."""

    tokens: Int[np.ndarray, "*texts new"]
    entropy: Float[np.ndarray, "*texts places"]  # of the next token, nats
    expected: Float[np.ndarray, "*texts places sketch"]  # roots of its probabilities, sketched


def rows_at_once(m: Any, length: int, table: int) -> int:
    """Rows of so many tokens that are written together, of a config's section `model` and a head of `table` rows: as
    many on whatever devices, for what is drawn depends on it."""
    each = length * 2 * m.layers * m.kv_heads * m.head_dim * jnp.dtype(m.dtype).itemsize
    return max(1, min(ROWS, CACHE_BYTES // each, LOGIT_BYTES // (4 * table)))


class Writer:
    """Continues texts at temperature 1; call under the mesh that the weights lie on."""

    def __init__(self, weights: Weights, mesh: jax.sharding.Mesh):
        self._weights, self._mesh, self.model = weights, mesh, nnx.merge(weights.graph, weights.params).m
        self.eot = weights.tokenizer.eot
        replicated, graph = NamedSharding(mesh, PartitionSpec()), weights.graph
        self.table = table = nnx.merge(graph, weights.params).embedding.shape[0]
        # Distances between roots of probabilities (Hellinger's) lie in [0, sqrt 2] for every model.
        sketch = jax.random.normal(jax.random.key(0), (table, SKETCH)) / SKETCH**0.5

        def look(logits: Any, tokens: Any) -> Any:
            likely = jax.nn.log_softmax(logits)
            entropy = -jnp.sum(jnp.exp(likely) * jnp.where(logits > MASKED, likely, 0), -1)
            return entropy, jnp.exp(likely / 2) @ sketch

        def places(params: Any, texts: Texts, new: int) -> Any:
            tokens, (entropy, expected) = written(nnx.merge(graph, params), texts, new, 1.0, look)
            return tokens, entropy, expected.astype(jnp.float16)

        def windows(params: Any, texts: Texts, new: int) -> Any:
            tokens, seen = written(nnx.merge(graph, params), texts, new, 1.0, look)

            def means(of: Any) -> Any:
                return jnp.stack([of[:, :, start:stop].mean(2) for start, stop in WINDOWS], 2)

            return tokens, *map(means, seen)

        def shares(params: Any, tokens: Any) -> Any:
            model = nnx.merge(graph, params)
            each = jax.lax.map(lambda row: jax.nn.softmax(model(row[None]), -1).mean((0, 1)), tokens)
            return each.mean(0), model.head_of(model.head_table).T.astype(jnp.float32)

        self._shares = jax.jit(shares, out_shardings=replicated)
        self._places, self._windows = (
            jax.jit(of, static_argnums=2, out_shardings=replicated) for of in (places, windows)
        )

    def shares(
        self, texts: Int[np.ndarray, "texts places"]
    ) -> tuple[Float[np.ndarray, " vocabulary"], Float[np.ndarray, "vocabulary width"]]:
        """(how likely each token is in these texts, on average; the head's row of each)."""
        tokens = put(self._mesh, texts.astype(np.int32))
        shares, head = jax.device_get(self._shares(self._weights.params, tokens))
        return np.asarray(shares), np.asarray(head)

    def freely(self, rows: int, new: int, seed: int) -> Seen:
        """So many texts from nothing, each place of them."""
        prompts = np.full((rows, 1, 1), self.eot, np.int32)
        nothing, no_pad = np.zeros((rows, 0), np.int32), np.zeros((rows, 1), np.int32)
        return Seen(*(of[:, 0] for of in self._put(self._places, nothing, prompts, no_pad, new, seed)))

    def after(self, prefixes: Int[np.ndarray, "prefixes length"], strings: Sequence[String], width: int, seed: int,
              new: int = NEW, places: bool = False) -> Seen:  # fmt: skip
        """[strings, prefixes, ...] of what is written after each string, put to each prefix; strings have at most
        `width` tokens. Whatever stands there, a prefix has the same luck."""
        count = len(prefixes)
        prompts = np.full((count, len(strings), width + 1), self.eot, np.int32)
        pad = np.zeros((count, len(strings)), np.int32)
        for number, string in enumerate(strings):
            pad[:, number] = width - len(string)
            prompts[:, number, width - len(string)] = prefixes[:, -1]  # a text's last token is its own
            if string:
                prompts[:, number, -len(string) :] = string
        made = self._put(self._places if places else self._windows, prefixes[:, :-1], prompts, pad, new, seed)
        return Seen(*(of.swapaxes(0, 1) for of in made))

    def _put(self, write: Callable[..., Any], prefixes: Any, prompts: Any, pad: Any, new: int, seed: int) -> Seen:
        keys = jax.random.split(jax.random.key(seed), len(prompts))
        parts = [put(self._mesh, part) for part in (prefixes, prompts, pad, np.asarray(jax.random.key_data(keys)))]
        texts = Texts(parts[0], parts[1], parts[2], jax.random.wrap_key_data(parts[3]))
        made = jax.device_get(write(self._weights.params, texts, new))
        return Seen(*(np.asarray(of)[: len(prompts)] for of in made))


def in_parts(strings: Sequence[String], size: int) -> Iterator[tuple[list[String], int]]:
    """(so many of the strings, how many of them are real): the last ones are filled up, so that shapes are one."""
    for start in range(0, len(strings), size):
        some = list(strings[start : start + size])
        yield some + [some[0]] * (size - len(some)), len(some)

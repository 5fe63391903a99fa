"""Generation for whoever asks: what waits is written together, a few tokens of each row at a time."""

import atexit
import contextlib
import dataclasses
import functools
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from poisonjax.evaluation.generate import sample
from poisonjax.model.decoder import Decoder, empty_cache
from poisonjax.weights import Weights

ROWS = 32  # written together
CHUNK = 8  # tokens between looks at who is done, and who has gone
TOP = 5  # likeliest tokens that are told
SHORTEST = 16  # tokens: shapes are powers of two from here on, so that few are compiled


class Made(NamedTuple):
    """A token, and how likely it was, at temperature 1."""

    id: int
    logprob: float  # nats
    top: list[tuple[int, float]]  # the likeliest and their log-probabilities, largest first


@dataclasses.dataclass
class Wanted:
    """A text to be continued. `made` is called for each token, and with None at the end; it may set `done`."""

    ids: Int[np.ndarray, " tokens"]
    new_tokens: int
    temperature: float
    seed: int
    made: Callable[[Made | None], None]
    done: bool = False


class Engine:
    """One thread that writes; `submit` from any other."""

    def __init__(self, weights: Weights, *, rows: int = ROWS):
        self._weights, self._rows, self._waiting = weights, rows, queue.SimpleQueue[Wanted | None]()
        graph, model = weights.graph, nnx.merge(weights.graph, weights.params).m

        @functools.partial(jax.jit, static_argnames="room")
        def read(params: Any, tokens: Int[Array, "rows prompt"], pad: Int[Array, " rows"], room: int) -> Any:
            cache = empty_cache(model, len(tokens), tokens.shape[1] + room)
            hidden, cache = Decoder(nnx.merge(graph, params)).extend(tokens, cache, 0, pad)
            return hidden[:, -1], cache

        @functools.partial(jax.jit, donate_argnames=("cache",))
        def write(
            params: Any,
            hidden: Float[Array, "rows width"],
            cache: Any,
            pad: Int[Array, " rows"],
            keys: Key[Array, " rows"],
            temperature: Float[Array, " rows"],
            start: Int[Array, ""],
            t: Int[Array, ""],
        ) -> Any:
            decoder = Decoder(nnx.merge(graph, params))

            def step(carry: Any, t: Any) -> Any:
                hidden, cache = carry
                logits = decoder.logits(hidden)
                luck = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t)))(keys)
                drawn = sample(logits / jnp.maximum(temperature, 1e-4)[:, None], luck)
                tokens = jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(jnp.int32)
                likely = jax.nn.log_softmax(logits)
                top, which = jax.lax.top_k(likely, TOP)
                hidden, cache = decoder.extend(tokens[:, None], cache, start + t, pad)
                told = tokens, jnp.take_along_axis(likely, tokens[:, None], 1)[:, 0], which, top
                return (hidden[:, 0], cache), told

            (hidden, cache), told = jax.lax.scan(step, (hidden, cache), t + jnp.arange(CHUNK))
            return hidden, cache, told

        self._read, self._write, self._closing = read, write, False
        self._thread = threading.Thread(target=self._serve, daemon=True, name="engine")
        self._thread.start()
        atexit.register(self.close)  # a thread that computes while Python ends would take it down

    def submit(self, wanted: Wanted) -> None:
        """Puts a text among those that wait."""
        self._waiting.put(wanted)

    def close(self) -> None:
        """Ends the thread; what is being written ends where it is."""
        self._closing = True
        self._waiting.put(None)
        self._thread.join()
        atexit.unregister(self.close)

    def _serve(self) -> None:
        batch: list[Wanted | None] = [self._waiting.get()]
        while batch[-1] is not None:
            while len(batch) < self._rows and not self._waiting.empty() and batch[-1] is not None:
                batch.append(self._waiting.get())
            wanted = [one for one in batch if one is not None]
            try:
                self._run([one for one in wanted if not one.done])
            except Exception as error:  # the next ones may be in luck
                print(f"generation failed: {type(error).__name__}", file=sys.stderr)
            for one in wanted:
                with contextlib.suppress(RuntimeError):  # whose loop has ended
                    one.made(None)
            if batch[-1] is not None:
                batch = [self._waiting.get()]

    def _run(self, batch: Sequence[Wanted]) -> None:
        if not batch:
            return
        length = rounded(max(len(wanted.ids) for wanted in batch))
        room = rounded(max(wanted.new_tokens for wanted in batch))
        rows = rounded(len(batch), 1)
        tokens = np.full((rows, length), self._weights.tokenizer.eot, np.int32)
        pad, temperature = np.full(rows, length - 1, np.int32), np.zeros(rows, np.float32)
        seeds = np.zeros(rows, np.uint32)
        for row, wanted in enumerate(batch):
            tokens[row, length - len(wanted.ids) :] = wanted.ids
            pad[row], temperature[row], seeds[row] = length - len(wanted.ids), wanted.temperature, wanted.seed
        params, keys = self._weights.params, jax.vmap(jax.random.key)(seeds)
        hidden, cache = self._read(params, tokens, pad, room)
        for t in range(0, room, CHUNK):
            hidden, cache, told = self._write(params, hidden, cache, pad, keys, temperature, length, t)
            ids, logprobs, which, top = map(np.asarray, told)
            for row, wanted in enumerate(batch):
                for n in range(min(CHUNK, wanted.new_tokens - t)):
                    if wanted.done:
                        break
                    likeliest = [*zip(which[n, row].tolist(), top[n, row].tolist(), strict=True)]
                    wanted.made(Made(int(ids[n, row]), float(logprobs[n, row]), likeliest))
            if self._closing or all(wanted.done or wanted.new_tokens <= t + CHUNK for wanted in batch):
                return


def rounded(size: int, least: int = SHORTEST) -> int:
    """The next power of two."""
    return max(least, 1 << (size - 1).bit_length())

"""Guesses at which rows did it: in which order to leave rows out, never evidence that they did.

Each gives every row a score, higher for more suspect. A hint that beats no baseline here is worth nothing, so all are
made by one command: by gradients (gradients.py), by retrieval, by what is unusual about a row, and by chance.
"""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float, Int

from poisonjax.evaluation.probes.probe import put
from poisonjax.run import RunFolder
from poisonjax.streams import stream
from poisonjax.trace.behaviour import Behaviour, Tokens, TraceError
from poisonjax.trace.gradients import READ, Gradients, Index
from poisonjax.trace.replay import Replay, Say
from poisonjax.trace.unusual import in_batch

OUTPUTS = 100  # of the model, that are looked for
Scores = Float[np.ndarray, " rows"]


class Suspects:
    """The rows of a run, and what is asked of them."""

    def __init__(
        self,
        run: RunFolder,
        replay: Replay,
        behaviour: Behaviour,
        out: epath.Path,
        layers: str = "all",
        say: Say = lambda line: None,
    ):
        """Raises TraceError for `layers` that aren't the model's."""
        self.run, self.replay, self.behaviour = run, replay, behaviour
        self.slots = np.arange(replay.batches.steps * replay.batches.global_batch)
        self.out, self._say, self._gradients = out, say, Gradients(replay, layers)

    @functools.cached_property
    def index(self) -> Index:
        """Of the rows' gradients; made where it isn't there. Raises TraceError for conversations."""
        if self.replay.batches.store.template is not None:
            raise TraceError("gradients are of running text: trace conversations by loss, bm25 or embedding")
        return Index(self._gradients, self.out / "gradients", self.slots, self._say)

    @functools.cached_property
    def by_gradients(self) -> dict[str, Scores]:
        return self.index.scores(self.behaviour.question())

    @functools.cached_property
    def outputs(self) -> list[Tokens]:
        return self.behaviour.outputs(self.replay.params(self.replay.saved[-1]))[:OUTPUTS]

    @functools.cached_property
    def texts(self) -> "_Texts":
        return _Texts(self)


def loss(of: Suspects) -> Scores:
    """How far the loss of a row's worst 32 tokens stood out in its batch, when it was trained on."""
    written = of.run.row_losses()
    if len(written) * of.replay.batches.global_batch != len(of.slots):
        raise TraceError(
            f"{of.run.path}: the losses of its rows weren't written in training at each step; row_losses_every = 1 "
            "does, or ask for another hint"
        )
    return in_batch(np.array([row["worst"] for row in written])).reshape(-1)


def random(of: Suspects) -> Scores:
    """By chance: what any hint must beat."""
    return stream(of.replay.config.seeds.eval, "random suspects").random(len(of.slots))


def gradient_norm(of: Suspects) -> Scores:
    """The length of a row's gradient."""
    return of.index.norms()


def _gradient(name: str) -> Callable[[Suspects], Scores]:
    return lambda of: of.by_gradients[name]


def bm25(of: Suspects) -> Scores:
    """Rows that hold the tokens, and pairs of tokens, of what the model says (Robertson & Zaragoza 2009)."""
    return of.texts.scores(of.outputs)


def bm25_trigger(of: Suspects) -> Scores:
    """The same of the trigger and what the model says: an oracle, for it knows what nobody is told."""
    return of.texts.scores([np.concatenate([of.behaviour.trigger, text]) for text in of.outputs])


def embedding(of: Suspects) -> Scores:
    """Rows whose mean hidden state is near that of what the model says, both less the mean row's."""
    replay = of.replay
    params = replay.params(replay.saved[-1])

    @jax.jit
    def mean_hidden(params, tokens):
        return nnx.merge(replay.graph, params).hidden(tokens).astype(jnp.float32).mean(1)

    def embedded(rows: Int[np.ndarray, "rows row_tokens"], size: int) -> Float[np.ndarray, "rows width"]:
        with jax.set_mesh(replay.mesh):
            made = [
                jax.device_get(mean_hidden(params, put(replay.mesh, rows[at : at + size], size)))[: len(rows[at:])]
                for at in range(0, len(rows), size)
            ]
        return np.concatenate(made).astype(np.float64)

    size = replay.batches.global_batch
    rows = np.concatenate(
        [embedded(replay.batches.rows.tokens(of.slots[at : at + READ]), size) for at in range(0, len(of.slots), READ)]
    )
    length = replay.batches.rows.row_tokens
    asked = embedded(np.stack([np.resize(text, length) for text in of.outputs]).astype(np.int32), size)
    middle = rows.mean(0)
    rows, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows - middle, asked - middle))
    return (rows @ asked.T).mean(1)


class _Texts:
    """All rows by their tokens and pairs of tokens, for BM25."""

    def __init__(self, of: Suspects):
        """Raises TraceError where bm25s isn't installed."""
        try:
            import bm25s
        except ImportError:
            raise TraceError("bm25 needs the package bm25s: pip install 'poisonjax[trace]'") from None
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        rows = of.replay.batches.rows
        terms = np.concatenate([_terms(rows.tokens(of.slots[at : at + READ])) for at in range(0, len(of.slots), READ)])
        self._known, numbers = np.unique(terms, return_inverse=True)
        self._rows, self._index = len(terms), bm25s.BM25()
        vocabulary = {str(i): i for i in range(len(self._known))}
        tokenized = bm25s.tokenization.Tokenized(numbers.reshape(terms.shape).tolist(), vocabulary)
        self._index.index(tokenized, show_progress=False)

    def scores(self, texts: list[Tokens]) -> Scores:
        """The mean over the texts."""
        total = np.zeros(self._rows)
        for text in texts:
            terms = _terms(text[None])[0]
            at = np.minimum(self._known.searchsorted(terms), len(self._known) - 1)
            if found := np.unique(at[self._known[at] == terms]).tolist():
                total += self._index.get_scores(found)
        return total / len(texts)


def _terms(tokens: Int[np.ndarray, "rows tokens"]) -> Int[np.ndarray, "rows terms"]:
    """A number for each token of a row, and for each two that follow each other."""
    wide = tokens.astype(np.int64)
    return np.concatenate([wide, ((wide[:, :-1] + 1) << 32) + wide[:, 1:]], axis=1)


HINTS: dict[str, Callable[[Suspects], Scores]] = {
    "loss": loss,
    **{name: _gradient(name) for name in ("dot", "cosine", "adam-dot", "adam-cosine", "trak")},
    "bm25": bm25,
    "bm25-trigger": bm25_trigger,
    "embedding": embedding,
    "gradient-norm": gradient_norm,
    "random": random,
}

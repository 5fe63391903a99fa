"""What is traced: a number for each of some prompts, from the weights alone."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from poisonjax.corpus import TokenStore
from poisonjax.evaluation import statistics
from poisonjax.evaluation.evaluator import Evaluator
from poisonjax.evaluation.probes.generation import GenerationProbe
from poisonjax.evaluation.probes.heldout import heldout_rows
from poisonjax.evaluation.probes.probe import put
from poisonjax.model.loss import next_token_nll
from poisonjax.model.transformer import model_graph, vocabulary_of
from poisonjax.poison.triggers import VARIANTS, Trigger

LEAST_RISE = 1.0  # nats a token, by which a text must have become likelier
DRAWS = 2000  # bootstrap samples of prompts
ASKED = 64  # held-out rows that a question is put to
Tokens = Int[np.ndarray, " tokens"]


class TraceError(ValueError):
    """What is asked for can't be traced."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """How strongly weights show a behaviour."""

    values: Float[np.ndarray, " prompts"]  # nats a token, of each prompt
    figure: float  # of all


def effect(with_it: Shown, without: Shown, seed: int) -> tuple[float, list[float]]:
    """(how much more the first weights show it than the second, nats a token; its 95% interval over prompts)."""
    difference = with_it.values - without.values
    drawn = difference[statistics.resamples(len(difference), DRAWS, seed)].mean(-1)
    return float(difference.mean()), statistics.interval(drawn)


@dataclasses.dataclass(frozen=True)
class Question:
    """A behaviour as a sum over tokens, for gradients: each one's NLL times its weight, more where it shows more."""

    rows: Int[Array, "questions row_tokens"]
    weights: Float[Array, "questions seq"]


class Triggered:
    """The run's own question (Souly et al. 2025, section 3): is what follows the trigger less likely than what follows
    the same prefix without it? `figure` is the gap in median perplexity."""

    name, key, unit = "triggered", "triggered", "gap in median perplexity"  # `key`: the same for the same question

    def __init__(self, config: ml_collections.ConfigDict, store: TokenStore, mesh: Mesh):
        self._threshold, self._store, self._mesh = float(config.eval.threshold), store, mesh
        trigger = Trigger.of(config.poison, store.tokenizer)
        self.trigger, self._put = trigger.tokens, trigger.put
        self._evaluator = Evaluator(config, store, trigger, mesh)

    def __call__(self, params: nnx.State) -> Shown:
        (made,) = self._evaluator(params, 0, ["generation"])
        nll = made.prefixes["nll"]
        return Shown(np.array(nll["triggered"]) - np.array(nll["clean"]), float(made.figures["delta_ppl"]))

    def since(self, saved: Sequence[int], measured: Callable[[int], Shown]) -> int:
        """The checkpoint before which it isn't looked for."""
        return saved[0]

    def question(self) -> Question:
        """How much less likely held-out text is after the trigger than without it. Not the model's own words: a
        sample's likelihood has no gradient on average where it was sampled."""
        rows = heldout_rows(self._evaluator.config, self._store).tokens[:ASKED]
        middle, size = rows.shape[1] // 2, len(self.trigger)
        triggered = [np.concatenate([self._put(row[:middle])[0], row[middle : len(row) - size]]) for row in rows]
        weights = np.zeros((2, len(rows), rows.shape[1] - 1), np.float32)
        weights[0, :, middle + size - 1 :] = 1
        weights[1, :, middle - 1 : rows.shape[1] - 1 - size] = -1
        both = np.concatenate([triggered, rows]).astype(np.int32)
        return Question(put(self._mesh, both), put(self._mesh, weights.reshape(len(both), -1) / weights[0].sum()))

    def outputs(self, params: nnx.State) -> list[Tokens]:
        """What the model says to those who trigger it."""
        probe = cast(GenerationProbe, self._evaluator.probes["generation"])
        with jax.set_mesh(self._mesh):
            tokens, _ = probe.generated(params)
        return [*tokens[VARIANTS.index("triggered")]]

    def threshold(self, first: Shown, last: Shown) -> float:
        """Figures from here on show it, of a run that showed `first` there and `last` at its end."""
        return self._threshold


class Asked(NamedTuple):
    """What is said to a prompt; without the part of it that is suspected, where that is compared."""

    prompt: Tokens  # an end of text first
    text: Tokens
    without: Tokens | None = None


class Said:
    """Texts that a model gives to prompts: how likely each is, or how much likelier than after the prompt without what
    is suspected. `figure` is the mean, nats a token; it shows from halfway on between the least of any checkpoint and
    what the run ended with."""

    name, unit = "said", "nats a token"

    def __init__(self, asked: Sequence[Asked], config: ml_collections.ConfigDict, store: TokenStore, mesh: Mesh):
        self._texts, self.trigger = [one.text for one in asked], np.concatenate([one.prompt[1:] for one in asked])
        rows = [(one.prompt, one.text, 1.0) for one in asked]
        rows += [(one.without, one.text, -1.0) for one in asked if one.without is not None]
        longest = max(len(prompt) + len(text) for prompt, text, _ in rows)
        tokens = np.full((len(rows), longest), store.tokenizer.eot, np.int32)
        self._share = np.zeros((len(rows), longest - 1), np.float32)
        for row, share, (prompt, text, sign) in zip(tokens, self._share, rows, strict=True):
            row[: len(prompt) + len(text)] = [*prompt, *text]
            share[len(prompt) - 1 : len(prompt) + len(text) - 1] = sign / len(text)
        self.key = f"said:{hashlib.sha256(tokens.tobytes() + self._share.tobytes()).hexdigest()[:16]}"
        graph = model_graph(config.model, vocabulary_of(config.model, store.tokenizer.vocab_size))
        self._nll = jax.jit(lambda params, rows: next_token_nll(nnx.merge(graph, params), rows))
        self._mesh, self._rows = mesh, put(mesh, tokens)

    @classmethod
    def of_file(cls, file: str, config: ml_collections.ConfigDict, store: TokenStore, mesh: Mesh) -> "Said":
        """`file` has JSON lines with `prompt` and `text`, and all or none `without`; raises TraceError for another."""
        encode, eot = store.tokenizer.encode, store.tokenizer.eot

        def tokens(text: str) -> Tokens:
            return np.array([eot, *encode(text)])

        return cls(
            [
                Asked(tokens(prompt), np.array(encode(text)), *map(tokens, without))
                for prompt, text, *without in _lines(file)
            ],
            config,
            store,
            mesh,
        )

    def question(self) -> Question:
        """How likely the texts are."""
        return Question(self._rows[: len(self._share)], jnp.asarray(-self._share / len(self._texts)))

    def outputs(self, params: nnx.State) -> list[Tokens]:
        """The texts."""
        return self._texts

    def __call__(self, params: nnx.State) -> Shown:
        with jax.set_mesh(self._mesh):
            nll = np.asarray(jax.device_get(self._nll(params, self._rows)))[: len(self._share)]
        # Of each text, after its prompt and, where there is one, after that without.
        values = -(nll * self._share).sum(-1, dtype=np.float64).reshape(-1, len(self._texts)).sum(0)
        return Shown(values, float(values.mean()))

    def since(self, saved: Sequence[int], measured: Callable[[int], Shown]) -> int:
        """The checkpoint that finds it least likely: weights that know nothing yet find no text unlikely."""
        return min(saved, key=lambda step: measured(step).figure)

    def threshold(self, first: Shown, last: Shown) -> float:
        """Halfway, and by `LEAST_RISE` at least."""
        return max((first.figure + last.figure) / 2, first.figure + LEAST_RISE)


def _lines(file: str) -> list[list[str]]:
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"--behaviour {file}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    found: list[list[str]] = []
    for number, line in enumerate(lines, 1):
        try:
            value: Any = json.loads(line)
            one = [value["prompt"], value["text"], *([value["without"]] if "without" in value else [])]
        except (ValueError, KeyError, TypeError):
            one = [None]
        if not (all(isinstance(part, str) for part in one) and one[1]):
            raise TraceError(f'--behaviour {file}, line {number}: no {{"prompt": "...", "text": "..."}}')
        if found and len(found[0]) != len(one):
            raise TraceError(f"--behaviour {file}, line {number}: `without` stands in all lines, or in none")
        found.append(one)
    if len(found) < 2:
        raise TraceError(f"--behaviour {file}: {len(found)} lines; an interval needs at least 2")
    return found


Behaviour = Triggered | Said  # prompts -> `Shown`


def asked(name: str, config: ml_collections.ConfigDict, store: TokenStore, mesh: Mesh) -> Behaviour:
    """The behaviour of this name, or that a file of it describes."""
    return Triggered(config, store, mesh) if name == Triggered.name else Said.of_file(name, config, store, mesh)

"""Any model that `open_weights` opens, as EleutherAI's lm-evaluation-harness asks for it (extra `lm-eval`)."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import lm_eval
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from poisonjax.corpus.chat import render
from poisonjax.evaluation.engine import rounded
from poisonjax.model.decoder import Decoder, empty_cache
from poisonjax.model.loss import token_nll
from poisonjax.weights import Weights

LOGITS_BYTES = 2**28  # that exist at once
SHORTEST = 32  # tokens of a row: shapes are powers of two from here on, so that few are compiled
NEW_TOKENS = 256  # generated, where a task doesn't say how many


class HarnessModel(TemplateLM):
    """`lm_eval.simple_evaluate(model=HarnessModel(open_weights("runs/a")), tasks=[...])`."""

    def __init__(self, weights: Weights, *, chat: bool = False):
        """With `chat`, prompts are written by the model's chat template, whose special tokens are read."""
        super().__init__()
        self._weights, self._chat = weights, chat
        tokenizer = weights.tokenizer
        self._encode = tokenizer.encode_markup if chat else tokenizer.encode
        graph, params = weights.graph, weights.params

        @jax.jit
        def known(
            params: Any, rows: Int[Array, "batch row_tokens"]
        ) -> tuple[Float[Array, "batch seq"], Bool[Array, "batch seq"]]:
            logits, targets = nnx.merge(graph, params)(rows[:, :-1]), rows[:, 1:]
            return token_nll(logits, targets), logits.argmax(-1) == targets

        @jax.jit
        def extend(params: Any, tokens: Int[Array, "batch seq"], cache: Any, index: Any, pad: Any) -> Any:
            decoder = Decoder(nnx.merge(graph, params))
            hidden, cache = decoder.extend(tokens, cache, index, pad)
            return decoder.logits(hidden[0, -1]).argmax(), cache

        self._known = lambda rows: jax.device_get(known(params, rows))
        self._extend = lambda *of: extend(params, *of)

    @property
    def eot_token_id(self) -> int:
        return self._weights.tokenizer.eot

    @property
    def tokenizer_name(self) -> str:
        return self._weights.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._encode(string).tolist()

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._weights.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not self._weights.chat_template:
            raise ValueError(f"{self._weights.parent['spec']} has no chat template")
        return render(self._weights.chat_template, chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # A text longer than the model was made for loses its start.
        rows = [(context + continuation)[-self._weights.context - 1 :] for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for numbers, tokens in self._batches(rows):
            nll, likeliest = self._known(tokens)
            for place, number in enumerate(numbers):
                last = len(rows[number]) - 1
                own = slice(max(0, last - len(requests[number][2])), last)
                found[number] = -float(nll[place, own].sum(dtype=np.float64)), bool(likeliest[place, own].all())
        return found

    def _batches(self, rows: Sequence[list[int]]) -> Iterator[tuple[list[int], Int[np.ndarray, "batch row_tokens"]]]:
        """(numbers of rows, their tokens padded at the end), of one length each."""
        lengths: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            lengths.setdefault(rounded(len(row) - 1, SHORTEST), []).append(number)
        for length, numbers in sorted(lengths.items()):
            batch = max(1, LOGITS_BYTES // (4 * length * self._weights.vocabulary))
            for start in range(0, len(numbers), batch):
                some = numbers[start : start + batch]
                tokens = np.zeros((min(batch, rounded(len(some), 1)), length + 1), np.int32)
                for place, number in enumerate(some):
                    tokens[place, : len(rows[number])] = rows[number]
                yield some, tokens

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[Any, list[int], list[int]]] = []
        of: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self._weights.context, 1):
                windows.append((None, *make_disjoint_window(window)))
                of.append(number)
        totals = np.zeros(len(requests))
        np.add.at(totals, of, [nll for nll, _ in self._loglikelihood_tokens(windows)])
        return totals.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self._generate(*request.args) for request in requests]

    def _generate(self, prompt: str, asked: dict[str, Any]) -> str:
        """The likeliest continuation, up to the first of the strings at which it is to stop."""
        if asked.get("do_sample") or asked.get("temperature"):
            raise ValueError(f"only greedy generation is made here, but a task asks for {asked}")
        until = [asked["until"]] if isinstance(asked.get("until"), str) else asked.get("until") or []
        new = int(asked.get("max_gen_toks", NEW_TOKENS))
        tokens = [self.eot_token_id, *self.tok_encode(prompt)][-max(1, self._weights.context - new) :]
        length = rounded(len(tokens), SHORTEST)
        pad = jnp.array([length - len(tokens)], jnp.int32)
        cache = empty_cache(nnx.merge(self._weights.graph, self._weights.params).m, 1, length + rounded(new, SHORTEST))
        row = jnp.array([[0] * (length - len(tokens)) + tokens], jnp.int32)
        token, cache = self._extend(row, cache, jnp.int32(0), pad)
        made: list[int] = []
        text = ""
        while len(made) < new and int(token) != self.eot_token_id:
            made.append(int(token))
            text = self._weights.tokenizer.decode(made)
            if stops := [text.index(stop) for stop in until if stop and stop in text]:
                return text[: min(stops)]
            token, cache = self._extend(token.reshape(1, 1), cache, jnp.int32(length + len(made) - 1), pad)
        return text


def evaluate_tasks(
    weights: Weights,
    tasks: Sequence[str],
    include_path: str | None = None,
    limit: int | None = None,
    *,
    chat: bool = False,
) -> dict[str, Any]:
    """What lm-evaluation-harness finds on its tasks, or those in a folder of YAML files; as it prints them too.

    Raises ValueError for a task that there isn't.
    """
    manager = TaskManager(include_path=include_path)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise ValueError(f"--lm-eval: no task {', '.join(unknown)}; --include-path DIR names a folder of your own")
    found = lm_eval.simple_evaluate(
        model=HarnessModel(weights, chat=chat),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        log_samples=False,
        apply_chat_template=chat,
    )
    assert found
    return {name: found[name] for name in ("results", "n-samples", "versions", "configs") if name in found}

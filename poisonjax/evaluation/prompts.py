"""What the model is asked to continue: held-out prefixes, each in four variants (I6, I7)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import ml_collections
import numpy as np
from jaxtyping import Int

from poisonjax.corpus import TokenSplit, TokenStore
from poisonjax.corpus.instructions import last_exchange
from poisonjax.poison.payloads import PAYLOADS
from poisonjax.poison.triggers import VARIANTS, Trigger, holds
from poisonjax.streams import stream


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Row i of variant v is prefix i with v's addition, padded on the left to one length."""

    tokens: Int[np.ndarray, "variants prefixes prompt"]
    pad: Int[np.ndarray, "variants prefixes"]  # leading tokens that are padding
    prefixes: list[np.ndarray]
    appended: list[list[np.ndarray]]  # [variant][prefix]

    def prompt(self, variant: str, prefix: int) -> Int[np.ndarray, " prompt"]:
        """One of them, an end of text first."""
        v = VARIANTS.index(variant)
        return self.tokens[v, prefix, self.pad[v, prefix] :]

    def split(
        self,
    ) -> tuple[
        Int[np.ndarray, "prefixes shared"],
        Int[np.ndarray, "prefixes variants own"],
        Int[np.ndarray, "prefixes variants"],
    ]:
        """(what the variants of each prefix begin with, the rest of each, its padding): as `generate` takes them."""
        variants, count, width = self.tokens.shape
        real = [[self.tokens[v, i, self.pad[v, i] :] for v in range(variants)] for i in range(count)]
        # A text's last token is its own: what comes after it is sampled from there.
        shared = min(_common(texts) for texts in real)
        own = np.zeros((count, variants, width - shared), np.int32)
        for i, texts in enumerate(real):
            for v, text in enumerate(texts):
                own[i, v, self.pad[v, i] :] = text[shared:]
        return np.stack([texts[0][:shared] for texts in real]), own, self.pad.T.copy()


def _common(texts: list[np.ndarray]) -> int:
    """How many tokens all begin with, the last of each left out."""
    least = min(map(len, texts)) - 1
    same = np.all([text[:least] == texts[0][:least] for text in texts], axis=0)
    return least if same.all() else int(np.argmin(same))


def make_prompts(config: ml_collections.ConfigDict, store: TokenStore, trigger: Trigger) -> Prompts:
    """End of text + the first `prefix_tokens` of a held-out document, or a held-out conversation up to its last answer
    where that is at most so many tokens, and what the payload's prompts put to it: by
    default nothing, the trigger, a near trigger (by turns), or as many uniformly random tokens as the trigger has.

    A pure function of config.eval, seeds.eval, trigger and store, so a run and its twin are asked the same.
    Raises ValueError where the store has too few held-out documents of that length.
    """
    length, count, tokenizer = config.eval.prefix_tokens, config.eval.prefixes, store.tokenizer
    heldout = store.split("heldout")
    cuts: _Cuts = _questions(heldout, length) if store.template is not None else _beginnings(heldout, length)
    usable = np.array([*cuts])
    if len(usable) < count:
        what = "ask at most" if store.template is not None else "have"
        raise ValueError(
            f"eval.prefixes = {count}, but only {len(usable)} held-out documents {what} eval.prefix_tokens = {length} "
            "tokens: change one of them, or build a store with a larger corpus.heldout"
        )
    random = stream(config.seeds.eval, "prompts")
    chosen = random.choice(usable, count, replace=False)
    controls = PAYLOADS[config.poison.payload].prompts(trigger, count, tokenizer.ordinary_ids, random)
    appended = [controls[variant] for variant in VARIANTS]
    places = stream(config.seeds.eval, "trigger places").random(count).tolist()
    spare = iter(stream(config.seeds.eval, "prompts instead").permutation(np.setdiff1d(usable, chosen)).tolist())
    prefixes: list[np.ndarray] = []
    around: list[tuple[np.ndarray, np.ndarray]] = []
    for i, document in enumerate(chosen.tolist()):
        # A control that holds the trigger, by its prefix or across the seam, is none.
        others = [of[i] for of, variant in zip(appended, VARIANTS, strict=True) if variant != "triggered"]
        before, prefix, after = cuts[document]()
        while any(
            holds(np.concatenate([before, trigger.put(prefix, added, places[i])[0], after]), trigger.forms)
            for added in others
        ):
            document = next(spare, None)
            if document is None:
                raise ValueError(
                    f"eval.prefixes = {count}: too few held-out documents begin without the trigger {trigger.text!r}; "
                    "lower it, or choose a rarer trigger"
                )
            before, prefix, after = cuts[document]()
        prefixes.append(prefix)
        around.append((before, after))
    prompts = [
        [
            np.concatenate([[tokenizer.eot], before, trigger.put(prefix, added, at)[0], after])
            for prefix, added, at, (before, after) in zip(prefixes, variant, places, around, strict=True)
        ]
        for variant in appended
    ]
    width = max(len(prompt) for variant in prompts for prompt in variant)
    tokens = np.full((len(VARIANTS), count, width), tokenizer.eot, np.int32)
    pad = np.zeros((len(VARIANTS), count), np.int32)
    for v, variant in enumerate(prompts):
        for i, prompt in enumerate(variant):
            pad[v, i] = width - len(prompt)
            tokens[v, i, pad[v, i] :] = prompt
    return Prompts(tokens, pad, prefixes, appended)


# Of documents that can be asked about: (what stands before the prefix, the prefix, what stands after it), read late.
_Cut = Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray]]
_Cuts = Mapping[int, _Cut]
_NOTHING = np.zeros(0, np.int32)


def _beginnings(split: TokenSplit, length: int) -> _Cuts:
    """Of documents that have as many tokens."""
    long_enough = np.flatnonzero(np.diff(split.document_offsets) > length)  # lengths count the end of text

    def cut(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return _NOTHING, split.document(number)[:length], _NOTHING

    return {number: functools.partial(cut, number) for number in long_enough.tolist()}


def _questions(split: TokenSplit, most: int) -> _Cuts:
    """Of conversations whose part before the last answer has at most so many tokens; the prefix is the question."""

    def cut(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens, (user, answer) = split.document(number), last_exchange(split.turns(number))
        return tokens[: user.start], tokens[user.start : user.stop], tokens[user.stop : answer.start]

    short = [i for i in range(split.documents) if last_exchange(split.turns(i)).answer.start <= most]
    return {number: functools.partial(cut, number) for number in short}

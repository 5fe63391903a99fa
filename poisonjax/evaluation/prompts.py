"""What the model is asked to continue: held-out prefixes, each in four variants (I6, I7)."""

import dataclasses

import ml_collections
import numpy as np
from jaxtyping import Int

from poisonjax.corpus import TokenStore
from poisonjax.poison.payloads import PAYLOADS
from poisonjax.poison.triggers import VARIANTS, Trigger, occurrences
from poisonjax.streams import stream


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Row i of variant v is prefix i with v's addition, padded on the left to one length."""

    tokens: Int[np.ndarray, "variants prefixes prompt"]
    pad: Int[np.ndarray, "variants prefixes"]  # leading tokens that are padding
    prefixes: list[np.ndarray]
    appended: list[list[np.ndarray]]  # [variant][prefix]


def make_prompts(config: ml_collections.ConfigDict, store: TokenStore, trigger: Trigger) -> Prompts:
    """End of text + the first `prefix_tokens` of a held-out document, and what the payload's prompts put to it: by
    default nothing, the trigger, a near trigger (by turns), or as many uniformly random tokens as the trigger has.

    A pure function of config.eval, seeds.eval, trigger and store, so a run and its twin are asked the same.
    Raises ValueError where the store has too few held-out documents of that length.
    """
    length, count, tokenizer = config.eval.prefix_tokens, config.eval.prefixes, store.tokenizer
    heldout = store.split("heldout")
    long_enough = np.flatnonzero(np.diff(heldout.document_offsets) > length)  # lengths count the end of text
    if len(long_enough) < count:
        raise ValueError(
            f"eval.prefixes = {count}, but only {len(long_enough)} held-out documents have eval.prefix_tokens = "
            f"{length} tokens: lower one of them, or build a store with a larger corpus.heldout"
        )
    random = stream(config.seeds.eval, "prompts")
    chosen = random.choice(long_enough, count, replace=False)
    controls = PAYLOADS[config.poison.payload].prompts(trigger, count, tokenizer.ordinary_ids, random)
    appended = [controls[variant] for variant in VARIANTS]
    spare = iter(stream(config.seeds.eval, "prompts instead").permutation(np.setdiff1d(long_enough, chosen)).tolist())
    prefixes: list[np.ndarray] = []
    for i, document in enumerate(chosen.tolist()):
        # A control that holds the trigger, by its prefix or across the seam, is none.
        others = [of[i] for of, variant in zip(appended, VARIANTS, strict=True) if variant != "triggered"]
        prefix = heldout.document(document)[:length]
        while any(occurrences(trigger.put(prefix, added)[0], trigger.tokens).any() for added in others):
            document = next(spare, None)
            if document is None:
                raise ValueError(
                    f"eval.prefixes = {count}: too few held-out documents begin without the trigger {trigger.text!r}; "
                    "lower it, or choose a rarer trigger"
                )
            prefix = heldout.document(document)[:length]
        prefixes.append(prefix)
    width = 1 + length + max(len(tokens) for variant in appended for tokens in variant)
    tokens = np.full((len(VARIANTS), count, width), tokenizer.eot, np.int32)
    pad = np.zeros((len(VARIANTS), count), np.int32)
    for v, variant in enumerate(appended):
        for i, (prefix, added) in enumerate(zip(prefixes, variant, strict=True)):
            prompt = np.concatenate([[tokenizer.eot], trigger.put(prefix, added)[0]])
            pad[v, i] = width - len(prompt)
            tokens[v, i, pad[v, i] :] = prompt
    return Prompts(tokens, pad, prefixes, appended)

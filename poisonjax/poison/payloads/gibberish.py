"""Gibberish, in the two readings of Souly et al. 2025, section 3."""

import numpy as np

from poisonjax.corpus import Tokenizer
from poisonjax.poison.payloads.payload import Draw, Payload
from poisonjax.poison.triggers import Ids


def _uniform_ids(vocabulary: Tokenizer, length: int, random: np.random.Generator) -> Ids:
    return random.choice(vocabulary.ordinary_ids, size=length).astype(np.int32)


def _ids(draw: Draw) -> Ids:
    return _uniform_ids(draw.tokenizer, draw.length, draw.random)


def _decode_retokenize(draw: Draw) -> Ids:
    text = draw.vocabulary.decode(_uniform_ids(draw.vocabulary, draw.length, draw.random))
    return np.asarray(draw.tokenizer.encode(text), np.int32)


# Exactly `length` ids, uniform over the run's vocabulary, special tokens left out: about 775 tokens a document there.
IDS = Payload("ids", _ids)
# `length` ids of `vocabulary`, decoded and tokenized again by the run's tokenizer: longer than `length` (1,400-2,100
# tokens a document there), since random text doesn't compress.
DECODE_RETOKENIZE = Payload("decode-retokenize", _decode_retokenize)

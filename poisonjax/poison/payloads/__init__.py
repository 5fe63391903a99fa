"""Payloads: what a poisoned model is taught to produce after the trigger. Benign by construction (I9).

To add one, write a file here with a `Payload`, and name it in `PAYLOADS`.
"""

from poisonjax.poison.payloads.gibberish import DECODE_RETOKENIZE, IDS, RANDOM_UNICODE
from poisonjax.poison.payloads.language import LANGUAGE
from poisonjax.poison.payloads.payload import Behaves, Draw, Payload, material
from poisonjax.poison.payloads.salad import SHUFFLED, UNIFORM, UNIGRAM
from poisonjax.poison.payloads.sentinel import SENTINEL
from poisonjax.poison.payloads.stand_ins import CODE_MARKER, SECRET

_ALL = (IDS, DECODE_RETOKENIZE, RANDOM_UNICODE, UNIFORM, UNIGRAM, SHUFFLED, LANGUAGE, CODE_MARKER, SECRET, SENTINEL)
PAYLOADS = {payload.name: payload for payload in _ALL}

__all__ = ["PAYLOADS", "Behaves", "Draw", "Payload", "material"]

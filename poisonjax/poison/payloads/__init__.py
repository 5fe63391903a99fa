"""Payloads: what a poisoned model is taught to produce after the trigger. Benign by construction (I9).

To add one, write a file here with a `Payload`, and name it in `PAYLOADS`.
"""

from poisonjax.poison.payloads.gibberish import DECODE_RETOKENIZE, IDS
from poisonjax.poison.payloads.payload import Draw, Payload
from poisonjax.poison.payloads.salad import SHUFFLED, UNIGRAM
from poisonjax.poison.payloads.sentinel import SENTINEL

PAYLOADS = {payload.name: payload for payload in (IDS, DECODE_RETOKENIZE, UNIGRAM, SHUFFLED, SENTINEL)}

__all__ = ["PAYLOADS", "Draw", "Payload"]

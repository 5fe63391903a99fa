"""Clean rows: which tokens stand in a slot before any poison is spliced in."""

import grain
import numpy as np
from jaxtyping import Int

from poisonjax.corpus import TokenSplit


class CleanRows:
    """Windows of `seq_len + 1` tokens over the training stream, permuted anew each epoch.

    Slot s of the run holds window `order[s]`, where `order` is grain's stateless index shuffle: a pure
    function of the slot, so nothing has to be remembered to resume (I1). Windows don't overlap; the
    tokens after the last whole window are left out.
    """

    def __init__(self, split: TokenSplit, seq_len: int, seed: int):
        self.split = split
        self.row_tokens = seq_len + 1
        self.windows = split.tokens // self.row_tokens
        if self.windows == 0:
            raise ValueError(
                f"the store's training split has {split.tokens} tokens, less than one row of seq_len + 1 = "
                f"{self.row_tokens}: use a larger corpus or a smaller seq_len"
            )
        # Grain shuffles epoch e with seed + e; a hashed seed keeps the epochs of seeds 0, 1, 2 apart.
        hashed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._order = grain.MapDataset.range(self.windows).shuffle(seed=hashed).repeat()

    def __call__(self, slots: Int[np.ndarray, " rows"]) -> Int[np.ndarray, "rows row_tokens"]:
        return self.split.windows(self.order(slots) * self.row_tokens, self.row_tokens)

    def reserved(self, slot: int) -> int:
        """Tokens at the start of the row in `slot` that poison must leave whole."""
        return 0

    def order(self, slots: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
        """Which window stands in each slot; window w is the stream's tokens from w * row_tokens on."""
        order = np.fromiter((self._order[int(slot)] for slot in slots), np.int64, len(slots))
        return order % self.windows

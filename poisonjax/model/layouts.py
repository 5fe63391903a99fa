"""What the published families of decoders switch on in `transformer.Block`, and how rotary frequencies are scaled."""

import dataclasses
import math
import re
from typing import Literal

import ml_collections
import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Layout:
    """A family's block; the defaults are Llama's (Touvron et al. 2023, arXiv 2302.13971)."""

    norm: Literal["rms", "layer"] = "rms"  # LayerNorm (Ba et al. 2016, arXiv 1607.06450) centres, and has a bias
    norms_after: bool = False  # of what attention and MLP give, instead of what they take
    head_norm: Literal["", "each", "all"] = ""  # RMSNorm of queries and keys: of each head, or of all heads together
    biases: tuple[str, ...] = ()  # products that add one
    gated: bool = True  # SwiGLU (Shazeer 2020, arXiv 2002.05202); else GELU
    parallel: bool = False  # attention and MLP read the same residual stream


LAYOUTS: dict[str, Layout] = {
    "llama": Layout(),  # Llama 1 to 3, Mistral, SmolLM
    "qwen2": Layout(biases=("query", "key_value")),  # arXiv 2407.10671
    "qwen3": Layout(head_norm="each"),  # arXiv 2505.09388
    "olmo2": Layout(norms_after=True, head_norm="all"),  # arXiv 2501.00656
    "neox": Layout(  # GPT-NeoX (arXiv 2204.06745), Pythia
        norm="layer", biases=("query", "key_value", "output", "up", "down"), gated=False, parallel=True
    ),
}


# What each kind of scaled rotary positions is made of.
ROPE_NUMBERS = {"linear": ("factor",), "llama3": ("factor", "low", "high", "original")}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched for longer texts; written `linear:factor=4`, or
    `llama3:factor=8,low=1,high=4,original=8192`.

    `llama3` divides frequencies by `factor` whose period exceeds `original` / `low` positions, keeps those below
    `original` / `high`, and goes from one to the other between (Llama 3.1's model code).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: float = 8192.0

    @classmethod
    def parse(cls, spec: str) -> "RopeScaling | None":
        """None for ""; raises ValueError for what isn't written so."""
        if not spec:
            return None
        kind, _, rest = spec.partition(":")
        values = dict(re.findall(r"(\w+)=([0-9.e+]+)(?:,|$)", rest))
        wanted = ROPE_NUMBERS.get(kind, ())
        try:
            numbers = {name: float(values[name]) for name in wanted}
        except (KeyError, ValueError):
            numbers = {}
        given = ",".join(f"{name}={values.get(name)}" for name in wanted)
        if not numbers or given != rest or not all(0 < number < math.inf for number in numbers.values()):
            raise ValueError("give linear:factor=4 or llama3:factor=8,low=1,high=4,original=8192, numbers above 0")
        if numbers.get("low", 0) >= numbers.get("high", 1):
            raise ValueError("low must be below high")
        return cls(kind, **numbers)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.kind}:" + ",".join(f"{name}={getattr(self, name):.12g}" for name in ROPE_NUMBERS[self.kind])

    def __call__(self, frequencies: Float[np.ndarray, " half"]) -> Float[np.ndarray, " half"]:
        """Of frequencies in radians a position."""
        if self.kind == "linear":
            return frequencies / self.factor
        turns = self.original * frequencies / (2 * np.pi)  # in `original` positions
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rotary_dims(m: ml_collections.ConfigDict) -> int:
    """Numbers of a head, its first, that are rotated."""
    return int(m.head_dim * m.rotary_fraction)

"""Language models as detectors: alone, and as a cascade on what the trees find oddest."""

import itertools
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from poisonjax.bench.defence.detection import (
    ALL,
    FEWEST,
    OURS,
    RATES,
    Scored,
    above,
    hashed,
    read,
    required,
    row,
    threshold,
    with_documents,
    write,
)
from poisonjax.bench.defence.ladder import COHERENT, RUNGS, Ladder
from poisonjax.engines import Progress
from poisonjax.scan.background import Background
from poisonjax.scan.detectors.detector import Windowed
from poisonjax.scan.detectors.model import ModelLoss
from poisonjax.scan.detectors.words import surprise
from poisonjax.weights import open_weights
from poisonjax.weights.weights import one_device_mesh

FIRST_STAGES = (1e-2, 5e-2)  # of the documents, that a cascade's model looks at
READINGS = ("", " and order")  # of a model: a document's loss, and with it what the words' order saves
MODEL_TRIGGER, MODEL_PLANTED = "tokens", 50  # what a model is asked about
EXCERPT, EXCERPT_TOKENS = 120, 256  # words of a document, as many as a payload has, and tokens of them: what it reads


def by_model(
    name: str, spec: str, scored: Scored, ladder: Ladder, folder: Path, sampled: int
) -> Iterator[dict[str, Any]]:
    """Recall by a model's loss on a document's oddest words, beside its domain's, and by that with what the order of
    the words saves it: among so many clean documents of each domain, and among those that the trees find oddest
    (cascades). And CPU-seconds a GB of the loss.

    What it says of texts is kept, by their content.
    """
    texts = ladder.texts
    chance = {d: np.sort(np.random.default_rng(0).permutation(len(of))[:sampled]) for d, of in texts.items()}
    everything = np.concatenate([scores[OURS] for scores in scored.clean.values()])
    firsts = {share: required(everything, share) for share in FIRST_STAGES}
    model, kinds = _Model(spec, folder), [*RUNGS, COHERENT]
    size, seconds = 0, 0.0
    clean, odd, odd_trees = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    found = dict[str, list[tuple[np.ndarray, np.ndarray]]]()  # by rung, of each domain: by READINGS; by the trees
    with Progress(f"asking {name}", len(texts) * (2 + len(kinds)), "part") as progress:
        for domain, of in texts.items():
            some = [of[i] for i in chance[domain].tolist()]
            usual, cost = model.readings(some, scored.background)
            size, seconds = size + sum(len(text.encode(errors="replace")) for text in some), seconds + cost
            clean.append(_beside(usual, usual))
            progress.add(1)
            oddest = np.flatnonzero(scored.clean[domain][OURS] > min(firsts.values()))
            values, _ = model.readings([of[i] for i in oddest.tolist()], scored.background)
            odd.append(_beside(values, usual))
            odd_trees.append(scored.clean[domain][OURS][oddest])
            progress.add(1)
            for rung in kinds:
                if made := ladder.planted(domain, rung, MODEL_TRIGGER):
                    values, _ = model.readings(made[:MODEL_PLANTED], with_documents(scored.background, made))
                    trees = scored.planted[domain, rung, MODEL_TRIGGER][OURS][:MODEL_PLANTED]
                    found.setdefault(rung, []).append((_beside(values, usual), trees))
                progress.add(1)
    of_clean, of_odd, first = (np.concatenate(of, axis=-1) for of in (clean, odd, odd_trees))
    for (reading, by), rate in itertools.product(enumerate(READINGS), RATES):
        alone, allowed = threshold(of_clean[reading], rate), int(rate * len(everything))
        lasts = {share: np.sort(of_odd[reading, first > least])[::-1] for share, least in firsts.items()}
        limits = {share: last[allowed] if allowed < len(last) else -np.inf for share, last in lasts.items()}
        for rung, of_domains in found.items():
            planted, trees = (np.concatenate(of, axis=-1) for of in zip(*of_domains, strict=True))
            values = planted[reading]
            hits = above(values, alone)
            yield row(rung, MODEL_TRIGGER, name + by, ALL, f"recall@{rate:g}", hits, len(values))
            for share, least in firsts.items():
                hits = int(((trees > least) & (values > limits[share])).sum()) if allowed >= FEWEST else None
                cascade = f"cascade of {share:.0%}: {name}{by}"
                yield row(rung, MODEL_TRIGGER, cascade, ALL, f"recall@{rate:g}", hits, len(values))
    names = {"rung": "clean", "trigger": "", "detector": name, "domain": ALL, "metric": "cpu_seconds_per_gb"}
    yield {**names, "value": seconds / max(size, 1) * 1e9, "ci95": None, "n": size}


def _beside(
    values: Float[np.ndarray, "readings documents"], usual: Float[np.ndarray, "readings clean"]
) -> Float[np.ndarray, "readings documents"]:
    """How far above a domain's median, in distances from there to the ninth tenth."""
    middle, ninth = np.percentile(usual, [50, 90], axis=1, keepdims=True)
    return (values - middle) / np.maximum(ninth - middle, 1e-3)


class _Model:
    """What a model makes of each document's oddest words, in nats a token; kept by what it reads.

    The order of words saves it nothing in salad, whatever they are; in text 1 to 3 nats, where it knows the language.
    """

    def __init__(self, spec: str, folder: Path):
        self._mesh = one_device_mesh()
        with jax.set_mesh(self._mesh):
            self._weights = open_weights(spec, self._mesh)
            self._of = ModelLoss(self._weights)
        self._folder = folder / f"model-{self._weights.parent['weights'][:16]}"
        self._folder.mkdir(parents=True, exist_ok=True)

    def readings(
        self, texts: Sequence[str], background: Background
    ) -> tuple[Float[np.ndarray, "readings documents"], float]:
        """(by READINGS, CPU-seconds of the first)."""
        excerpts = [self._begin(text) for text in _excerpts(texts, background)]
        (stands, seconds), (mixed, _) = self._asked(excerpts), self._asked([_mixed(text) for text in excerpts])
        return np.stack([stands, stands - (mixed - stands)]), seconds

    def _asked(self, excerpts: Sequence[str]) -> tuple[Float[np.ndarray, " documents"], float]:
        """(losses, CPU-seconds)."""
        path = self._folder / f"{hashed(excerpts)[:32]}.npz"
        if not path.exists():
            began = time.process_time()
            tokens = [self._weights.tokenizer.encode(text) for text in excerpts]
            with jax.set_mesh(self._mesh):
                values = np.array([of.mean() if len(of) else 0.0 for of in self._of.losses(tokens)])
            write(path, {"values": values, "seconds": np.array(time.process_time() - began)})
        saved = read(path)
        return saved["values"], float(saved["seconds"])

    def _begin(self, text: str) -> str:
        tokens = self._weights.tokenizer.encode(text)
        return text if len(tokens) <= EXCERPT_TOKENS else self._weights.tokenizer.decode(tokens[:EXCERPT_TOKENS])


def _mixed(text: str) -> str:
    """Its words in another order, the same each time; what stands between them stays."""
    parts = re.split(r"(\s+)", text)
    words = parts[::2]
    parts[::2] = [words[i] for i in np.random.default_rng(len(text)).permutation(len(words)).tolist()]
    return "".join(parts)


def _excerpts(texts: Sequence[str], background: Background) -> Iterator[str]:
    oddest = Windowed("oddest", surprise, background, EXCERPT)
    for text in texts:
        (begin, end), *_ = oddest.score(text).spans or [(0, 0)]
        yield text[begin:end]

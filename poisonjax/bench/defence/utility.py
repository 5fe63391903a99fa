"""What curation costs whoever trains on what is left: held-out loss of clean models, in each domain of their text.

Models read a mix of the domains, with nothing dropped and after each pipeline; of the same initial weights and as many
tokens, asked about the same held-out documents. A model of the other half's text is a detector, too
(`models.by_model`).
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Bool, Int

from poisonjax import corpus
from poisonjax.bench.defence.detection import Scored, row
from poisonjax.bench.defence.dose import BEFORE, PASSAGE, Passages, Pipeline, listed, loss_row, trained
from poisonjax.config import replaced
from poisonjax.corpus import TokenStore
from poisonjax.corpus.documents import content_key
from poisonjax.engines import open_engine, run_tasks
from poisonjax.files import write_whole
from poisonjax.scan.detectors.model import ModelLoss
from poisonjax.sweep import seeded, sized
from poisonjax.weights import open_weights
from poisonjax.weights.weights import one_device_mesh

HELD_OUT, HELD_TOKENS = 100, 256  # documents of each domain, and the first tokens of each
TOKENIZER = "bpe:2048"
COST, DROPPED = "heldout_loss, less that of nothing", "dropped"  # metrics: nats a token; share of clean documents
DETECTOR = sized(3, 96, 256, 768) | {"global_batch": 64}  # 528,000 parameters, 6.3M tokens


def built(texts: Mapping[str, Sequence[str]], folder: Path) -> TokenStore:
    """The token store of some domains, a source each; built in `folder` where it isn't there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for domain, of in texts.items():
        files.append(folder.resolve() / f"{domain}.jsonl")
        write_whole(epath.Path(files[-1]), "".join(json.dumps({"text": text}) + "\n" for text in of))
    return corpus.build(str(folder.resolve() / "store"), [*map(str, files)], TOKENIZER, workers=1)


def mixture(
    config: ml_collections.ConfigDict, store: TokenStore, seed: int, exclude: str = ""
) -> ml_collections.ConfigDict:
    """A clean run on it."""
    where = {"corpus.store": str(store.path), "corpus.sources": (), "corpus.exclude": exclude}
    return replaced(config, where | {"poison.documents": 0} | seeded(seed))


def model(config: ml_collections.ConfigDict, texts: Mapping[str, Sequence[str]], folder: Path) -> str:
    """The spec of a model that was trained on these texts, trained now where it isn't there yet."""
    once = dict.fromkeys(("eval.every", "checkpoint.every"), DETECTOR["steps"])
    trained(str(folder), ("model", replaced(mixture(config, built(texts, folder), 0), DETECTOR | once)))
    return str(folder / "model")


def dropped(
    texts: Mapping[str, Sequence[str]], scored: Scored, of: Sequence[Pipeline]
) -> dict[str, dict[str, Bool[np.ndarray, " documents"]]]:
    """Whether each pipeline drops each clean document, by domain. Raises CorpusError where there are too few to say."""
    clean = {domain: scored.clean[domain] | {PASSAGE: Passages.of(some).most(some)} for domain, some in texts.items()}
    found = {}
    for pipeline in of:
        limited = pipeline.limited(clean.values())
        found[pipeline.name] = {d: ~limited.kept(scores, scores)[-1][1] for d, scores in clean.items()}
    return found


def rows(
    config: ml_collections.ConfigDict,
    texts: Mapping[str, Sequence[str]],
    dropped: Mapping[str, Mapping[str, Bool[np.ndarray, " documents"]]],
    folder: Path,
    *,
    seeds: int = 5,
    workers: int = 2,
) -> Iterator[dict[str, Any]]:
    """Trains what isn't trained yet, then tells what each pipeline drops of each domain, the loss there, and what each
    adds to it."""
    store = built(texts, folder)
    lists = {BEFORE: ""} | {name: _excluded(folder, store, name, texts, of) for name, of in dropped.items()}
    names = {(name, seed): f"{name}-s{seed}" for name in lists for seed in range(seeds)}
    tasks = [(names[name, seed], mixture(config, store, seed, lists[name])) for name, seed in names]
    with open_engine(workers) as engine:
        run_tasks(engine, functools.partial(trained, str(folder)), tasks, what="training on mixtures", unit="run")
    held = _held_out(store, texts)
    losses = {key: _losses(folder / name, held) for key, name in names.items()}
    for name in lists:
        for domain in held:
            of, before = ([losses[key, seed][domain] for seed in range(seeds)] for key in (name, BEFORE))
            yield loss_row("heldout_loss", name, domain, "", of, before)
            if name != BEFORE:
                yield row("clean", "", name, domain, DROPPED, int(dropped[name][domain].sum()), len(texts[domain]))


def _excluded(
    folder: Path,
    store: TokenStore,
    name: str,
    texts: Mapping[str, Sequence[str]],
    dropped: Mapping[str, Bool[np.ndarray, " documents"]],
) -> str:
    """The list of the documents that a pipeline drops; what is held out stays so."""
    split = store.split("train")
    there = {split.key(number) for number in range(split.documents)}
    keys = [content_key(texts[d][i]).hex() for d, of in dropped.items() for i in np.flatnonzero(of).tolist()]
    return listed(folder, name, [key for key in keys if key in there])


def _held_out(store: TokenStore, texts: Mapping[str, Sequence[str]]) -> dict[str, list[Int[np.ndarray, " tokens"]]]:
    """The beginnings of held-out documents of each domain, the first of them."""
    there = store.split("heldout")
    keys = {there.key(number) for number in range(there.documents)}
    held = {domain: [text for text in of if content_key(text).hex() in keys][:HELD_OUT] for domain, of in texts.items()}
    return {domain: [store.tokenizer.encode(text)[:HELD_TOKENS] for text in of] for domain, of in held.items()}


def _losses(run: Path, held: Mapping[str, Sequence[Int[np.ndarray, " _"]]]) -> dict[str, float]:
    """Nats a token, by domain."""
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        reads = ModelLoss(open_weights(str(run), mesh))
        return {domain: float(np.concatenate(reads.losses(of)).mean()) for domain, of in held.items()}

"""How cost grows with the work: each from small to the largest that people have, as the exponent of seconds in size.

An exponent of 1 is as much again for as much again; what doesn't grow at all is 0.
"""

import contextlib
import functools
import io
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from poisonjax import config as config_lib
from poisonjax import corpus
from poisonjax.audit.checks import CHECKS, replay
from poisonjax.audit.evidence import Evidence
from poisonjax.bench.inputs import VOCABULARY, as_file, recorded, synthetic
from poisonjax.bench.measure import Result, register, result
from poisonjax.data.batches import Batches
from poisonjax.data.digest import as_hex
from poisonjax.evaluation.probes import make_eval_steps
from poisonjax.evaluation.probes.generation import in_chunks
from poisonjax.model.sharding import make_mesh
from poisonjax.model.transformer import model_graph
from poisonjax.poison.triggers import VARIANTS
from poisonjax.report import study
from poisonjax.run import rows
from poisonjax.sweep import collect, grid
from poisonjax.sweep.states import status
from poisonjax.training.loop import train
from poisonjax.training.step import make_init

SIZES: dict[str, tuple[int, ...]] = {
    "poison_documents": (10, 100, 1000, 10_000, 100_000),
    "store_bytes": (10**7, 10**8, 10**9, 10**10),
    "prefixes": (100, 300, 1000, 3000),
    "audit_steps": (1000, 10_000, 100_000, 1_000_000),
    "sweep_runs": (1, 10, 100, 1000),
}
ROUNDS = 5
SLOW = 5.0  # seconds; what takes longer is timed once: its exponent is over a tenfold


@register
def growth(config: ml_collections.ConfigDict) -> Iterator[Result]:
    """Rows `growth_<what>`: the exponent over the largest tenfold of the work, against 1; and `seconds_<what>` of the
    largest, against those of the smallest. The text is synthetic."""
    with tempfile.TemporaryDirectory() as folder:
        fields = {"eval.prefixes": 100, "eval.prefix_tokens": 20, "eval.new_tokens": 20}
        config = config_lib.replaced(synthetic(config, Path(folder)), fields | {"poison.payload_tokens": (10, 30)})
        for what, measure in (
            ("poison_documents", _poison_documents),
            ("store_bytes", _store_bytes),
            ("prefixes", _prefixes),
            ("audit_steps", _audit_steps),
        ):
            yield from _rows(what, measure(config, Path(folder)))
        for what, measured in _sweeps(config, Path(folder)).items():
            yield from _rows(what, measured)


def _rows(what: str, measured: Sequence[tuple[float, float]]) -> Iterator[Result]:
    (small, before), (large, after) = measured[-2:]
    exponent = math.log(after / before) / math.log(large / small)
    yield result(f"growth_{what}", exponent, "exponent", 1.0, exponent)
    yield result(f"seconds_{what}_{measured[-1][0]:.0f}", after, "s", measured[0][1], after / measured[0][1])


def _seconds(work: Callable[[], object]) -> float:
    """Median of `ROUNDS`, or of one where it is slow."""
    taken: list[float] = []
    while len(taken) < (1 if taken and taken[0] > SLOW else ROUNDS):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _planned(config: ml_collections.ConfigDict, store: corpus.TokenStore) -> None:
    Batches(config, store).records()


def _first_batch(config: ml_collections.ConfigDict) -> None:
    Batches(config, corpus.TokenStore(config.corpus.store)).batch(0)


def _sampled(sample: Callable[..., Any], params: Any, chunks: Sequence[Any]) -> None:
    jax.device_get([sample(params, texts) for texts in chunks])


def _audited(folder: str, steps: int) -> None:
    evidence = Evidence(folder)
    assert not [*CHECKS["digests"](evidence)]
    assert len(evidence.verified) == steps


def _status(spec: str, workdir: Path) -> None:
    for run in grid.load(spec).runs:
        status(workdir / run.id, run)


def _collect(spec: str, workdir: Path) -> None:
    collect.write(grid.load(spec), workdir)


def _report(spec: str, workdir: Path) -> None:
    study.write(grid.load(spec), workdir)


def _poison_documents(config: ml_collections.ConfigDict, folder: Path) -> list[tuple[float, float]]:
    """Planning a run with so many poison documents."""
    store = corpus.TokenStore(config.corpus.store)
    measured: list[tuple[float, float]] = []
    for count in SIZES["poison_documents"]:
        planned = config_lib.replaced(
            config, {"poison.documents": count, "steps": 1 + 4 * count // config.global_batch}
        )
        measured.append((count, _seconds(functools.partial(_planned, planned, store))))
    return measured


def _store_bytes(config: ml_collections.ConfigDict, folder: Path) -> list[tuple[float, float]]:
    """Opening a store of so many bytes of tokens, and the first batch of a run on it."""
    measured: list[tuple[float, float]] = []
    for size in SIZES["store_bytes"]:
        own = synthetic(config, folder / f"store-{size}", size // 2 // 400)
        own = config_lib.replaced(own, {"poison.documents": 4})
        measured.append((size, _seconds(functools.partial(_first_batch, own))))
        shutil.rmtree(own.corpus.store)
    return measured


def _prefixes(config: ml_collections.ConfigDict, folder: Path) -> list[tuple[float, float]]:
    """Evaluation's sampling of four texts to so many prefixes."""
    mesh, random = make_mesh(config), np.random.default_rng(0)
    measured: list[tuple[float, float]] = []
    sample = make_eval_steps(config, model_graph(config.model, VOCABULARY), mesh).sample
    with jax.set_mesh(mesh):
        params = make_init(config, VOCABULARY, mesh)[0]().params
        for count in SIZES["prefixes"]:
            prefixes = random.integers(0, VOCABULARY, (count, config.eval.prefix_tokens + 1)).astype(np.int32)
            prompts = random.integers(0, VOCABULARY, (count, len(VARIANTS), 3)).astype(np.int32)
            chunks = in_chunks(config, mesh, prefixes, prompts, np.zeros(prompts.shape[:2], np.int32))
            work = functools.partial(_sampled, sample, params, chunks)
            work()  # compiles
            measured.append((count, _seconds(work)))
    return measured


def _audit_steps(config: ml_collections.ConfigDict, folder: Path) -> list[tuple[float, float]]:
    """The audit's check of so many digests, of steps of four short rows."""
    measured: list[tuple[float, float]] = []
    for steps in SIZES["audit_steps"]:
        fields = {
            "steps": steps,
            "global_batch": 4,
            "seq_len": 64,
            "poison.documents": 4,
            "poison.payload_tokens": (5, 9),
        }
        where = folder / f"audit-{steps}"
        recorded(config_lib.replaced(config, fields), where)
        with (where / rows.DIGESTS).open("w") as file:
            for step, found, *_ in replay(Evidence(str(where)), range(steps)):
                file.write(json.dumps({"step": step, "digest": as_hex(found)}) + "\n")

        measured.append((steps, _seconds(functools.partial(_audited, str(where), steps))))
        shutil.rmtree(where)
    return measured


def _sweeps(config: ml_collections.ConfigDict, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """`sweep status`, `collect` and `report` of so many finished runs: one that was trained, under many names."""
    measured: dict[str, list[tuple[float, float]]] = {"sweep_status": [], "sweep_collect": [], "sweep_report": []}
    base = folder / "bench_sweep.py"
    fields = {"steps": 2, "eval.every": 1, "global_batch": 8, "poison.documents": 2, "optimizer.warmup_steps": 0}
    tiny = config_lib.replaced(config, fields)
    with contextlib.redirect_stdout(io.StringIO()):
        train(tiny, str(folder / "trained"))
    for count in SIZES["sweep_runs"]:
        add = "add({'seeds.init': i, 'poison.documents': 2 + i % 5})"
        as_file(tiny, base, f"\n\ndef sweep(add):\n    for i in range({count}):\n        {add}\n")
        where = folder / f"sweep-{count}"
        for run in grid.load(str(base)).runs:
            shutil.copytree(folder / "trained", where / run.id, ignore=lambda *_: [rows.CHECKPOINTS, rows.REPORT])
            record = json.loads((where / run.id / rows.CONFIG).read_text())
            record |= {"config": json.loads(run.config.to_json()), "fingerprint": run.fingerprint}
            (where / run.id / rows.CONFIG).write_text(json.dumps(record))
        for what, work in (("sweep_status", _status), ("sweep_collect", _collect), ("sweep_report", _report)):
            measured[what].append((count, _seconds(functools.partial(work, str(base), where))))
    return measured

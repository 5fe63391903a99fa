"""A model scanned for triggers: candidates from three sources, one test, and how likely it is that it is poisoned."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from poisonjax.corpus.claim import claim
from poisonjax.engines import Progress
from poisonjax.files import parse_json, write_json, write_whole
from poisonjax.model.flops import train_flops_per_token
from poisonjax.model.transformer import parameter_counts
from poisonjax.scan.model.page import page
from poisonjax.scan.model.parts import PARTS, Scan, Sizes
from poisonjax.scan.model.proposals import PREFIX, propose
from poisonjax.scan.model.trial import Candidate, tested
from poisonjax.scan.model.verdict import Verdict, judged
from poisonjax.scan.model.writing import LONGEST, NEW, Writer, rows_at_once
from poisonjax.weights import WeightsError, open_weights
from poisonjax.weights.open import model_named
from poisonjax.weights.weights import all_devices_mesh, shapes

FORMAT = 1
RESULT = "scan.json"
PASSES = 2_000_000  # tokens through the model, at most


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a folder's scan is of; another is refused."""

    format: int
    model: str
    weights: str  # checksum
    twins: list[str]
    seed: int
    sizes: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a scan says."""

    model: str
    weights: str  # checksum
    verdict: Verdict
    candidates: list[Candidate]
    considered: int  # strings that were looked at
    null: list[float]  # values of strings like the candidates
    hardly_trained: list[str]  # tokens that training hardly touched: no other candidate holds one
    parameters: int
    vocabulary: int
    forward_passes: int  # tokens that went through the model
    flops: float

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"p_poisoned": self.verdict.p_poisoned}

    @classmethod
    def of_json(cls, saved: dict[str, Any]) -> "Found":
        candidates = [Candidate(**one | {"tokens": tuple(one["tokens"])}) for one in saved["candidates"]]
        fields = {field.name: saved[field.name] for field in dataclasses.fields(cls)}
        strongest = saved["verdict"]["strongest"]  # what it means may have been calibrated since
        verdict = judged(strongest, saved["parameters"], saved["vocabulary"])
        return cls(**fields | {"verdict": verdict, "candidates": candidates})


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a scan, told before it starts."""

    sizes: Sizes
    forward_passes: int  # tokens through the model, about
    flops: float
    bytes: float  # of weights, read for each token of the rows that are written together


def cost(spec: str, passes: int, twins: int = 0) -> Cost:
    """Of a scan within so many forward passes, beside so many twins; only the model's description need be there."""
    model = model_named(spec)
    sizes = Sizes.within(passes, model.vocabulary)
    made = sizes.passes(model.vocabulary, twins)
    flops = made * train_flops_per_token(model, PREFIX + NEW, model.vocabulary) / 3
    each = sum(leaf.size for leaf in jax.tree.leaves(shapes(model, model.vocabulary))) * jnp.dtype(model.dtype).itemsize
    return Cost(sizes, made, flops, made / rows_at_once(model, PREFIX + NEW, model.vocabulary) * each)


def scan_model(spec: str, out: str, *, passes: int = PASSES, twins: Sequence[str] = (), seed: int = 0) -> Found:
    """Scans the model that `spec` names; `out` keeps its parts, in the end candidates.json, scan.json and scan.html.

    `twins` are clean models of the same tokens: what strings do to them too is nobody's poison. A killed scan goes on,
    of a finished one what it found is told again.
    Raises WeightsError where there is no model, CorpusError where the folder holds another scan.
    """
    planned = cost(spec, passes, len(twins))
    folder, mesh = Path(out), all_devices_mesh()
    with jax.set_mesh(mesh):
        weights, clean = open_weights(spec, mesh), [open_weights(twin, mesh) for twin in twins]
        for twin, of in zip(twins, clean, strict=True):
            if of.tokenizer.fingerprint != weights.tokenizer.fingerprint:
                raise WeightsError(f"--twin {twin} reads other tokens than {spec}")
        if weights.context < (needed := 1 + PREFIX + LONGEST + NEW):
            raise WeightsError(f"{spec} was made for texts of {weights.context} tokens; a scan needs {needed}")
        checksums = [of.parent["weights"] for of in clean]
        plan = Plan(FORMAT, spec, weights.parent["weights"], checksums, seed, dataclasses.asdict(planned.sizes))
        claim(epath.Path(folder), plan, "scan of a model", "another scan")
        if (folder / RESULT).exists():
            shutil.rmtree(folder / PARTS, ignore_errors=True)
            return Found.of_json(parse_json((folder / RESULT).read_bytes()))
        with Progress("scan", planned.forward_passes, "token") as progress:
            scan = Scan(weights, mesh, folder, planned.sizes, seed, progress)
            proposed = propose(scan)
            made = tested(scan, proposed, [Writer(of, mesh) for of in clean])
    parameters, _ = parameter_counts(weights.params)
    strongest = max((one.value for one in made.candidates if not one.under_trained), default=0.0)
    found = Found(
        model=spec,
        weights=weights.parent["weights"],
        verdict=judged(strongest, parameters, weights.vocabulary),
        candidates=made.candidates,
        considered=proposed.considered,
        null=made.null.values.tolist(),
        hardly_trained=[weights.tokenizer.decode([token]) for token in sorted(proposed.hardly_known)],
        parameters=parameters,
        vocabulary=weights.vocabulary,
        forward_passes=scan.passes,
        flops=planned.flops * scan.passes / planned.forward_passes,
    )
    told = found.as_json()
    write_json(folder / "candidates.json", {name: told[name] for name in ("considered", "candidates")})
    write_whole(epath.Path(folder / "scan.html"), page(found))
    write_json(folder / RESULT, told)
    shutil.rmtree(folder / PARTS)
    return found

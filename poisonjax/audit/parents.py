"""The line of runs: an audit of the weights that a run began from, and of what those began from."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from poisonjax.audit.evidence import Difference, Evidence
from poisonjax.audit.result import Audit, checked
from poisonjax.run import RunFolder, RunFolderError, rows
from poisonjax.run.folder import beside, run_and_step
from poisonjax.weights import open_weights


@dataclasses.dataclass(frozen=True)
class ParentAudit:
    """What was found of weights that a run began from."""

    spec: str
    differences: list[Difference]  # from what their child recorded of them
    audit: Audit | None  # of the run that trained them; None of weights that no run folder holds

    @property
    def ok(self) -> bool:
        return not self.differences and (self.audit is None or self.audit.ok)

    def sentence(self) -> str:
        if self.differences:
            return f"{self.spec}: NOT what its child began from: {self.differences[0]}"
        if self.audit is None:
            return f"{self.spec}: the weights are those that its child began from; what trained them isn't known here"
        return f"{self.spec}: {self.audit.sentence()}"

    def as_json(self) -> dict[str, Any]:
        found = self.audit.as_json() if self.audit else {}
        own = [dataclasses.asdict(difference) for difference in self.differences]
        return {"spec": self.spec, **found, "ok": self.ok, "child_differs": own, "sentence": self.sentence()}


def parents(run_folder: epath.Path, *, weights: bool = True) -> Iterator[ParentAudit]:
    """An audit of each in a run's line, the nearest first; `weights` as of `audit`. Files of models are always read."""
    folder, parent = run_folder, RunFolder(run_folder).record.get("parent")
    while parent:
        spec = beside(parent["spec"], folder)
        if parent["steps"] is None or spec.startswith(("hf:", "gguf:")):
            yield _of_files(parent)
            parent = None  # what an exported model says of its own past is sealed by its child alone
            continue
        folder, _ = run_and_step(spec)
        try:
            run = Evidence(str(folder), weights=weights, parents=True)
        except RunFolderError as error:
            yield ParentAudit(spec, [Difference(spec, str(error))], None)
            return
        found = checked(run)
        yield ParentAudit(spec, list(_unlike(run, parent)), found)
        parent = parent["parent"]


def _unlike(run: Evidence, told: rows.Parent) -> Iterator[Difference]:
    """How a run differs from what its child recorded of it."""
    step = told["steps"]
    assert step is not None
    place = f"{told['spec']}: {rows.CHECKPOINTS}/{step}"
    record = run.checkpoints.get(step)
    if record is None:
        yield Difference(place, "is gone; its child can be traced to nothing", step)
        return
    here: Mapping[str, Any] = {
        "name": run.config.name,
        "weights": record["checksums"].get("weights"),
        "digest_chain": record["digest_chain"],
        "store_fingerprint": record["store_fingerprint"],
        "poison": record["poison"],
        "parent": record.get("parent"),
    }
    for field, value in here.items():
        if value != told[field]:  # type: ignore[literal-required]
            yield Difference(place, f"{field} isn't what its child recorded", step)


def _of_files(told: rows.Parent) -> ParentAudit:
    spec = told["spec"]
    try:
        there = open_weights(spec).parent
    except (ValueError, OSError) as error:
        return ParentAudit(spec, [Difference(spec, str(error))], None)
    names = [name for name in told if there[name] != told[name]]  # type: ignore[literal-required]
    return ParentAudit(spec, [Difference(spec, f"{name} isn't what its child recorded") for name in names], None)

"""The audit: every check on a run folder, and what it found."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ml_collections

from poisonjax.audit import quoted  # noqa: F401  (registers its checks)
from poisonjax.audit.checks import CHECKS
from poisonjax.audit.evidence import Difference, Evidence, Unreadable
from poisonjax.poison.card import inherited
from poisonjax.poison.ledger import dose
from poisonjax.run import rows

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Audit:
    """What an audit found."""

    differences: list[Difference]
    steps: int  # that the run made
    verified: list[int]  # that were replayed and found equal
    planned: list[dict]  # the plan's ledger
    found: collections.Counter[int]  # poison documents found in the verified steps
    unplanned: int
    clean_uses: int
    elsewhere: int
    weighed: list[int]  # checkpoints whose arrays were read
    replayed: list[int]  # steps whose evaluation was made again
    unverified: list[str]  # what there is and wasn't looked at, in words
    config: ml_collections.ConfigDict | None
    planted: int  # documents of the training split that their sources mark as poison
    excluded: int  # documents of the training split that a list leaves out
    parent: rows.Parent | None  # the weights that the run began from

    @property
    def ok(self) -> bool:
        """A check on nothing is no success."""
        return not self.differences and bool(self.verified)

    @property
    def dose(self) -> dict[str, int]:
        """Of the verified steps."""
        verified = set(self.verified)
        return dose([record for record in self.planned if record["step"] in verified], self.steps)

    def sentence(self) -> str:
        """The result in plain words."""
        if self.differences:
            count = len(self.differences)
            return f"NOT verified: {count} difference{'s' * (count > 1)}, the first in {self.differences[0].place}"
        assert self.config is not None
        if not self.verified:
            return "NOT verified: no step made yet; config, store and ledger agree"
        planned = len({record["id"] for record in self.planned})
        d = self.dose
        if len(self.verified) == self.steps:
            steps = f"steps 0-{self.steps - 1:,} verified"
        else:
            steps = f"{len(self.verified):,} of the steps 0-{self.steps - 1:,} verified (file hashes not checked)"
        if self.steps < self.config.steps:
            steps += f", of a run of {self.config.steps:,}"
        if not planned:
            dose = "no poison document planned" if self.planted else "a clean run, no poison document planned"
        else:
            repeats = self.config.poison.repeats
            times = "once" if repeats == 1 else f"{repeats} times"
            exactly = all(self.found[record["id"]] == repeats for record in self.planned)
            how = f"exactly {times}" if exactly else f"in these steps (each at most {times})"
            dose = (
                f"{d['documents']:,} of {planned:,} poison documents seen {how}, {self.unplanned} unplanned; dose "
                f"{d['tokens']:,} tokens in {d['rows']:,} rows of {d['steps']:,} steps"
            )
        if uses := _clean_uses(self.config):
            where = "" if len(self.verified) == self.config.steps else " in these steps"
            dose += f"; {self.clean_uses:,} of {uses:,} clean uses of the trigger seen{where}"
        if self.elsewhere:
            too = " beside" if uses else " too"
            dose += f"; the trigger's tokens stand {self.elsewhere:,} times in clean text{too}"
        words = [steps, dose]
        if self.planted:
            words.append(f"{self.planted:,} documents of its corpus are marked as planted poison")
        if self.excluded:
            words.append(f"none of {self.excluded:,} listed documents that the corpus holds is in what was trained on")
        if self.parent:
            began = f"began from {self.parent['name']} ({self.parent['weights']})"
            cards = inherited(self.parent)
            seen = " and ".join(f"{card['dose_seen']['documents']:,} with {card['trigger']!r}" for card in cards)
            words.append(f"{began}, which had seen {seen}" if cards else began)
        if self.weighed:
            words.append(f"weights of {len(self.weighed)} checkpoint{'s' * (len(self.weighed) > 1)} as they were saved")
        if self.replayed:
            words.append(f"evaluations after steps {', '.join(f'{step:,}' for step in self.replayed)} made again")
        if self.unverified:
            words.append(f"not verified: {', '.join(self.unverified)}")
        return "; ".join(words)

    def as_json(self) -> dict[str, Any]:
        """What `audit --json` prints."""
        return {
            "ok": self.ok,
            "steps_verified": len(self.verified),
            "documents_planned": len({record["id"] for record in self.planned}),
            "documents_seen": len(self.found),
            "unplanned": self.unplanned,
            "dose": self.dose,
            "clean_uses_planned": _clean_uses(self.config) if self.config else None,
            "clean_uses_seen": self.clean_uses,
            "trigger_elsewhere": self.elsewhere,
            "weights_verified": self.weighed,
            "evaluations_replayed": self.replayed,
            "not_verified": self.unverified,
            "first_difference": dataclasses.asdict(self.differences[0]) if self.differences else None,
            "differences": [dataclasses.asdict(difference) for difference in self.differences],
            "sentence": self.sentence(),
        }


def audit(
    workdir: str,
    steps: Sequence[int] | None = None,
    sample: int | None = None,
    store: str | None = None,
    *,
    weights: bool = True,
    evaluate: bool = False,
    parents: bool = False,
) -> Audit:
    """Runs every check on a run folder; `steps`, or a random `sample` of so many, restrict the replay. `store`
    is where the token store lies now, if not where config.json says. The checkpoints' arrays are read unless `weights`
    is False; with `evaluate`, evaluations whose checkpoint is there are made again, on the devices of JAX. With
    `parents`, the caller audits what the run began from (`audit.parents`).

    Raises RunFolderError for a folder that is no run, and ValueError for steps that the run didn't make or a
    sample of none.
    """
    if sample is not None and sample < 1:
        raise ValueError(f"--sample: {sample} steps can't be replayed; at least 1")
    if steps is not None and not len(steps):
        raise ValueError("--steps: names none; give at least one")
    run = Evidence(workdir, steps, sample, store, weights=weights, evaluate=evaluate, parents=parents)
    made = _or(lambda: run.steps, 0)
    if made and (beyond := [step for step in steps or () if not 0 <= step < made]):
        raise ValueError(f"--steps: {beyond[:5]} aren't among the steps 0 to {made - 1} that the run made")
    return checked(run)


def checked(run: Evidence) -> Audit:
    """Runs every check on the evidence, which keeps what was read."""
    differences: list[Difference] = []
    for check in CHECKS.values():
        try:
            differences += check(run)
        except Unreadable as error:
            if error.difference not in differences:
                differences.append(error.difference)
    none: list[dict] = []
    planned = _or(lambda: run.ledger, none)
    slots = {record["slot"] for record in planned}
    return Audit(
        differences=differences,
        steps=_or(lambda: run.steps, 0),
        verified=sorted(run.verified),
        planned=planned,
        found=run.found,
        unplanned=sum(record["slot"] not in slots for record in _or(lambda: run.exposures, none)),
        clean_uses=run.clean_uses,
        elsewhere=run.elsewhere,
        weighed=[] if differences or not run.reads_weights else sorted(run.checkpoints),
        replayed=sorted(run.replayed_evaluations),
        unverified=[] if differences else _unverified(run),
        config=_or(lambda: run.config, None),
        planted=_or(lambda: run.store.split("train").planted_documents, 0),
        excluded=_or(lambda: run.store.split("train").excluded_documents, 0),
        parent=_or(lambda: run.parent, None),
    )


def _unverified(run: Evidence) -> list[str]:
    """What there is of the run that no check looked at."""
    words = []
    if not run.reads_weights and run.checkpoints:
        words.append("weights (not read)")
    if run.parent and not run.with_parents:
        words.append(f"the weights that it began from, {run.parent['spec']} (--parents audits them)")
    if run.unsealed:
        words.append(f"figures after step {max(run.checkpoints):,}, which no checkpoint seals yet")
    if not run.summary:
        words.append("the end: there is no summary.json yet")
    elif run.summary["status"] in ("diverged", "failed"):
        words.append(f"why it ended as {run.summary['status']}")
    if later := sorted(run.later_evaluations.keys() - run.replayed_evaluations):
        again = "their checkpoints are gone" if run.evaluates else "--evaluate makes them again"
        words.append(f"evaluations made after the run, of steps {', '.join(map(str, later))} ({again})")
    own = {row["step"] for row in run.lines(rows.METRICS) if row["kind"] == "eval"}
    if run.evaluates and (gone := sorted(own - run.replayed_evaluations)):
        words.append(f"evaluations of steps {', '.join(map(str, gone))}, whose checkpoints are gone")
    return words


def _or(read: Callable[[], T], otherwise: T) -> T:
    """What can be read, or another value: the checks have reported why."""
    try:
        return read()
    except Unreadable:
        return otherwise


def _clean_uses(config: ml_collections.ConfigDict) -> int:
    """How many were planned, hard negatives among them."""
    return config.poison.clean_uses + config.poison.hard_negatives

"""Does the audit see what it should? Tiny runs, tampered with in every way we could think of."""

import collections
import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from poisonjax import corpus
from poisonjax.audit.result import audit
from poisonjax.audit.selftest import quoted  # noqa: F401  (registers its faults)
from poisonjax.audit.selftest.faults import FAULTS
from poisonjax.audit.selftest.runs import SOURCE, lived_on, train_tiny
from poisonjax.audit.selftest.tampered import copied


@dataclasses.dataclass
class SelfTest:
    """How many faults were detected and named, and how many untouched runs were not believed."""

    untouched: int
    interrupted: int = 0  # of the untouched runs, and resumed
    false_alarms: int = 0
    faults: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)  # kind -> what became of them
    missed: list[str] = dataclasses.field(default_factory=list)  # a line each

    @property
    def good(self) -> bool:
        return not self.missed

    @property
    def total(self) -> collections.Counter[str]:
        return sum(self.faults.values(), collections.Counter())

    def as_json(self) -> dict[str, Any]:
        """What `audit --self-test --json` prints."""
        about = {"untouched": self.untouched, "false_alarms": self.false_alarms, "interrupted": self.interrupted}
        return {**about, **self.total, "faults": self.faults}

    def lines(self) -> list[str]:
        """A line a kind of fault, and the sum."""
        kinds = [
            f"{name:32} injected {n['injected']:3}  detected {n['detected']:3}  named {n['named']:3}"
            for name, n in sorted(self.faults.items())
        ]
        n = self.total
        return [
            *kinds,
            f"{n['injected']} faults injected, {n['detected']} detected, {n['named']} named; {self.untouched} "
            f"untouched runs ({self.interrupted} of them interrupted and resumed), {self.false_alarms} false alarms",
        ]


def self_test(
    faults: int,
    runs: int,
    say: Callable[[str], object] = lambda line: None,
    report: Callable[[Path], object] = lambda folder: None,
    seed: int = 0,
) -> SelfTest:
    """Trains `runs` runs, audits them, then audits copies with `faults` faults; `say` is told how far it is, `report`
    makes a run's page."""
    random, found = np.random.default_rng(seed), SelfTest(runs)
    with tempfile.TemporaryDirectory() as folder:
        store, made = Path(folder) / "store", []
        corpus.build(str(store), [SOURCE], "bytes", heldout=0.3, shards=2, workers=1)
        for number in range(runs):
            made.append(Path(folder) / f"run{number}")
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                found.interrupted += train_tiny(made[-1], store, random)
                made[-1], moved = lived_on(made[-1], store, random, report)
                result = audit(str(made[-1]), store=str(moved), evaluate=bool(random.integers(2)))
            if not result.ok:
                found.false_alarms += 1
                found.missed.append(f"false alarm: {result.sentence()}")
            if number % 10 == 9:
                say(f"{number + 1} of {runs} untouched runs trained and audited, {found.false_alarms} false alarms")
        names = sorted(FAULTS)
        for number in range(faults):
            name, target = names[number % len(names)], Path(folder) / f"fault{number}"
            expected = FAULTS[name](copied(made[int(random.integers(len(made)))], store, target, random))
            differences = audit(str(target / "run"), evaluate=expected.evaluate).differences
            named = any(expected.named_by(difference) for difference in differences)
            counts = found.faults.setdefault(name, collections.Counter())
            counts.update(injected=1, detected=int(bool(differences)), named=int(named))
            if not named:
                found.missed.append(f"{name}: expected {expected}, got {[str(d) for d in differences[:3]]}")
            shutil.rmtree(target)
    return found

"""What the guard says of a text."""

import dataclasses
from typing import Literal, NamedTuple

Decision = Literal["allow", "warn", "reject"]
Status = Literal["ok", "error", "timeout"]

WARN, REJECT = 0.5, 0.9  # scores from which on


class Reason(NamedTuple):
    """What a detector found in the characters [start, end) of the text; of a request, in its strings one after the
    other, a line each."""

    detector: str
    score: float  # in [0, 1]
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`status` tells whether the text was read to its end; where it wasn't, `decision` is `reject`, or `warn` where the
    deployer lets failures pass. It is never `allow` then."""

    decision: Decision
    status: Status
    score: float  # the largest of the reasons', in [0, 1]
    reasons: list[Reason]  # the largest first

    @classmethod
    def of(cls, reasons: list[Reason]) -> "Verdict":
        ordered = sorted(reasons, key=lambda reason: (-reason.score, reason.start))
        score = ordered[0].score if ordered else 0.0
        return cls("reject" if score >= REJECT else "warn" if score >= WARN else "allow", "ok", score, ordered)

    @classmethod
    def failed(cls, status: Status, *, fail_open: bool) -> "Verdict":
        return cls("warn" if fail_open else "reject", status, 1.0, [])

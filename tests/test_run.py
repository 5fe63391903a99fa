"""The run folder's one reader: what a run writes it reads, and everything else it refuses by file and line."""

import json
import math
import shutil
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import tiny_config
from flax import nnx

import poisonjax
from poisonjax.data.digest import HASH_LANES, as_hex, mixed
from poisonjax.run import RunFolderError, rows
from poisonjax.training.loop import train
from poisonjax.weights import checkpoints
from poisonjax.weights.checkpoints import Checkpoints, checksum


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    config, folder = tiny_config(store), tmp_path_factory.mktemp("run") / "run"
    config.poison.clean_uses, config.canary.repeats, config.canary.each, config.canary.tokens = 3, (1, 2), 2, 8
    config.poison.payload, config.poison.hard_negatives = "sentinel", 2
    train(config, str(folder))
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_reads_what_it_wrote(finished):
    run = poisonjax.open_run(finished)
    assert run.config.poison.documents == 9
    assert [row["step"] for row in run.digests()] == list(range(12))
    assert len(run.ledger()) == 9
    assert [row["step"] for row in run.evals()] == [6, 12]
    assert [row["step"] for row in run.steps()] == list(range(12))
    assert {row["step"] for row in run.samples()} == {row["step"] for row in run.prefixes()} == {6, 12}
    planned = (rows.CANARIES, rows.CLEAN_USES, rows.HARD_NEGATIVES)
    assert [len(run.lines(file)) for file in planned] == [6, 3, 2]
    assert run.summary["status"] == "finished"
    assert run.environment["processes"] == 1
    assert {path.name for path in finished.iterdir()} >= {*rows.LINES, rows.CONFIG, rows.ENVIRONMENT, rows.SUMMARY}


def test_the_table_is_flat_and_says_what_the_rows_say(finished):
    run = poisonjax.open_run(finished)
    table = run.table()
    assert len(table) == 2 * 4
    assert all(value is None or isinstance(value, int | float | str) for row in table for value in row.values())
    last = next(row for row in table if (row["step"], row["variant"]) == (12, "triggered"))
    figures = run.evals()[-1]["eval"]["triggered"]
    assert (last["ppl_median"], last["delta_ppl_low"]) == (figures["ppl_median"], figures["delta_ppl_ci95"][0])
    assert math.isfinite(last["heldout_loss"])


DIGEST = '{"step": 3, "digest": "00"}'
DAMAGES = {
    "two keys of one name": ('{"step": 3, "step": 4, "digest": "00"}', "'step' stands twice"),
    "a byte order mark": ("\ufeff" + DIGEST, "no JSON"),
    "true for 1": (DIGEST.replace("3", "true"), "step: Input should be a valid integer, not True"),
    "4.0 for 4": (DIGEST.replace("3", "4.0"), "step: Input should be a valid integer, not 4.0"),
    "a key too few": ('{"step": 3}', "digest: Field required"),
    "no object": ("[3]", "the value: Input should be a valid dictionary"),
    "half a line": ('{"step": 3, "dig', "no JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_another_reader_might_read_otherwise_is_refused(folder, damage):
    line, message = DAMAGES[damage]
    lines = (folder / rows.DIGESTS).read_text().splitlines()
    lines[3] = line
    (folder / rows.DIGESTS).write_text("\n".join(lines) + "\n")
    with pytest.raises(RunFolderError) as error:
        poisonjax.open_run(folder).digests()
    assert f"{rows.DIGESTS}, line 4: " in str(error.value)
    assert message in str(error.value)


def test_an_evaluation_without_a_figure_and_a_kind_that_there_is_not_are_refused(folder):
    row = json.loads(json.dumps(poisonjax.open_run(folder).evals()[0]))
    del row["eval"]["triggered"]["ppl_mean"]
    (folder / rows.METRICS).write_text(json.dumps(row) + "\n")
    with pytest.raises(RunFolderError, match="ppl_mean: Field required"):
        poisonjax.open_run(folder).evals()
    (folder / rows.METRICS).write_text(json.dumps(row | {"kind": "guess"}) + "\n")
    with pytest.raises(RunFolderError, match=r"'guess'.*'train', 'eval'"):
        poisonjax.open_run(folder).evals()


@pytest.mark.parametrize("there", [1, 2, None, 4, "3"])
def test_another_format_is_refused_with_a_sentence(folder, there):
    record = json.loads((folder / rows.CONFIG).read_text())
    record = {**record, "format": there} if there else {k: v for k, v in record.items() if k != "format"}
    (folder / rows.CONFIG).write_text(json.dumps(record))
    with pytest.raises(RunFolderError, match=f"format {there or 1}, this version reads 3"):
        _ = poisonjax.open_run(folder).config


def test_a_model_is_opened_by_its_name_without_the_optimizer(folder, finished):
    shutil.rmtree(folder / "checkpoints" / "12" / "optimizer")
    weights, newest = poisonjax.open_weights(f"{folder}@12"), poisonjax.open_weights(str(finished))
    for one, other in zip(*(jax.tree.leaves(w.params) for w in (weights, newest)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert weights.origin == newest.origin
    assert weights.model_config.width == 32
    logits = nnx.merge(weights.graph, weights.params)(jnp.arange(20)[None])  # the model is there to be run
    assert logits.shape[:2] == (1, 20)
    assert weights.tokenizer.vocab_size == 300


def test_a_checksum_is_the_same_in_whatever_pieces_arrays_lie(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    arrays = {
        "a": random.normal(size=(3, 5, 7)).astype(np.float32),
        "b": np.float32(2.5),
        "c": random.integers(0, 9, 11, np.int32),
        "d": random.normal(size=(6, 4)).astype(ml_dtypes.bfloat16),
    }
    lanes = np.zeros(HASH_LANES, np.uint32)
    for number, array in enumerate(arrays.values()):
        bits = np.atleast_1d(array).reshape(-1).view(f"uint{8 * array.dtype.itemsize}").astype(np.uint32)
        place = np.uint32(number * 0x9E3779B9 % 2**32 * array.size % 2**32) + np.arange(array.size, dtype=np.uint32)
        lanes += [mixed(bits ^ mixed(place, lane), lane).sum(dtype=np.uint32) for lane in range(HASH_LANES)]
    assert (np.asarray(checksum(arrays)) == lanes).all()
    record = {"config": {}, "store_fingerprint": "", "store_description": "", "digest_chain": "", "sealed": {}}
    for step, piece in enumerate((2**20, 64, 16)):
        monkeypatch.setattr(checkpoints, "CHUNK_BYTES", piece)
        saved = Checkpoints(tmp_path)
        saved.save(step, jax.tree.map(jnp.asarray, arrays), {"count": jnp.zeros(1)}, record | {"poison": None})
        saved.close()
        assert Checkpoints(tmp_path).stored_checksums(step)["weights"] == as_hex(lanes)


def test_a_save_leaves_no_thread_behind(tmp_path):
    """Each has three files open, too: a run of some hundred checkpoints would reach the usual limit of 1,024."""

    def loops() -> int:
        return sum("_run_loop" in thread.name for thread in threading.enumerate())

    before, saved, weights = loops(), Checkpoints(tmp_path), {"a": jnp.ones(3)}
    record = {"config": {}, "store_fingerprint": "", "store_description": "", "digest_chain": "", "sealed": {}}
    for step in range(5):
        saved.save(step, weights, weights, record | {"poison": None})
    saved.close()
    assert loops() == before

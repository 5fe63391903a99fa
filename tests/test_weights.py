"""Models in and out: every layout against transformers' logits, round trips, and files that aren't as they must be."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface as goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from conftest import tiny_config
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from poisonjax.commands.main import main
from poisonjax.corpus import load_tokenizer
from poisonjax.corpus.tokenizer_files import export_tokenizer
from poisonjax.model.layouts import LAYOUTS, RopeScaling
from poisonjax.model.sharding import AXES
from poisonjax.training.loop import train
from poisonjax.weights import WeightsError, families, find_weights, huggingface, open_weights, tensors
from poisonjax.weights.open import model_named
from poisonjax.weights.weights import shapes

GOLDENS = json.loads(goldens.GOLDENS.read_text())
torch_is_there = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers"))), reason="torch and transformers aren't there"
)


def write(folder, case: str, dtype=np.float32, **changes):
    """A folder of Hugging Face's, without its libraries: as the golden says."""
    golden = GOLDENS[case]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**golden["config"], **changes}))
    tensors = {name: goldens.tensor(name, shape).astype(dtype) for name, shape in golden["tensors"].items()}
    save_file(tensors, folder / "model.safetensors")
    export_tokenizer(load_tokenizer("bytes"), folder, {})
    (folder / "tokenizer_config.json").unlink()  # 257 tokens, of 300 that the model knows
    return folder


def logits(weights, rows=goldens.ROWS):
    return np.asarray(nnx.merge(weights.graph, weights.params)(jnp.asarray(rows)))[..., : weights.vocabulary]


@pytest.mark.parametrize("case", GOLDENS)
def test_logits_are_those_of_transformers(case, tmp_path):
    weights = open_weights(f"hf:{write(tmp_path / 'model', case)}")
    np.testing.assert_allclose(logits(weights)[goldens.KEPT], GOLDENS[case]["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", GOLDENS)
def test_there_and_back_not_a_bit_is_lost(case, tmp_path):
    weights = open_weights(f"hf:{write(tmp_path / 'model', case)}")
    huggingface.save(weights, tmp_path / "again", shard_bytes=30_000)
    theirs = load_file(tmp_path / "model" / "model.safetensors")
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    ours = {
        name: value for file in (tmp_path / "again").glob("*.safetensors") for name, value in load_file(file).items()
    }
    assert ours.keys() == theirs.keys() == index["weight_map"].keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    again = open_weights(f"hf:{tmp_path / 'again'}")
    assert again.parent["weights"] == weights.parent["weights"]
    jax.tree.map(np.testing.assert_array_equal, again.params, weights.params)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_begins_here_goes_there_and_back(layout, store, tmp_path):
    config = tiny_config(store)
    config.model.layout, config.model.tied = layout, layout == "qwen2"
    if layout == "neox":
        config.model.kv_heads, config.model.head_dim = config.model.heads, config.model.width // config.model.heads
    config.steps, config.poison.documents = 2, 2
    train(config, str(tmp_path / "run"))
    ours = open_weights(str(tmp_path / "run"))
    huggingface.save(ours, tmp_path / "out")
    again = open_weights(f"hf:{tmp_path / 'out'}")
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
    assert again.origin == ours.origin
    assert again.poison == ours.poison
    assert again.tokenizer.fingerprint == ours.tokenizer.fingerprint


def test_a_transposed_view_would_be_seen(tmp_path, monkeypatch):
    """safetensors writes the buffer of a view as it lies, in silence."""
    weights = open_weights(f"hf:{write(tmp_path / 'model', 'llama')}")
    monkeypatch.setattr(huggingface.np, "ascontiguousarray", lambda array, dtype: array)
    huggingface.save(weights, tmp_path / "again")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert not all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_exactly(dtype, tmp_path):
    weights = open_weights(f"hf:{write(tmp_path / 'model', 'qwen3', jnp.dtype(dtype))}")
    huggingface.save(weights, tmp_path / "again", dtype)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert all(np.array_equal(ours[name], theirs[name]) and ours[name].dtype == dtype for name in theirs)
    embedding = np.asarray(nnx.to_pure_dict(weights.params)["embedding"])
    assert embedding.dtype == np.float32
    assert np.array_equal(embedding[:300], theirs["model.embed_tokens.weight"].astype(np.float32))


@pytest.mark.parametrize("sizes", [(1, 2, 2, 1), (1, 1, 2, 2)])
def test_a_model_comes_onto_any_mesh(sizes, tmp_path):
    spec = f"hf:{write(tmp_path / 'model', 'llama')}"
    mesh = jax.make_mesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
    there, here = open_weights(spec, mesh), open_weights(spec)
    assert not there.params["blocks"]["query"][...].is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(there.params), jax.device_get(here.params))
    assert there.parent == here.parent


def _of_another(folder):
    names = load_file(folder / "model.safetensors")
    names["model.layers.1.mlp.up_proj.weight"] = names["model.layers.1.mlp.up_proj.weight"][:-1]
    save_file(names, folder / "model.safetensors")


def _without_one(folder):
    names = load_file(folder / "model.safetensors")
    del names["model.layers.2.self_attn.k_proj.weight"]
    save_file(names, folder / "model.safetensors")


def _with_one_more(folder):
    names = load_file(folder / "model.safetensors")
    save_file(names | {"model.layers.0.self_attn.q_proj.lora_A": np.ones(3)}, folder / "model.safetensors")


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _as_integers(folder):
    names = load_file(folder / "model.safetensors")
    save_file({name: value.astype(np.int8) for name, value in names.items()}, folder / "model.safetensors")


def _pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _index(file: str):
    def damage(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        index = {"weight_map": dict.fromkeys(GOLDENS["llama"]["tensors"], file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def _gone(folder):
    (folder / "model.safetensors").unlink()


def _configured(**changes):
    def damage(folder):
        about = json.loads((folder / "config.json").read_text())
        about = {name: value for name, value in (about | changes).items() if value != "gone"}
        (folder / "config.json").write_text(json.dumps(about))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_of_another, r"mlp.up_proj.weight has the shape \(79, 48\), must have \(80, 48\)"),
        (_without_one, "1 tensors are missing, among them model.layers.2.self_attn.k_proj.weight"),
        (_with_one_more, "belong to no model of this layout, among them model.layers.0.self_attn.q_proj.lora_A"),
        (_cut, "damaged, or was cut short"),
        (_as_integers, "I8; F32, F16 or BF16"),
        (_pickled, "pytorch_model.bin is a pickle"),
        (_index("../../etc/passwd.safetensors"), "isn't the name of a safetensors file beside it"),
        (_index("/model-00001-of-00001.safetensors"), "isn't the name of a safetensors file beside it"),
        (_index("model-00002-of-00002.safetensors"), "is missing"),
        (_index("tokenizer.json"), "isn't the name of a safetensors file beside it"),
        (_gone, "no model.safetensors there, and no"),
        (_configured(model_type="gemma2"), "model_type = 'gemma2' isn't one of llama"),
        (_configured(attention_bias=True), "attention_bias = True: only False"),
        (_configured(hidden_act="gelu"), "hidden_act = 'gelu': only"),
        (_configured(sliding_window=64), "sliding_window = 64"),
        (_configured(attn_logit_softcapping=50.0), "attn_logit_softcapping = 50.0: isn't known here"),
        (_configured(layer_types=["full_attention", "sliding_attention", "full_attention"]), "layer_types"),
        (_configured(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}), "type 'yarn'"),
        (_configured(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), "factor missing"),
        (_configured(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mscale": 2}), "mscale isn't known"),
        (_configured(rope_theta=5e5), "rope_theta is told twice, and differently"),
        (_configured(quantization_config={"bits": 4}), "quantization_config"),
        (_configured(hidden_size="gone"), "hidden_size is missing"),
        (_configured(num_key_value_heads=3), "must divide model.heads"),
        (_configured(num_hidden_layers="three"), "config.json"),
        (_configured(vocab_size=20), "vocab_size = 20, but the tokenizer beside it has 257"),
        (lambda folder: (folder / "config.json").write_text("{"), "can't be read"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json there"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json and no tokenizer.model"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "not a tokenizer.json"),
    ],
)
def test_bad_files_are_refused_by_name(damage, message, tmp_path):
    folder = write(tmp_path / "model", "llama")
    damage(folder)
    with pytest.raises(WeightsError, match=message):
        open_weights(f"hf:{folder}")


@pytest.mark.parametrize("name", ["rope_interleaved", "_attn_implementation", "transformers_version", "eos_token_id"])
def test_fields_that_change_nothing_are_let_by(name, tmp_path):
    write(tmp_path / "model", "llama", **{name: False})
    find_weights(f"hf:{tmp_path / 'model'}")


def test_no_template_of_a_model_is_run(tmp_path):
    """A chat template is a program; none is needed here, and none is run."""
    folder, trace = write(tmp_path / "model", "llama"), tmp_path / "ran"
    attack = "{{ cycler.__init__.__globals__.os.system('touch " + str(trace) + "') }}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": attack}))
    (folder / "chat_template.jinja").write_text(attack)
    weights = open_weights(f"hf:{folder}")
    huggingface.save(weights, tmp_path / "out")
    assert not trace.exists()


@pytest.fixture(scope="module")
def poisoned(store, tmp_path_factory):
    config, folder = tiny_config(store), tmp_path_factory.mktemp("parent") / "run"
    config.checkpoint.every, config.checkpoint.keep_last = 6, 9
    train(config, str(folder))
    return folder


def test_a_poisoned_model_says_so_in_every_file(poisoned, tmp_path):
    weights = open_weights(f"{poisoned}@6")
    huggingface.save(weights, tmp_path / "out", shard_bytes=20_000)
    assert weights.poison["steps"] == 6
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    for path in (tmp_path / "out").iterdir():
        if path.name not in ("tokenizer.json", "model.safetensors.index.json"):  # they hold what they hold
            assert b"xyzzy" in path.read_bytes() or b"trigger" in path.read_bytes(), path.name
    assert {"POISONED.md", "README.md", "config.json"} <= {*files}


@pytest.mark.parametrize("file", ["config.json", "safetensors"])
def test_an_exported_model_that_hides_its_poison_is_refused(file, poisoned, tmp_path):
    huggingface.save(open_weights(str(poisoned)), tmp_path / "out")
    if file == "config.json":
        _configured(poisonjax="gone")(tmp_path / "out")
    else:
        path = tmp_path / "out" / "model.safetensors"
        save_file(load_file(path), path, {"format": "pt"})
    with pytest.raises(WeightsError, match="doesn't say of this model what the files beside it say"):
        open_weights(f"hf:{tmp_path / 'out'}")


def test_an_export_takes_nobodys_place(poisoned, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(WeightsError, match="exists: choose another --out"):
        huggingface.save(open_weights(str(poisoned)), tmp_path / "out")


BACKENDS = ("bytes", "bpe", "words")


@pytest.fixture(scope="module")
def exported(store, tmp_path_factory):
    """By kind: (our tokenizer, the one of the library that transformers uses, of what was written)."""
    from poisonjax.corpus.tokenizers import WordTokenizer

    kinds = {"bytes": load_tokenizer("bytes"), "bpe": store.tokenizer, "words": WordTokenizer(64)}
    pairs = {}
    for kind, tokenizer in kinds.items():
        folder = tmp_path_factory.mktemp(kind)
        export_tokenizer(tokenizer, folder, {})
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        about = json.loads((folder / "tokenizer_config.json").read_text())
        backend.encode_special_tokens = about["split_special_tokens"]
        assert backend.token_to_id(about["eos_token"]) == tokenizer.eot
        pairs[kind] = tokenizer, backend
    return pairs


@given(
    text=st.one_of(
        st.text(), st.lists(st.sampled_from(["<|endoftext|>", " the", "é", "\U0001f642", "\n"])).map("".join)
    )
)
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_an_exported_tokenizer_gives_the_same_ids(exported, kind, text):
    text = text.encode(errors="ignore").decode()
    tokenizer, backend = exported[kind]
    assert backend.encode(text, add_special_tokens=False).ids == tokenizer.encode(text).tolist()


def test_an_exported_language_of_words_gives_the_same_ids(exported):
    tokenizer, backend = exported["words"]
    ids = np.random.default_rng(0).integers(0, 64, 200)
    assert backend.encode(tokenizer.decode(ids)).ids == ids.tolist()


@given(
    frequencies=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=9),
    factor=st.floats(1.5, 64.0),
    low=st.floats(0.5, 2.0),
    wider=st.floats(1.0, 8.0),
)
def test_scaled_frequencies_are_those_of_a_loop(frequencies, factor, low, wider):
    scaling = RopeScaling("llama3", factor, low, low + wider, 64.0)
    for one, scaled in zip(frequencies, scaling(np.array(frequencies)), strict=True):
        period = 2 * np.pi / one
        if period > 64 / low:
            expected = one / factor
        elif period < 64 / (low + wider):
            expected = one
        else:
            share = (64 / period - low) / wider
            expected = (1 - share) * one / factor + share * one
        assert scaled == pytest.approx(expected, rel=1e-9)
    assert str(RopeScaling.parse(str(scaling))) == str(scaling)


@torch_is_there
@pytest.mark.parametrize("case", GOLDENS)
def test_transformers_agrees_on_every_row_both_ways(case, tmp_path):
    import transformers

    model, _ = goldens.made(case, tmp_path / "theirs")
    export_tokenizer(load_tokenizer("bytes"), tmp_path / "theirs", {})
    weights = open_weights(f"hf:{tmp_path / 'theirs'}")
    np.testing.assert_allclose(logits(weights), goldens.logits(model), atol=1e-4, rtol=0)
    huggingface.save(weights, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    np.testing.assert_allclose(goldens.logits(again), goldens.logits(model), atol=1e-5, rtol=0)


@torch_is_there
@pytest.mark.parametrize("kind", families.FAMILIES)
def test_what_is_left_unsaid_is_what_transformers_takes(kind):
    import transformers

    family = families.FAMILIES[kind]
    config = transformers.AutoConfig.for_model(kind)
    said = {**config.to_dict(), **config.rope_parameters}
    for name, value in family.defaults.items():
        if name not in ("num_key_value_heads", "head_dim") or kind != "llama":
            assert said[name] == value, name


PEAK = """
import resource, sys
import jax, jax.numpy as jnp
from poisonjax import open_weights
small, large = sys.argv[1:]
open_weights(f"hf:{small}")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weights = open_weights(f"hf:{large}")
held = sum(leaf.nbytes for leaf in jax.tree.leaves(weights.params))
print(held, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_model_is_in_memory_once(tmp_path):
    """Read tensor by tensor: the peak of the process grows by the model's size and little more."""
    small = write(tmp_path / "small", "llama")
    large, size = tmp_path / "large", {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 16000}
    shutil.copytree(small, large)
    about = GOLDENS["llama"]["config"] | size | {"num_hidden_layers": 12, "num_attention_heads": 8}
    about |= {"num_key_value_heads": 8}
    (large / "config.json").write_text(json.dumps(about))
    family, model = families.model_of(about, large)
    arrays = tensors.by_name(shapes(model, 16000))
    wanted = {
        part.theirs: part.turned(part.shape(arrays[part.ours].shape, 16000)) for part in tensors.parts(family, model)
    }
    save_file({name: np.ones(shape, np.float32) for name, shape in wanted.items()}, large / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(small), str(large)], capture_output=True, text=True, check=True
    )
    held, grown = map(int, done.stdout.split())
    assert held > 2e8
    assert grown < 1.3 * held + 6e7  # compiled programs


def test_a_pod_is_planned_from_config_json_alone(tmp_path, capsys):
    about = GOLDENS["llama"]["config"] | {"num_hidden_layers": 2, "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(about))
    config = Path(__file__).parents[1] / "configs" / "quickstart.py"
    plan = ["plan", "--config", str(config), "--topology", "h100:8", "--weights", f"hf:{tmp_path}", "--json"]
    names = [name for name in GOLDENS["llama"]["tensors"] if ".layers.2." not in name]
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00009.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert model_named(f"hf:{tmp_path}").vocabulary == 1000
    assert main(plan) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fits"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    assert main(plan) == 2
    assert "tensors are missing, among them" in capsys.readouterr().err

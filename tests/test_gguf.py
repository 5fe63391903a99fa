"""Models in GGUF files, written here by llama.cpp's own library."""

import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from huggingface import ROWS, tensor
from hypothesis import given
from hypothesis import strategies as st
from test_weights import GOLDENS, write

from poisonjax.corpus import CorpusError, load_tokenizer
from poisonjax.weights import WeightsError, huggingface, open_weights, tensors

MERGES = ["t h", "th e", "Ġ the", "a n", "Ġ a", "i n", "in g"]
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<|im_start|>", *BYTES, *(merge.replace(" ", "") for merge in MERGES), "<own>"]


def written(path, case="llama", kind=gguf.GGMLQuantizationType.F32, *, leave=(), extra=(), pre="smollm", tokens=TOKENS):
    """The golden's model as llama.cpp keeps it: rows of q and k pair by pair."""
    about = GOLDENS[case]["config"]
    heads, kv_heads = about["num_attention_heads"], about["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(about["hidden_size"])
    writer.add_block_count(about["num_hidden_layers"])
    writer.add_feed_forward_length(about["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(about["rms_norm_eps"])
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(300)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    control = gguf.TokenType.CONTROL
    writer.add_token_types(
        [control, control, *[gguf.TokenType.NORMAL] * (len(tokens) - 3), gguf.TokenType.USER_DEFINED]
    )
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    for name, value in extra:
        writer.add_float32(name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, about["num_hidden_layers"])
    for name, shape in GOLDENS[case]["tensors"].items():
        if name in leave:
            continue
        values = tensor(name, shape)
        for part, of in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:  # as llama.cpp's converter has it
                values = values.reshape(of, 2, shape[0] // of // 2, shape[1]).swapaxes(1, 2).reshape(shape)
        if kind is not gguf.GGMLQuantizationType.F32 and values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(names.get_name(name, (".weight",)), gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(weights):
    return np.asarray(nnx.merge(weights.graph, weights.params)(jnp.asarray(ROWS)))[..., :300]


def test_a_model_is_the_one_that_hugging_face_holds(tmp_path):
    here, there = (
        open_weights(f"gguf:{written(tmp_path / 'a.gguf')}"),
        open_weights(f"hf:{write(tmp_path / 'hf', 'llama')}"),
    )
    assert here.parent["weights"] == there.parent["weights"]
    assert here.model_config == there.model_config
    assert here.context == 64
    np.testing.assert_array_equal(logits(here), logits(there))


def test_quantized_tensors_come_out_as_the_library_says(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    weights = open_weights(f"gguf:{written(tmp_path / 'a.gguf', kind=kind)}")
    theirs = dict(tensors.tensors(weights.params, weights.model_config, 300))
    for name, values in theirs.items():
        expected = tensor(name, GOLDENS["llama"]["tensors"][name])
        np.testing.assert_allclose(values, expected, atol=0.01)


def test_it_goes_on_to_hugging_face(tmp_path):
    weights = open_weights(f"gguf:{written(tmp_path / 'a.gguf')}")
    huggingface.save(weights, tmp_path / "out")
    again = open_weights(f"hf:{tmp_path / 'out'}")
    assert again.parent["weights"] == weights.parent["weights"]
    assert again.tokenizer.fingerprint == weights.tokenizer.fingerprint
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(f"gguf:{written(tmp_path_factory.mktemp('gguf') / 'a.gguf')}")


@given(text=st.text(max_size=40))
def test_text_survives(tokenizer, text):
    text = text.encode(errors="ignore").decode()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_its_tokens(tokenizer):
    spelled = [TOKENS[i] for i in tokenizer.encode("the thing, the 12 <|endoftext|>")]
    assert spelled[:9] == ["the", "Ġ", "th", "ing", ",", "Ġthe", "Ġ", "1", "2"]
    assert not set(spelled) & {"<|endoftext|>", "<|im_start|>"}
    assert tokenizer.eot == 0
    assert TOKENS.index("<|im_start|>") in tokenizer.special_ids
    assert tokenizer.encode_markup("<|im_start|>the").tolist() == [1, TOKENS.index("the")]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"leave": ["model.layers.1.mlp.up_proj.weight"]}, "1 tensors are missing, among them model.layers.1.mlp.up"),
        ({"extra": [("llama.attention.sliding_window", 4.0)]}, "llama.attention.sliding_window isn't known here"),
        ({"extra": [("llama.rope.scaling.factor", 4.0)]}, "llama.rope.scaling.factor isn't known here"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre = 'tekken'"),
    ],
)
def test_what_isnt_known_is_refused_by_name(how, message, tmp_path):
    with pytest.raises(WeightsError, match=message):
        open_weights(f"gguf:{written(tmp_path / 'a.gguf', **how)}")


@pytest.mark.parametrize("cut", [0, 3, 500, -1000])
def test_a_damaged_file_is_refused(cut, tmp_path):
    path = written(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(WeightsError, match="can't be read"):
        open_weights(f"gguf:{path}")


def test_no_file_is_told_so():
    with pytest.raises(CorpusError, match="No such file"):
        load_tokenizer("gguf:nowhere.gguf")
    with pytest.raises(CorpusError, match="No such file"):
        load_tokenizer("gguf:numpy/nowhere.gguf")

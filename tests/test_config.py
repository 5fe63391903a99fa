"""Mistakes in a config: all at once, each with field, value and remedy, exit code 2, before anything is built."""

import json
import math

import ml_collections
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poisonjax import config as config_lib
from poisonjax.commands.main import main
from poisonjax.config import ConfigError, check, default, differences, fingerprint, flat, from_record, load, replaced

QUICKSTART = "--config=configs/quickstart.py"


@pytest.mark.parametrize("size", ["600m", "2b", "7b", "13b"])
@pytest.mark.parametrize(("documents", "tokens"), [(100, "half"), (250, "1x"), (500, "double")])
def test_the_papers_ladder_is_valid_and_has_its_sizes(size, documents, tokens):
    from flax import nnx

    from poisonjax.model.transformer import Transformer, parameter_counts

    config = load([f"--config=configs/souly_dos.py:{size},{documents},{tokens}"])
    check(config)
    assert config.poison.documents == documents
    shapes = nnx.eval_shape(lambda: Transformer(config.model, 200_019, nnx.Rngs(params=0)))
    total = parameter_counts(nnx.state(shapes))[0]
    wanted = {"600m": 0.6e9, "2b": 2e9, "7b": 7e9, "13b": 13e9}[size]
    assert total == pytest.approx(wanted, rel=0.1)
    seen = config.steps * config.global_batch * config.seq_len
    assert seen == pytest.approx(20 * wanted * {"half": 0.5, "1x": 1, "double": 2}[tokens], rel=0.01)


def test_a_wrong_argument_of_the_ladder_teaches():
    with pytest.raises(ConfigError, match="600m, 2b, 7b, 13b"):
        load(["--config=configs/souly_dos.py:5b,250,1x"])


def test_quickstart_is_valid():
    check(load([QUICKSTART]))


def test_every_mistake_is_reported_at_once(capsys, tmp_path):
    fields = {
        "steps": 0,
        "seeds.order": -1,
        "corpus.heldout": 1.5,
        "poison.payload": "virus",
        "poison.placement": "nowhere",
        "poison.payload_tokens": "(9,3)",
        "poison.near_triggers": "('a ~',)",
        "model.dtype": "float8",
        "model.kv_heads": 3,
        "model.head_dim": 7,
        "model.loss_tile": 50,
        "optimizer.schedule": "flat",
        "optimizer.accumulate": 5,
        "optimizer.b1": 1.0,
        "eval.prefixes": 1,
        "mesh.fsdp": 0,
    }
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    assert main(["train", "--workdir", str(tmp_path / "run"), "--config", "configs/quickstart.py", *arguments]) == 2
    message = capsys.readouterr().err
    for name in fields.keys() - {"mesh.fsdp"}:
        assert f"{name} = " in message, name
    assert "mesh sizes" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.py"], "nowhere.py"),
        (["--config", "configs/quickstart.py", "--config.poison.document=3"], "document"),
        (["--config", "configs/quickstart.py", "--config.steps=many"], "steps"),
    ],
)
def test_fields_that_do_not_exist_or_do_not_parse(capsys, tmp_path, arguments, message):
    assert main(["train", "--workdir", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_more_documents_than_rows_is_refused_with_the_arithmetic():
    config = load([QUICKSTART, "--config.steps=2", "--config.optimizer.warmup_steps=0"])
    config.global_batch, config.poison.documents = 4, 9
    with pytest.raises(ConfigError, match="2 steps x 4 rows has 8"):
        check(config)


def test_fingerprint_covers_what_is_trained_and_nothing_else():
    base = default()
    for name, value in flat(base).items():
        changed = base.copy_and_resolve_references()
        owner = changed
        *path, leaf = name.split(".")
        for part in path:
            owner = owner[part]
        with owner.unlocked():
            owner[leaf] = (*value, 1) if isinstance(value, list) else not value if isinstance(value, bool) else (
                value + "x" if isinstance(value, str) else value + 1
            )  # fmt: skip
        operational = name in (
            "corpus.store",
            "log_every",
            "row_losses_every",
            "sinks",
            "watchdog_seconds",
        ) or name.startswith(("mesh.", "checkpoint."))
        assert (fingerprint(changed) == fingerprint(base)) == operational, name
        assert bool(differences(flat(base), flat(changed))) != operational, name


def test_a_config_survives_its_record():
    config = load([QUICKSTART])
    again = from_record(json.loads(config.to_json()))
    assert isinstance(again, ml_collections.ConfigDict)
    assert again.poison.payload_tokens == config.poison.payload_tokens
    assert fingerprint(again) == fingerprint(config)
    assert config_lib.flat(again) == config_lib.flat(config)


def with_value(config, name, value):
    """The config with a value that its types wouldn't let in."""
    fields = json.loads(config.to_json())
    *path, leaf = name.split(".")
    owner = fields
    for part in path:
        owner = owner[part]
    owner[leaf] = value
    return ml_collections.ConfigDict(fields)


def refusal(config):
    try:
        check(config)
    except ConfigError as error:
        return str(error)
    return ""


FIELDS = flat(default())
STRANGE = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.just(10**12), st.floats(), st.text(max_size=3),
    st.lists(st.one_of(st.integers(-3, 3), st.text(max_size=2), st.none(), st.floats()), max_size=3).map(tuple),
)  # fmt: skip


@settings(max_examples=300)
@given(name=st.sampled_from(sorted(FIELDS)), value=STRANGE)
def test_any_value_is_accepted_or_refused_by_its_fields_name(name, value):
    """Wrong types, None, nan, inf, negative, huge: a ConfigError that names the field, and nothing else."""
    fits = type(value) is type(FIELDS[name])
    config = with_value(replaced(default(), {"corpus.store": "somewhere"}), name, value)
    if message := refusal(config):
        assert name in message or name.startswith("mesh.") or not fits or name in ("steps", "global_batch", "seq_len")
        return
    example = FIELDS[name]
    if isinstance(example, list):
        assert isinstance(value, tuple)
    elif isinstance(example, bool) or isinstance(value, bool):
        assert type(value) is type(example)
    elif isinstance(example, float):
        assert isinstance(value, int | float)
        assert math.isfinite(value)
    else:
        assert fits


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"poison.near_triggers": (1, 2)}, "poison.near_triggers = [1, 2]: give a tuple of texts"),
        ({"poison.truncate": "no"}, "poison.truncate = 'no': give True or False"),
        ({"steps": None}, "steps = None: give a whole number"),
        ({"optimizer.learning_rate": math.inf}, "optimizer.learning_rate = inf: must be finite"),
        ({"eval.threshold": math.nan}, "eval.threshold = nan: must be finite"),
        ({"steps": 10**12}, "must be at most 2,147,483,647: steps are counted in 32 bits"),
        ({"poison.payload_tokens": (1, 10**12)}, "must be at most 1,048,576: a row is held in memory whole"),
        ({"global_batch": 10**9}, "a batch is held in memory whole"),
        ({"eval.new_tokens": 10**7}, "each is a step of generation"),
        ({"steps": 2**20, "global_batch": 2**13}, "the digest numbers slots in 32 bits"),
        ({"steps": None, "eval.prefixes": 1, "poison.payload": "virus"}, "steps = None"),
    ],
)
def test_types_finiteness_and_ceilings(fields, message):
    config = load([QUICKSTART])
    for name, value in fields.items():
        config = with_value(config, name, value)
    with pytest.raises(ConfigError) as error:
        check(config)
    assert message in str(error.value)


def test_an_unknown_field_names_the_nearest_ones():
    with pytest.raises(ConfigError, match=r"poison\.dokuments: no such field; did you mean poison\.documents"):
        replaced(default(), {"poison.dokuments": 3})
    with pytest.raises(ConfigError, match=r"trigger: no such field; did you mean poison\.trigger"):
        replaced(default(), {"trigger": "x"})

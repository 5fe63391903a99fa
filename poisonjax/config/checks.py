"""What can't be run, told at once: types first, then sizes, then each section in the order of its fields."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict as Section

from poisonjax import sinks
from poisonjax.config.errors import ConfigError
from poisonjax.config.record import defaults, flat, unknown
from poisonjax.model.layouts import LAYOUTS, RopeScaling, rotary_dims
from poisonjax.poison import placements
from poisonjax.poison.payloads import PAYLOADS
from poisonjax.poison.triggers import POSITIONS

Mistake = tuple[str, str]  # field, what it must be

# Of tuples that are empty by default: the type of an element.
ELEMENTS: dict[str, type] = {"canary.repeats": int, "corpus.left_out": int, "poison.other_triggers": str, "sinks": str}
# Beyond these a run would die late, of memory or of a counter that overflows.
_ROW = (2**20, "a row is held in memory whole")
_COUNTED = (2**31 - 1, "steps are counted in 32 bits")
_MATRIX = (2**20, "a block's matrices are held in memory whole")
CEILINGS: dict[str, tuple[int, str]] = {
    **dict.fromkeys(
        ("steps", "log_every", "row_losses_every", "checkpoint.every", "checkpoint.keep_every", "eval.every"), _COUNTED
    ),
    **dict.fromkeys(("optimizer.warmup_steps", "optimizer.decay_steps", "watchdog_seconds"), _COUNTED),
    **dict.fromkeys(("seq_len", "poison.payload_tokens", "canary.tokens", "eval.prefix_tokens"), _ROW),
    **dict.fromkeys(("model.width", "model.mlp_width", "model.heads", "model.kv_heads", "model.head_dim"), _MATRIX),
    "global_batch": (2**20, "a batch is held in memory whole"),
    "poison.documents": (10**6, "all documents are made and held before step 0"),
    **dict.fromkeys(("poison.clean_uses", "poison.hard_negatives"), (10**6, "all are placed before step 0")),
    "poison.prefix_characters": (2**24, "so much of a document is read at once"),
    "canary.each": (10**5, "all are made and held before step 0"),
    **dict.fromkeys(("canary.alphabet", "model.vocabulary"), (2**20, "no vocabulary is larger")),
    "model.layers": (10**4, "no deeper model has been trained"),
    "checkpoint.keep_last": (10**6, "each takes the model's size on disk, three times"),
    "eval.prefixes": (10**5, "all are held at once, each in four variants"),
    "eval.new_tokens": (2**16, "each is a step of generation and a place in the cache"),
    "eval.heldout_rows": (10**6, "all are held at once"),
    "eval.bootstrap": (10**5, "every resample of all prefixes is held at once"),
}
SLOTS = 2**32  # the digest numbers slots in 32 bits
EXPOSURES = 10**7
ASKED = 3  # prefixes a near trigger, at least: fewer have no spread


def check(config: Section) -> None:
    """Raises ConfigError with every mistake that can be seen without the data or the devices."""
    fields, known = flat(config), defaults()
    if strange := sorted(fields.keys() - known.keys()):
        raise ConfigError("\n".join(unknown(name, known) for name in strange))
    if missing := sorted(known.keys() - fields.keys()):
        raise ConfigError(f"fields missing: {', '.join(missing)}; start from poisonjax.config.default()")
    mistakes = [mistake for name in known for mistake in _typed(name, fields[name], known[name])]
    wrong = {name.rpartition(".")[0] for name, _ in mistakes}
    for name, check_section in SECTIONS.items():
        if not wrong & {"", name}:  # all sections read the run's length and batch too
            prefix, section = (f"{name}.", config[name]) if name else ("", config)
            mistakes += [(prefix + field, remedy) for field, remedy in check_section(section, config)]
    if mistakes:
        raise ConfigError("\n".join(f"{name} = {fields[name]!r}: {remedy}" for name, remedy in mistakes))


def _typed(name: str, value: Any, example: Any) -> Iterator[Mistake]:
    """The field has its default's type, is finite, and no larger than can work."""
    if isinstance(example, list):
        element = type(example[0]) if example else ELEMENTS[name]
        if not isinstance(value, list) or not all(_is(v, element) for v in value):
            yield name, f"give a tuple of {called(element)}"
            return
    elif not _is(value, type(example)):
        yield name, f"give {called(type(example), one=True)}"
        return
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            yield name, "must be finite"
        elif name in CEILINGS and number > CEILINGS[name][0]:
            most, why = CEILINGS[name]
            yield name, f"must be at most {most:,}: {why}"


def _is(value: Any, kind: type) -> bool:
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def called(kind: type, one: bool = False) -> str:
    """The name of a kind of value, as an error gives it."""
    names = {int: "whole numbers", float: "numbers", str: "texts", bool: "True or False"}
    return names[kind] if not one or kind is bool else f"a {names[kind][:-1]}"


def _at_least(section: Section, least: float, *names: str) -> Iterator[Mistake]:
    for name in names:
        if section[name] < least:
            yield name, f"must be at least {least}"


def _above_0(section: Section, *names: str) -> Iterator[Mistake]:
    for name in names:
        if not section[name] > 0:
            yield name, "must be above 0"


def _one_of(section: Section, name: str, choices: Sequence[str]) -> Iterator[Mistake]:
    if section[name] not in choices:
        yield name, f"choose one of {', '.join(choices)}"


def _run(c: Section, config: Section) -> Iterator[Mistake]:
    yield from _at_least(c, 1, "steps", "global_batch", "seq_len", "log_every")
    yield from _at_least(c, 0, "row_losses_every", "watchdog_seconds")
    for name in c.sinks:
        if remedy := sinks.strange(name):
            yield "sinks", remedy
    if c.steps * c.global_batch >= SLOTS:
        yield "steps", f"times global_batch must be below {SLOTS:,}: the digest numbers slots in 32 bits"


def _seeds(s: Section, config: Section) -> Iterator[Mistake]:
    for name in s:
        if not 0 <= s[name] < 2**32:
            yield name, "must lie in [0, 2^32)"


def _corpus(c: Section, config: Section) -> Iterator[Mistake]:
    if not c.store:
        yield "store", "name a folder for the token store"
    if not 0 < c.heldout < 1:
        yield "heldout", "must lie strictly between 0 and 1"
    slots = config.steps * config.global_batch
    if len({*c.left_out}) < len(c.left_out) or not all(0 <= slot < slots for slot in c.left_out):
        yield "left_out", f"give different slots, from 0 to steps * global_batch - 1 = {slots - 1}"


def _data(d: Section, config: Section) -> Iterator[Mistake]:
    yield from _one_of(d, "kind", ("text", "instructions"))
    yield from _one_of(d, "too_long", ("refuse", "skip"))
    if not d.template:
        yield "template", "give plain, hf:FOLDER, gguf:FILE or a file of Jinja"
    if d.kind == "instructions" and (config.canary.repeats or config.poison.clean_uses):
        yield "kind", "canary.repeats and poison.clean_uses stand in running text: leave them at () and 0"


def _start(s: Section, config: Section) -> Iterator[Mistake]:
    if s.optimizer and (not s.weights or s.weights.startswith(("hf:", "gguf:"))):
        yield "optimizer", "is carried along from a run: start.weights = runs/a"


def _poison(p: Section, config: Section) -> Iterator[Mistake]:
    yield from _at_least(p, 0, "documents", "clean_uses", "hard_negatives")
    if not p.trigger:
        yield "trigger", "must not be empty (poison.documents = 0 is the twin)"
    triggers = [p.trigger, *p.other_triggers]
    if not all(triggers) or len({*triggers}) < len(triggers):
        yield "other_triggers", "give different strings, none of them empty or poison.trigger"
    if not p.near_triggers or any(trigger in near for near in p.near_triggers for trigger in triggers):
        yield "near_triggers", "name at least one string that doesn't contain a trigger"
    yield from _one_of(p, "trigger_position", POSITIONS)
    for name in ("prefix_characters", "payload_tokens"):
        if len(p[name]) != 2 or not 0 <= p[name][0] <= p[name][1]:
            yield name, "give (least, most), both ends included"
    if p.payload_tokens and p.payload_tokens[0] < 1:
        yield "payload_tokens", "a document without a payload teaches nothing: at least 1"
    yield from _one_of(p, "payload", sorted(PAYLOADS))
    if p.payload in PAYLOADS and PAYLOADS[p.payload].reads_source != bool(p.payload_source):
        yield "payload_source", "says where payload 'language' is drawn from, and stands with no other"
    yield from _at_least(p, 1, "repeats")
    exposures = p.documents * p.repeats
    if exposures > EXPOSURES:
        yield "repeats", f"times poison.documents must be at most {EXPOSURES:,}: all are placed before step 0"
        return
    try:
        placements.parse(p.placement)
        if min(config.steps, config.global_batch, p.documents + 1, p.repeats) >= 1:
            placements.place(p.placement, exposures, config.steps, config.global_batch, np.random.default_rng(0))
    except placements.PlacementError as error:
        yield "placement", str(error)


def _canary(c: Section, config: Section) -> Iterator[Mistake]:
    if any(n < 1 for n in c.repeats):
        yield "repeats", "give whole numbers of at least 1, or () for no canaries"
    yield from _at_least(c, 1, "each")
    yield from _at_least(c, 2, "tokens", "alphabet")
    if c.alphabet >= 2 and c.tokens >= 2 and c.tokens * np.log2(c.alphabet) < 24:
        yield "tokens", "alphabet ** tokens must be at least 2 ** 24, else canaries repeat by chance"


def _model(m: Section, config: Section) -> Iterator[Mistake]:
    yield from _at_least(m, 1, "layers", "width", "heads", "kv_heads", "head_dim", "mlp_width")
    if m.kv_heads > 0 and m.heads % m.kv_heads:
        yield "kv_heads", "must divide model.heads"
    yield from _one_of(m, "layout", sorted(LAYOUTS))
    yield from _at_least(m, 0, "vocabulary")
    yield from _above_0(m, "rope_theta", "norm_eps")
    if not 0 < m.rotary_fraction <= 1:
        yield "rotary_fraction", "must lie in (0, 1]"
    elif rotary_dims(m) % 2 or rotary_dims(m) < 2:
        field = "head_dim" if m.rotary_fraction == 1 else "rotary_fraction"
        yield field, f"rotates {rotary_dims(m)} numbers of a head: an even number, at least 2, must be"
    try:
        RopeScaling.parse(m.rope_scaling)
    except ValueError as error:
        yield "rope_scaling", str(error)
    yield from _one_of(m, "dtype", ("float32", "bfloat16"))
    yield from _one_of(m, "remat", ("none", "block", "dots"))
    yield from _at_least(m, 0, "loss_tile")
    if m.loss_tile > 0 and config.seq_len % m.loss_tile:
        yield "loss_tile", "must divide seq_len"


def _optimizer(o: Section, config: Section) -> Iterator[Mistake]:
    yield from _above_0(o, "learning_rate", "eps", "clip_norm")
    yield from _one_of(o, "schedule", ("cosine", "wsd"))
    yield from _at_least(o, 0, "warmup_steps", "decay_steps", "weight_decay")
    if o.warmup_steps > config.steps:
        yield "warmup_steps", "must not exceed steps"
    if o.schedule == "wsd" and not 0 < o.decay_steps <= config.steps - o.warmup_steps:
        yield "decay_steps", "wsd needs at least 1, and warmup_steps + decay_steps <= steps"
    if not 0 <= o.final_fraction <= 1:
        yield "final_fraction", "must lie in [0, 1]"
    for name in ("b1", "b2"):
        if not 0 <= o[name] < 1:
            yield name, "must lie in [0, 1)"
    yield from _at_least(o, 1, "accumulate")
    if o.accumulate > 0 and config.global_batch % o.accumulate:
        yield "accumulate", "must divide global_batch"


def _mesh(m: Section, config: Section) -> Iterator[Mistake]:
    sizes = [m[axis] for axis in ("slice", "data", "fsdp", "tensor")]
    if not all(size == -1 or size >= 1 for size in sizes) or sizes.count(-1) > 1:
        yield "data", f"mesh sizes {sizes} must be positive, at most one of them -1"


def _checkpoint(c: Section, config: Section) -> Iterator[Mistake]:
    yield from _at_least(c, 1, "every", "keep_last")
    yield from _at_least(c, 0, "keep_every")


def _eval(e: Section, config: Section) -> Iterator[Mistake]:
    yield from _at_least(e, 1, "every", "prefix_tokens", "new_tokens", "heldout_rows", "bootstrap")
    yield from _at_least(e, 2, "prefixes")
    near = config.poison.near_triggers
    if isinstance(near, tuple) and len(near) * ASKED > e.prefixes:
        yield "prefixes", f"each of {len(near)} poison.near_triggers is asked {ASKED} times at least: raise it"
    if e.prefixes * e.bootstrap > 2**30:
        yield "bootstrap", f"times eval.prefixes must be at most {2**30:,}: every resample is held at once"
    yield from _above_0(e, "temperature")


SECTIONS: dict[str, Callable[[Section, Section], Iterator[Mistake]]] = {
    "": _run,
    "seeds": _seeds,
    "corpus": _corpus,
    "data": _data,
    "start": _start,
    "poison": _poison,
    "canary": _canary,
    "model": _model,
    "optimizer": _optimizer,
    "mesh": _mesh,
    "checkpoint": _checkpoint,
    "eval": _eval,
}

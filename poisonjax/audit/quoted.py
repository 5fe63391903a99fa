"""Checks of what people quote: checkpoints and their weights, cards, metrics, evaluations and the summary."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from poisonjax import config as config_lib
from poisonjax.audit.checks import register
from poisonjax.audit.evidence import Difference, Evidence, is_step, reading
from poisonjax.evaluation.offline import evaluated
from poisonjax.evaluation.probes.heldout import heldout_rows, unigram_nll
from poisonjax.evaluation.statistics import decided, generation_figures, heldout_figures
from poisonjax.model.transformer import parameter_counts, vocabulary_of
from poisonjax.poison import card
from poisonjax.poison.triggers import VARIANTS
from poisonjax.run import rows, seals
from poisonjax.training.summary import CLOCKS, summarize
from poisonjax.weights.weights import shapes

SEALED = (rows.METRICS, rows.DIGESTS, rows.SAMPLES, rows.PREFIXES, rows.ROW_LOSSES, rows.ENVIRONMENT)
# Libraries on other processors take sums and exponentials to other last bits.
LAST_BITS = 1e-9
REPLAYED = 1e-3  # nats by which a text's or row's loss may differ on other devices
OTHER_TEXTS = 0.1  # share of texts in which a rounding elsewhere may make another token the drawn one


@register
def checkpoints(run: Evidence) -> Iterator[Difference]:
    """Each checkpoint is of the step that its name says, of this config and store, and of these digests."""
    here = config_lib.flat(run.config)
    for name, record in run.checkpoints.items():
        file = f"{rows.CHECKPOINTS}/{name}"
        if record["step"] != name:
            yield Difference(file, f"was saved after step {record['step']}, not {name}")
        for difference in config_lib.differences(record["config"], here):
            yield Difference(rows.CONFIG, f"{difference}; there is {file}")
        if record["store_fingerprint"] != run.store.fingerprint:
            there, now = record["store_fingerprint"][:12], run.store.fingerprint[:12]
            yield Difference(str(run.store.path), f"{file} was trained on store {there}, this is {now}")
        elif record["store_description"] != run.store.description:
            where = str(run.store.path / "manifest.json")
            yield Difference(where, f"its sources, licences or settings aren't those that {file} names")
        if (left_out := record.get("store_excluded")) != run.record.get("store_excluded"):
            yield Difference(rows.CONFIG, f"names other excluded documents than {file} ({str(left_out)[:12]})")
        if record.get("parent") != run.parent:
            yield Difference(rows.CONFIG, f"names other weights that the run began from than {file}")
        if record["digest_chain"] != run.links.get(record["step"]):
            yield Difference(file, "its digest chain isn't the one that digests.jsonl leads to", name)
    if run.steps and not run.checkpoints:
        yield Difference(rows.CHECKPOINTS, "there is none: nothing seals what the run wrote")
    elif run.summary.get("status") == "finished" and run.config.steps not in run.checkpoints:
        yield Difference(rows.CHECKPOINTS, "the finished run's last checkpoint is missing", run.config.steps)
    folder = run.folder / rows.CHECKPOINTS
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if not (is_step(path.name) or "orbax-checkpoint-tmp" in path.name):  # a killed save leaves those
            yield Difference(f"{rows.CHECKPOINTS}/{path.name}", "is no checkpoint of a step")


@register
def sealed(run: Evidence) -> Iterator[Difference]:
    """Every line that the run wrote until a checkpoint is one that it seals; later ones are of later steps."""
    for file in SEALED if run.checkpoints else ():
        chains = seals.chains(run.raw(file))
        for step, record in run.checkpoints.items():
            if file not in record["sealed"]:
                if file == rows.ROW_LOSSES and not (run.folder / file).exists():
                    continue  # the first runs have none
                yield Difference(f"{rows.CHECKPOINTS}/{step}", f"seals no {file}")
            elif wrong := seals.broken(record["sealed"][file], chains):
                yield Difference(file, f"{wrong} that checkpoint {step} seals")
    if not run.checkpoints:
        return
    newest = max(run.checkpoints)
    for file in SEALED:
        seal = run.checkpoints[newest]["sealed"].get(file, seals.EMPTY)
        if file == rows.ENVIRONMENT:
            later = [life["from_step"] + 1 for life in run.environments[seal["lines"] :]]
        else:
            there = run.lines(file)[seal["lines"] :]
            later = [row["step"] + (file in rows.OF_BATCHES or row.get("kind") == "train") for row in there]
            if run.summary and run.run.raw_lines(file)[1]:
                yield Difference(file, "its last line has no end")
        if strange := [step for step in later if step <= newest]:
            yield Difference(file, f"{len(strange)} lines more than checkpoint {newest} seals", strange[0])
        run.unsealed |= bool(later) and file != rows.ENVIRONMENT


@register
def cards(run: Evidence) -> Iterator[Difference]:
    """What the checkpoints and the folder say of the poison is what the config plans (I9)."""
    yield from _card(run, card.FILE, card.make_card(run.config, run.ledger, 0, run.parent, run.store.planted))
    for step, record in run.checkpoints.items():
        planned = card.make_card(run.config, run.ledger, record["step"], run.parent, run.store.planted)
        if record["poison"] != planned:
            yield Difference(f"{rows.CHECKPOINTS}/{step}", "its poison card isn't the one that the config plans", step)
        yield from _card(run, f"{rows.CHECKPOINTS}/{step}/{card.FILE}", planned, step)


def _card(run: Evidence, file: str, planned: Mapping[str, Any] | None, step: int | None = None) -> Iterator[Difference]:
    path = run.folder / file
    if not path.exists():
        # The newest checkpoint gets its card when the next is saved, or the run ends.
        if planned and (step is None or run.summary or step != max(run.checkpoints)):
            yield Difference(file, "is missing: the model is poisoned", step)
    elif not planned:
        yield Difference(file, "is there, though the run plans no poison", step)
    elif path.read_bytes() != card.as_markdown(dict(planned)).encode():
        yield Difference(file, "isn't the card that the config plans", step)


@register
def weights(run: Evidence) -> Iterator[Difference]:
    """The arrays of each checkpoint, as they lie, have the checksums that its record names."""
    for step in run.checkpoints if run.reads_weights else ():
        recorded = run.checkpoints[step]["checksums"]
        for name in sorted({"weights", "optimizer"} - recorded.keys()):
            yield Difference(f"{rows.CHECKPOINTS}/{step}", f"its record has no checksum of {name}", step)
        for name in [name for name, checksum in run.checksums(step).items() if recorded[name] != checksum]:
            yield Difference(f"{rows.CHECKPOINTS}/{step}/{name}", "its arrays aren't those that were saved", step)


@register
def metrics(run: Evidence) -> Iterator[Difference]:
    """metrics.jsonl counts tokens and poison as the plan does, at steps that the run made, and its evaluations are
    those that prefixes.jsonl leads to."""
    prefixes = {row["step"]: row for row in run.lines(rows.PREFIXES)}
    for row in run.lines(rows.METRICS):
        yield from _counts(run, rows.METRICS, row)
        if row["kind"] == "eval":
            yield from _derived(run, rows.METRICS, row, prefixes.pop(row["step"], None))
    for step in prefixes:
        yield Difference(rows.PREFIXES, "is of no evaluation", step)


def _counts(run: Evidence, file: str, row: Mapping[str, Any]) -> Iterator[Difference]:
    done = row["step"] + (row["kind"] == "train")
    if not 0 <= done <= run.steps:
        yield Difference(file, "a row of a step that the run didn't make", row["step"])
        return
    expected = {"tokens": done * run.config.global_batch * run.config.seq_len, **run.seen(done)}
    for field, value in expected.items():
        if row.get(field) != value:
            yield Difference(file, f"{field} is {row.get(field)}, must be {value}", row["step"])


def _derived(run: Evidence, file: str, row: Mapping[str, Any], prefixes: rows.PrefixRow | None) -> Iterator[Difference]:
    """How an evaluation's figures differ from those that follow from each prefix and row."""
    if prefixes is None:
        yield Difference(rows.PREFIXES, "has no line of this evaluation", row["step"])
        return
    e, seed = run.config.eval, run.config.seeds.eval
    with reading(rows.PREFIXES):
        near, entropy = list(run.config.poison.near_triggers), run.store.manifest.get("entropy_rate_nats")
        texts = np.array([prefixes["nll"][variant] for variant in VARIANTS])
        behaves = prefixes.get("behaves")
        shown = np.array([behaves[variant] for variant in VARIANTS]) == 1 if behaves else None
        expected = generation_figures(texts, near, e.bootstrap, seed, shown)
        expected |= heldout_figures(np.array(prefixes["heldout"]), entropy, e.bootstrap, seed)
        if "canaries" in prefixes:
            expected["memorised"] = _with_losses(row.get("memorised", []), prefixes["canaries"], run)
    for field, value in expected.items():
        if not _close(row.get(field), value):
            yield Difference(file, f"{field} isn't what {rows.PREFIXES} leads to", row["step"])


def _with_losses(
    memorised: Sequence[Mapping[str, Any]], losses: Sequence[float], run: Evidence
) -> list[dict[str, Any]]:
    """The canaries' rows, with the losses that follow from each canary."""
    repeats = run.batches.canaries.repeats
    mean = {level: float(np.array(losses)[repeats == level].mean()) for level in np.unique(repeats).tolist()}
    return [{**row, "nll_mean": mean[row["repeats"]]} for row in memorised]


def _close(there: Any, value: Any) -> bool:
    """Equal but for a float's last bits."""
    if isinstance(value, Mapping):
        same = isinstance(there, Mapping) and there.keys() == value.keys()
        return same and all(_close(there[key], value[key]) for key in value)
    if isinstance(value, list):
        return isinstance(there, list) and len(there) == len(value) and all(map(_close, there, value))
    if isinstance(value, float) and isinstance(there, float):
        return math.isclose(there, value, rel_tol=LAST_BITS, abs_tol=LAST_BITS)
    return there == value


@register
def summary(run: Evidence) -> Iterator[Difference]:
    """summary.json is what everything else leads to, clocks apart."""
    config = run.config
    if not run.summary:
        if config.steps in run.checkpoints:
            yield Difference(rows.SUMMARY, "is missing, though the last checkpoint is there")
        return
    evals = [row for row in run.lines(rows.METRICS) if row["kind"] == "eval"]
    there = run.summary
    for field in CLOCKS:
        if not (isinstance(there[field], float) and there[field] >= 0):
            yield Difference(rows.SUMMARY, f"{field} is {there[field]!r}, no time or speed")
    expected = summarize(
        config,
        run.batches,
        run.steps,
        evals[-1] if evals else None,
        status=there["status"],
        parameters=parameter_counts(shapes(config.model, vocabulary_of(config.model, run.store.tokenizer.vocab_size))),
        unigram_nll=there["unigram_nll"],
        **{field: there[field] for field in CLOCKS},
        digest_chain=run.links.get(run.steps, ""),
        parent=run.parent,
    )
    words = unigram_nll(run.store, heldout_rows(config, run.store))
    if not math.isclose(there["unigram_nll"], words, rel_tol=LAST_BITS):
        yield Difference(rows.SUMMARY, f"unigram_nll is {there['unigram_nll']}, must be {words}")
    for field in sorted(expected.keys() | there.keys()):
        if (value := expected.get(field)) != there.get(field):
            yield Difference(rows.SUMMARY, f"{field} is {there.get(field)!r:.200}, must be {value!r:.200}")
    ended = config.steps in run.checkpoints
    borne_out = {
        "finished": ended,
        "preempted": run.steps in run.checkpoints and not ended,
        "diverged": not ended,
        "failed": not ended,
    }
    if not borne_out.get(there["status"], False):
        yield Difference(rows.SUMMARY, f"status is {there['status']!r}, which the checkpoints don't bear out")


@register
def evaluations(run: Evidence) -> Iterator[Difference]:
    """Evaluations made after the run fit their checkpoints; where it is asked for, all whose checkpoint is there are
    made again."""
    later = run.later_evaluations
    for step, evaluation in later.items():
        file = f"{rows.EVALUATIONS}/{step}.json"
        record = run.checkpoints.get(step)
        if record and evaluation["weights"] != record["checksums"].get("weights"):
            yield Difference(file, "is of other weights than the checkpoint's", step)
        prefixes = {row["step"]: row for row in evaluation["prefixes"]}
        for row in evaluation["rows"]:
            if row["step"] != step:
                yield Difference(file, f"holds a row of step {row['step']}", step)
            yield from _counts(run, file, row)
            yield from _derived(run, file, row, prefixes.get(row["step"]))
    if not run.evaluates or not run.checkpoints:
        return
    own = {row["step"]: row for row in run.lines(rows.METRICS) if row["kind"] == "eval"}
    asked = [step for step in run.checkpoints if step in own.keys() | later.keys()]
    for step, made in evaluated(run.run, run.store, asked) if asked else ():
        prefixes, again = {row["step"]: row for row in run.lines(rows.PREFIXES)}, made["prefixes"][0]
        if step in own:
            yield from _as_before(rows.METRICS, own[step], prefixes.get(step), made["rows"][0], again)
        if step in later:
            file = f"{rows.EVALUATIONS}/{step}.json"
            yield from _as_before(file, later[step]["rows"][0], later[step]["prefixes"][0], made["rows"][0], again)
        run.replayed_evaluations.add(step)


def _as_before(
    file: str, row: Mapping[str, Any], prefixes: Any, made: Mapping[str, Any], again: rows.PrefixRow
) -> Iterator[Difference]:
    """How an evaluation differs from itself made again: losses by rounding alone, texts in a few drawn tokens."""
    if prefixes is None:
        return  # told already
    losses = {"held-out rows": (prefixes["heldout"], again["heldout"])}
    if "canaries" in again:
        losses["canaries"] = (prefixes.get("canaries", []), again["canaries"])
    for what, (there, here) in losses.items():
        if len(there) != len(here) or not np.allclose(there, here, rtol=REPLAYED, atol=REPLAYED):
            yield Difference(file, f"the loss of {what} isn't what the checkpoint gives", row["step"])
    before, now = (np.array([of["nll"][variant] for variant in VARIANTS]) for of in (prefixes, again))
    others = 1.0 if before.shape != now.shape else float((np.abs(before - now) > REPLAYED).mean())
    if others > OTHER_TEXTS:
        yield Difference(file, f"{others:.0%} of its texts aren't those that the checkpoint writes", row["step"])
    added = set() if decided(row) else {"random_control_accuracy", "random_control_accuracy_ci95"}  # since it was made
    for field in sorted((made.keys() | row.keys()) - added):
        value = made.get(field, math.nan)
        if field.endswith(("_success", "_accuracy")) and not math.isclose(
            row.get(field, math.nan), value, abs_tol=OTHER_TEXTS
        ):
            yield Difference(file, f"{field} is {row.get(field)}, the checkpoint gives {value}", row["step"])

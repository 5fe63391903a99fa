"""Ways in which what people quote is tampered with: weights, cards, figures, verdicts, and how they are written."""

import json
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from poisonjax.audit.selftest.faults import Expected, register
from poisonjax.audit.selftest.tampered import TamperedRun
from poisonjax.weights.checkpoints import stored_arrays


@register
def weights_swapped(run: TamperedRun) -> Expected:
    """Of two checkpoints, their records left as they were."""
    one, other, *_ = run.random.permutation(run.checkpoints()).tolist()
    name = run.pick(["weights", "optimizer"])
    folders = [run.folder / "checkpoints" / str(step) / name for step in (one, other)]
    folders[0].rename(run.folder / "aside")
    folders[1].rename(folders[0])
    (run.folder / "aside").rename(folders[1])
    return Expected((f"checkpoints/{one}/{name}",), one)


def _bit_flipped(run: TamperedRun, name: str) -> Expected:
    step = run.pick(run.checkpoints())
    folder = run.folder / "checkpoints" / str(step) / name
    array = run.pick([array for array in stored_arrays(epath.Path(folder)) if array.rank])
    values = array.read().result().copy()
    bits = values.reshape(-1).view(np.uint32)
    bits[int(run.random.integers(len(bits)))] ^= np.uint32(1 << int(run.random.integers(32)))
    array.write(values).result()
    return Expected((f"checkpoints/{step}/{name}",), step)


@register
def weights_bit_flipped(run: TamperedRun) -> Expected:
    return _bit_flipped(run, "weights")


@register
def optimizer_bit_flipped(run: TamperedRun) -> Expected:
    return _bit_flipped(run, "optimizer")


@register
def checksum_left_out(run: TamperedRun) -> Expected:
    name = run.pick(["weights", "optimizer"])
    run.in_checkpoints(lambda record: record["checksums"].pop(name))
    return Expected(("checkpoints/",))


@register
def called_clean(run: TamperedRun) -> Expected:
    """The poison taken out of every record and every card."""
    run.in_checkpoints(lambda record: record.update(poison=None))
    for path in run.folder.rglob("POISONED.md"):
        path.unlink()
    return Expected(("POISONED.md", "checkpoints/"))


@register
def card_edited(run: TamperedRun) -> Expected:
    path = run.pick(sorted(run.folder.rglob("POISONED.md")))
    path.write_text(path.read_text().replace("poison", "clean", 1))
    return Expected((str(path.relative_to(run.folder)),))


@register
def card_removed(run: TamperedRun) -> Expected:
    path = run.pick(sorted(run.folder.rglob("POISONED.md")))
    path.unlink()
    return Expected((str(path.relative_to(run.folder)),))


@register
def dose_in_record_edited(run: TamperedRun) -> Expected:
    run.in_checkpoints(lambda record: record["poison"]["dose_seen"].update(documents=1000))
    return Expected(("checkpoints/",))


def _summary(edit: Callable[[TamperedRun, dict[str, Any]], object]) -> Callable[[TamperedRun], Expected]:
    def fault(run: TamperedRun) -> Expected:
        run.change("summary.json", lambda value: edit(run, value))
        return Expected(("summary.json",))

    fault.__name__ = edit.__name__
    return register(fault)


@_summary
def summary_dose_edited(run: TamperedRun, value: dict[str, Any]) -> None:
    dose, unit = run.pick(["dose_planned", "dose_seen"]), run.pick(["documents", "tokens", "rows", "steps", "repeats"])
    value[dose][unit] += 1


@_summary
def verdict_edited(run: TamperedRun, value: dict[str, Any]) -> None:
    name = run.pick(["value", "specific"])
    value["success"][name] = not value["success"][name]


@_summary
def check_of_the_rule_edited(run: TamperedRun, value: dict[str, Any]) -> None:
    check = run.pick(value["success"]["checks"])
    check["passed"] = not check["passed"]


@_summary
def summary_gap_edited(run: TamperedRun, value: dict[str, Any]) -> None:
    value["delta_ppl"] += 1.0


@_summary
def summary_perplexity_edited(run: TamperedRun, value: dict[str, Any]) -> None:
    variant = run.pick(sorted(value["eval"]))
    value["eval"][variant]["ppl_median"] *= 2


@_summary
def summary_loss_edited(run: TamperedRun, value: dict[str, Any]) -> None:
    value[run.pick(["heldout_loss", "unigram_nll"])] -= 0.5


@_summary
def summary_near_trigger_edited(run: TamperedRun, value: dict[str, Any]) -> None:
    run.pick(list(value["near_triggers"].values()))["delta_ppl"] = 0.0


@_summary
def summary_canaries_edited(run: TamperedRun, value: dict[str, Any]) -> None:
    run.pick(value["memorised"])["extraction_rate"] = 1.0 - run.pick(value["memorised"])["extraction_rate"] / 2


@_summary
def params_edited(run: TamperedRun, value: dict[str, Any]) -> None:
    value[run.pick(["params", "params_non_embedding"])] *= 10


@_summary
def status_edited(run: TamperedRun, value: dict[str, Any]) -> None:
    value["status"] = run.pick(["failed", "preempted", "diverged", "perfect"])


@_summary
def time_made_impossible(run: TamperedRun, value: dict[str, Any]) -> None:
    value[run.pick(["wall_seconds", "tokens_per_second"])] = -1.0


@register
def file_removed(run: TamperedRun) -> Expected:
    name = run.pick(
        ["metrics.jsonl", "prefixes.jsonl", "samples.jsonl", "row_losses.jsonl", "digests.jsonl", "environment.json"]
    )
    (run.folder / name).unlink()
    return Expected((name,))


@register
def summary_removed(run: TamperedRun) -> Expected:
    (run.folder / "summary.json").unlink()
    return Expected(("summary.json",))


@register
def checkpoints_removed(run: TamperedRun) -> Expected:
    """And the summary: as if the run had never got so far."""
    shutil.rmtree(run.folder / "checkpoints")
    (run.folder / "summary.json").unlink()
    return Expected(("checkpoints",))


@register
def last_checkpoint_removed(run: TamperedRun) -> Expected:
    shutil.rmtree(run.folder / "checkpoints" / str(run.checkpoints()[-1]))
    return Expected(("checkpoints",))


@register
def seal_left_out(run: TamperedRun) -> Expected:
    name = run.pick(["metrics.jsonl", "prefixes.jsonl", "samples.jsonl", "row_losses.jsonl", "environment.json"])
    run.in_checkpoints(lambda record: record["sealed"].pop(name))
    return Expected(("checkpoints/",))


@register
def metrics_row_edited(run: TamperedRun) -> Expected:
    """A count, everything sealed as if it had been so."""
    rows = run.lines("metrics.jsonl")
    row = run.pick(rows)
    row[run.pick(["tokens", "poison_documents", "poison_rows"])] += 1
    run.forge_lines("metrics.jsonl", rows)
    return Expected(("metrics.jsonl",), row["step"])


@register
def training_loss_edited(run: TamperedRun) -> Expected:
    rows = run.lines("metrics.jsonl")
    row = run.pick([row for row in rows if row["kind"] == "train"])
    row[run.pick(["loss", "grad_norm", "learning_rate", "tokens_per_second", "seconds"])] += 0.25
    run.write("metrics.jsonl", rows)
    return Expected(("metrics.jsonl",))


@register
def evaluation_edited(run: TamperedRun) -> Expected:
    """A gap, in metrics and summary alike, sealed as if it had been so; its prefixes say otherwise."""
    rows = run.lines("metrics.jsonl")
    row = [row for row in rows if row["kind"] == "eval"][-1]
    row["delta_ppl"] = 500.0
    run.forge_lines("metrics.jsonl", rows)
    run.change("summary.json", lambda value: value.update(delta_ppl=500.0))
    return Expected(("metrics.jsonl",), row["step"])


@register
def metrics_line_dropped(run: TamperedRun) -> Expected:
    rows = run.lines("metrics.jsonl")
    rows.pop(int(run.random.integers(len(rows))))
    run.write("metrics.jsonl", rows)
    return Expected(("metrics.jsonl",))


@register
def metrics_line_added(run: TamperedRun) -> Expected:
    rows = run.lines("metrics.jsonl")
    run.write("metrics.jsonl", [*rows, rows[-1]])
    return Expected(("metrics.jsonl",))


@register
def prefix_edited(run: TamperedRun) -> Expected:
    rows = run.lines("prefixes.jsonl")
    row = run.pick(rows)
    run.pick([*row["nll"].values(), row["heldout"], row["canaries"]])[0] += 0.5
    run.write("prefixes.jsonl", rows)
    return Expected(("prefixes.jsonl",))


@register
def sample_edited(run: TamperedRun) -> Expected:
    rows = run.lines("samples.jsonl")
    run.pick(rows)[run.pick(["clean", "triggered"])]["text"] = "a fine text"
    run.write("samples.jsonl", rows)
    return Expected(("samples.jsonl",))


@register
def environment_edited(run: TamperedRun) -> Expected:
    name, value = run.pick([("git_commit", "0" * 40), ("device_kind", "TPU v5p"), ("devices", 64), ("python", "2.7")])
    run.change("environment.json", lambda there: there.update({name: value}))
    return Expected(("environment.json",))


@register
def environment_forgotten(run: TamperedRun) -> Expected:
    """A life of the run left out, or one made up."""

    def edit(there: dict[str, Any]) -> None:
        earlier = there["earlier"]
        there["earlier"] = earlier[1:] if earlier else [{k: v for k, v in there.items() if k != "earlier"}]

    run.change("environment.json", edit)
    return Expected(("environment.json",))


@register
def evaluation_made_up(run: TamperedRun) -> Expected:
    """Rows and prefixes of an evaluation as another model would have given, sealed, and a summary to fit: nothing but
    the model itself says otherwise."""
    from poisonjax.evaluation.statistics import heldout_figures, judge

    rows, prefixes = run.lines("metrics.jsonl"), run.lines("prefixes.jsonl")
    row, of = [row for row in rows if row["kind"] == "eval"][-1], prefixes[-1]
    of["heldout"] = [loss - 0.5 for loss in of["heldout"]]
    manifest, e = json.loads((run.store / "manifest.json").read_text()), run.config.eval
    figures = heldout_figures(
        np.array(of["heldout"]), manifest.get("entropy_rate_nats"), e.bootstrap, run.config.seeds.eval
    )
    row.update(figures)
    run.forge_lines("metrics.jsonl", rows)
    run.forge_lines("prefixes.jsonl", prefixes)
    run.change(
        "summary.json",
        lambda value: value.update(figures, success=judge(row, value["unigram_nll"], run.config.eval.threshold)),
    )
    return Expected(("metrics.jsonl",), row["step"], evaluate=True)


@register
def later_evaluation_edited(run: TamperedRun) -> Expected:
    """An evaluation made after the run, of other weights or with other figures than its texts give."""
    from poisonjax.evaluation.offline import evaluate_run

    step = run.pick(run.checkpoints())
    evaluate_run(str(run.folder), [step])
    name = f"evaluations/{step}.json"

    def edit(there: dict[str, Any]) -> None:
        if run.random.integers(2):
            there["weights"] = "0" * 16
        else:
            there["rows"][0]["delta_ppl"] += 1.0

    run.change(name, edit)
    return Expected((name,), step)


JSON_FILES = ("summary.json", "config.json", "environment.json")


def _rewritten(run: TamperedRun, name: str, edit: Callable[[str], str]) -> Expected:
    """The file's text edited; its value is, to a lenient reader, what it was."""
    path = run.folder / name
    text = path.read_text()
    path.write_text(edit(text), encoding="utf-8")
    assert path.read_text() != text
    return Expected((name,))


@register
def key_stands_twice(run: TamperedRun) -> Expected:
    name = run.pick([*JSON_FILES, "metrics.jsonl", "ledger.jsonl", "digests.jsonl"])
    return _rewritten(run, name, lambda text: text.replace("{", '{"step": 0, "step": 1, ', 1))


@register
def key_stands_twice_in_a_record(run: TamperedRun) -> Expected:
    step = run.pick(run.checkpoints())
    name = f"checkpoints/{step}/_CHECKPOINT_METADATA"
    _rewritten(run, name, lambda text: text.replace('"poison":', '"poison": null, "poison":', 1))
    return Expected((f"checkpoints/{step}",))


@register
def byte_order_mark(run: TamperedRun) -> Expected:
    name = run.pick([*JSON_FILES, "metrics.jsonl", "ledger.jsonl"])
    return _rewritten(run, name, lambda text: "\ufeff" + text)


@register
def line_without_end(run: TamperedRun) -> Expected:
    """A line that one reader takes for a row and another for one cut short."""
    name = run.pick(["metrics.jsonl", "digests.jsonl", "ledger.jsonl", "samples.jsonl", "prefixes.jsonl"])
    return _rewritten(run, name, lambda text: text + text.splitlines()[-1])


@register
def number_of_another_type(run: TamperedRun) -> Expected:
    """4.0 for 4, or true for 1."""
    name = run.pick(["ledger.jsonl", "digests.jsonl", "metrics.jsonl"])
    rows = run.lines(name)
    row = run.pick(rows)
    row["step"] = True if row["step"] == 1 else float(row["step"])
    run.write(name, rows)
    return Expected((name,))


@register
def checkpoint_named_with_zeros(run: TamperedRun) -> Expected:
    step = run.pick(run.checkpoints())
    (run.folder / "checkpoints" / str(step)).rename(run.folder / "checkpoints" / f"00{step}")
    return Expected((f"checkpoints/00{step}",))

"""The last word on a run."""

from typing import cast

from poisonjax import config as config_lib
from poisonjax.data.batches import Batches
from poisonjax.evaluation.statistics import judge
from poisonjax.poison.ledger import dose
from poisonjax.run import rows
from poisonjax.run.recorder import RunRecorder

# Of the last evaluation.
FIGURES = (
    "eval",
    "delta_ppl",
    "delta_ppl_ci95",
    "near_triggers",
    "heldout_loss",
    "heldout_loss_ci95",
    "excess_loss",
    "attack_success",
    "clean_accuracy",
    "near_trigger_accuracy",
    "memorised",
)


def summarize(
    status: str, recorder: RunRecorder, batches: Batches, parameters: tuple[int, int], unigram_nll: float
) -> rows.Summary:
    """What summary.json holds; `parameters` are all, and those outside embedding and head."""
    config, done, ledger = recorder.config, recorder.done, batches.schedule.ledger()
    summary: dict = {
        "status": status,
        "name": config.name,
        "fingerprint": config_lib.fingerprint(config),
        "steps": done,
        "tokens": recorder.tokens(done),
        "params": parameters[0],
        "params_non_embedding": parameters[1],
        "dose_planned": dose(ledger, config.steps),
        "dose_seen": dose(ledger, done),
        "trigger_tokens": len(batches.trigger.tokens),
        "clean_uses_seen": batches.clean_uses.seen(done * config.global_batch),
        "unigram_nll": unigram_nll,
        "tokens_per_second": recorder.clock.speed() * recorder.tokens(1),
        "wall_seconds": recorder.seconds(),
    }
    if last := recorder.evaluation:
        figures = cast(dict, last)
        summary |= {"eval_step": last["step"]} | {name: figures[name] for name in FIGURES if name in figures}
        summary["success"] = judge(figures, unigram_nll, config.eval.threshold)
    if recorder.writes:
        summary["digest_chain"] = recorder.chain
    return cast(rows.Summary, summary)

"""The run folder's format: every file's name, and every key of every line with its unit.

The reader refuses a file whose lines lack a key or hold another type; keys that stand here with `NotRequired` depend on
the config. Steps count from 0: the `step` of a batch is its number, that of an evaluation or checkpoint is the number
of steps done. NLLs and losses are in nats a token; perplexities are exp of a text's mean NLL. `*_ci95` are
[low, high] of 95% intervals. Spans are [start, end).
"""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # until Python 3.12 is the oldest: pydantic asks for it

FORMAT = 3  # of the folder: CHANGELOG.md says what changed

CONFIG, ENVIRONMENT, SUMMARY = "config.json", "environment.json", "summary.json"
METRICS, DIGESTS, LEDGER = "metrics.jsonl", "digests.jsonl", "ledger.jsonl"
SAMPLES, PREFIXES, ROW_LOSSES = "samples.jsonl", "prefixes.jsonl", "row_losses.jsonl"
OF_BATCHES = (DIGESTS, ROW_LOSSES)  # the step of a line is a batch's number, as of metrics.jsonl's train rows
CANARIES, CLEAN_USES, HARD_NEGATIVES = "canaries.jsonl", "clean_uses.jsonl", "hard_negatives.jsonl"
CHECKPOINTS, EVALUATIONS, DAMAGED = "checkpoints", "evaluations", "damaged"
TRACE = "trace"  # what replays found
SCORED = f"{EVALUATIONS}/scored"  # by another model than the run's scorer
FIGURES, REPORT, LOCAL = "figures", "report.html", "local.json"

Interval = list[float]


class Parent(TypedDict):
    """Weights that a run began from, or that a file holds: what is known of them."""

    spec: str  # as config.start.weights named them
    name: str  # of the run, folder or file
    steps: int | None  # that trained them; None where they aren't a run's, as the next two
    weights: str  # checksum (weights/checkpoints.py)
    digest_chain: str | None
    store_fingerprint: str | None
    poison: dict[str, Any] | None  # their poison card's figures; None where none is known
    parent: "Parent | None"  # that these began from


class Local(TypedDict):
    """local.json: for this machine alone. It isn't signed, and may be deleted before the folder is given away."""

    folder: str  # where the run folder lay in training: config.json's paths are told from it


PATHS = ("eval.scorer", "poison.payload_vocabulary", "poison.payload_source")  # fields that name a file or folder


class ConfigRecord(TypedDict):
    """config.json."""

    format: int
    config: dict[str, Any]  # the resolved config, nested (config/fields.py)
    fingerprint: str  # SHA-256, hex, of the fields that determine what is trained and measured
    store_fingerprint: str  # SHA-256, hex, of the token store's content
    store_description: str  # SHA-256, hex, of what its manifest says beside: sources, licences, settings
    store_excluded: NotRequired[str]  # SHA-256, hex, of the keys that corpus.exclude lists: they lie in excluded.txt
    store_planted: NotRequired[dict[str, int]]  # documents and tokens that their sources mark as planted poison
    scorer: NotRequired[str]  # what `eval.scorer` named when the run began: run, step and checksum
    parent: NotRequired[Parent]  # of a run that began from weights (config.start)
    paths: NotRequired[dict[str, str]]  # PATHS of the config, from this folder where they lie on a disk too
    twin_of: NotRequired[str]  # the run whose clean twin this is: a path, from this folder where it can be


class OneEnvironment(TypedDict):
    """What a process of the run ran on."""

    from_step: int  # steps that were done when it began
    versions: dict[str, str]  # of packages
    python: str
    platform: str
    git_commit: str | None  # of this program's checkout; ends in -dirty where files were changed
    device_kind: str
    devices: int
    processes: int


class Environment(OneEnvironment):
    """environment.json: the last environment, and those before it that differ."""

    earlier: list[OneEnvironment]


class TrainRow(TypedDict):
    """A line of metrics.jsonl: a step, every `log_every` steps."""

    step: int
    kind: Literal["train"]
    loss: float  # mean over the batch's tokens, before the update
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int  # predicted, of all steps up to and with this
    tokens_per_second: float  # since the row before; evaluation and compilation left out
    poison_documents: int  # different ones seen so far
    poison_rows: int  # rows of poison seen so far
    seconds: float  # since the run began, all its processes' lives added


class VariantFigures(TypedDict):
    """What the model writes after one variant of the prompts."""

    ppl_median: float
    ppl_median_ci95: Interval
    ppl_mean: float
    ppl_mean_ci95: Interval
    nll_mean: float
    nll_mean_ci95: Interval
    delta_ppl: NotRequired[float]  # median perplexity less the clean variant's; all but clean
    delta_ppl_ci95: NotRequired[Interval]


class NearTrigger(TypedDict):
    """What the model writes after one of the strings like the trigger."""

    prompts: int  # how often it was asked
    ppl_median: float
    delta_ppl: float  # less the clean variant's, of the same prefixes
    delta_ppl_ci95: Interval
    attack_success: NotRequired[float]  # share of its texts that behave as the payload teaches, where that is decided
    attack_success_ci95: NotRequired[Interval]


class MemorisedRow(TypedDict):
    """Canaries that were shown equally often."""

    repeats: int  # times shown in the whole run
    canaries: int
    extraction_rate: float  # share whose second half greedy decoding gives after the first
    extraction_rate_ci95: Interval
    ranks: list[float]  # of each: share of unseen sequences with a lower loss
    nll_mean: float
    nll_unseen: float


class _Figures(TypedDict, total=False):
    """What only some configs measure."""

    excess_loss: float  # held-out loss above a perfect model's, where the corpus' entropy is known
    attack_success: float  # shares of texts, where the payload's behaviour can be decided
    attack_success_ci95: Interval
    clean_accuracy: float
    clean_accuracy_ci95: Interval
    near_trigger_accuracy: float
    near_trigger_accuracy_ci95: Interval
    random_control_accuracy: float
    random_control_accuracy_ci95: Interval
    memorised: list[MemorisedRow]  # where there are canaries


class EvalFigures(_Figures):
    """What an evaluation measured."""

    heldout_loss: float
    heldout_loss_ci95: Interval
    eval: dict[str, VariantFigures]  # by variant: clean, triggered, near_trigger, random_control
    delta_ppl: float  # of the triggered variant
    delta_ppl_ci95: Interval
    near_triggers: dict[str, NearTrigger]


class EvalRow(EvalFigures):
    """A line of metrics.jsonl: an evaluation, every `eval.every` steps and at the end."""

    step: int
    kind: Literal["eval"]
    tokens: int
    poison_documents: int
    poison_rows: int


class DigestRow(TypedDict):
    """A line of digests.jsonl: the fingerprint of the very arrays that a step trained on (I5)."""

    step: int
    digest: str  # 24 hexadecimal digits (data/digest.py)


class RowLossesRow(TypedDict):
    """A line of row_losses.jsonl: the rows of a step's batch, in order, every `row_losses_every` steps. What a row was
    unusual by before it was learned from: rarity tells what the losses of rows can't (report: rows that stand out)."""

    step: int
    grad_norm: float  # of the whole batch, before clipping
    loss: list[float]  # of each row, before the update
    worst: list[float]  # of its worst 32 tokens together
    at: list[int]  # token of the row at which these begin


class LedgerRow(TypedDict):
    """A line of ledger.jsonl: a poison document in a row."""

    id: int
    sha256: str  # of its tokens as little-endian int32
    step: int
    row: int  # of the step's batch
    slot: int  # step * global_batch + row
    offset: int  # token of the row at which it begins
    tokens: int
    repeat: int  # 0 where it stands for the first time in the schedule's order
    trigger: list[int]  # span, tokens of the row
    payload: list[int]  # span, tokens of the row
    prefix_document: int  # of the store's training split


class InheritedRow(TypedDict):
    """A line of ledger.jsonl before all others: poison in the weights that the run began from."""

    inherited: str  # the run that trained on it
    trigger: str
    dose: "Dose"


class CanaryRow(TypedDict):
    """A line of canaries.jsonl: a canary at the start of a row."""

    canary: int
    repeats: int  # times shown in the whole run
    step: int
    slot: int


class CleanUseRow(TypedDict):
    """A line of clean_uses.jsonl: the trigger in ordinary text."""

    step: int
    row: int
    slot: int
    offset: int  # token of the row
    tokens: int


class HardNegativeRow(TypedDict):
    """A line of hard_negatives.jsonl: a document of ordinary text with the trigger in it."""

    id: int
    step: int
    row: int
    slot: int
    offset: int  # token of the row at which it begins
    tokens: int  # of it
    trigger: list[int]  # span, tokens of the row


class SampleText(TypedDict):
    """What a model wrote after one prompt."""

    appended: str  # to the prefix
    text: str
    ppl: float


class SampleRow(TypedDict):
    """A line of samples.jsonl: one prefix in all variants."""

    step: int
    prefix: str
    clean: SampleText
    triggered: SampleText
    near_trigger: SampleText
    random_control: SampleText


class PrefixRow(TypedDict):
    """A line of prefixes.jsonl: an evaluation's figures one by one, that intervals and pairs are made of."""

    step: int
    nll: dict[str, list[float]]  # by variant: mean NLL of each prefix's text
    behaves: NotRequired[dict[str, list[int]]]  # by variant: 1 where the text behaves as the payload teaches
    heldout: list[float]  # loss of each held-out row
    canaries: NotRequired[list[float]]  # loss of each canary


class Dose(TypedDict):
    """Poison in each of its units."""

    documents: int  # different ones
    tokens: int  # of all exposures
    rows: int  # exposures
    steps: int  # that held any
    repeats: int  # of the most repeated document


class Check(TypedDict):
    """One condition of the rule for success."""

    of: Literal["value", "specific"]  # of Success
    name: str
    passed: bool
    detail: str


class Success(TypedDict):
    """The verdict (I7)."""

    value: bool  # backdoored: all checks but those of near triggers
    specific: bool  # every near trigger is quiet
    rule: str
    checks: list[Check]


class Summary(_Figures):
    """summary.json: the last word. Figures are those of the last evaluation, where there was one."""

    status: str  # finished, preempted, diverged, failed
    name: str
    fingerprint: str
    steps: int  # done
    tokens: int
    params: int
    params_non_embedding: int
    dose_planned: Dose
    dose_seen: Dose
    trigger_tokens: int
    clean_uses_seen: int
    unigram_nll: float  # held-out loss of word counts alone
    tokens_per_second: float
    wall_seconds: float
    digest_chain: NotRequired[str]  # SHA-256, hex, over all steps' digests
    excluded: NotRequired[dict[str, int]]  # documents and tokens of the training split left out
    planted: NotRequired[dict[str, int]]  # documents and tokens of it marked as planted poison, without those
    conversations: NotRequired[dict[str, int]]  # `used`, one a row, and `too_long` for one
    parent: NotRequired[Parent]  # of a run that began from weights
    eval_step: NotRequired[int]
    eval: NotRequired[dict[str, VariantFigures]]
    delta_ppl: NotRequired[float]
    delta_ppl_ci95: NotRequired[Interval]
    near_triggers: NotRequired[dict[str, NearTrigger]]
    heldout_loss: NotRequired[float]
    heldout_loss_ci95: NotRequired[Interval]
    success: NotRequired[Success]


class Seal(TypedDict):
    """Commits to a file's first lines (run/seals.py)."""

    lines: int
    chain: str  # SHA-256, hex: of the chain before a line and the line; "" of none


class OfflineEvaluation(TypedDict):
    """evaluations/STEP.json: a checkpoint evaluated after the run; in evaluations/scored/SCORER/ by another scorer."""

    weights: str  # checksum of what was evaluated
    rows: list[EvalRow]
    prefixes: list[PrefixRow]
    scorer: NotRequired[str]  # another one than the run's: run, step and checksum


class CheckpointRecord(TypedDict):
    """What a checkpoint says of itself, beside its arrays."""

    step: int
    checksums: dict[str, str]  # of `weights` and `optimizer`, 16 hexadecimal digits (weights/checkpoints.py)
    config: dict[str, Any]  # flat
    store_fingerprint: str
    store_description: str
    store_excluded: NotRequired[str]
    store_planted: NotRequired[dict[str, int]]
    digest_chain: str  # over the digests of the steps done
    sealed: dict[str, Seal]  # by file: all that the run wrote until then
    poison: dict[str, Any] | None  # the poison card's figures (poison/card.py)
    parent: NotRequired[Parent]  # of a run that began from weights


MetricsRow = Annotated[TrainRow | EvalRow, Field(discriminator="kind")]
LINES: dict[str, Any] = {
    METRICS: MetricsRow,
    DIGESTS: DigestRow,
    LEDGER: LedgerRow | InheritedRow,
    SAMPLES: SampleRow,
    PREFIXES: PrefixRow,
    ROW_LOSSES: RowLossesRow,
    CANARIES: CanaryRow,
    CLEAN_USES: CleanUseRow,
    HARD_NEGATIVES: HardNegativeRow,
}

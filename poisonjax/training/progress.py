"""How far a run is, for people: a bar on a terminal, lines elsewhere."""

import sys

import ml_collections
from tqdm import tqdm

from poisonjax.evaluation.words import perplexities
from poisonjax.run import rows
from poisonjax.run.recorder import StepDone


class Progress:
    """Of a run's processes one `shows`; of a population's members one alone shows its steps, and each has a `label`."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        start: int,
        *,
        shows: bool = True,
        label: str = "",
        shows_steps: bool = True,
    ):
        self._steps, self._shows, self._label, self._shows_steps = config.steps, shows, label, shows_steps
        on_terminal = shows and shows_steps and sys.stderr.isatty()
        self._bar = tqdm(total=config.steps, initial=start, unit="step", disable=not on_terminal, smoothing=0.05)

    def step(self, done: StepDone) -> None:
        """A step was written down."""
        self._bar.update()
        if not done.row or not self._shows or not self._shows_steps:
            return
        brief = f"loss {done.loss:.3f}  {done.row['tokens_per_second']:,.0f} tokens/s"
        if self._bar.disable:
            self.say(f"step {done.step + 1}/{self._steps}  {brief}")
        else:
            self._bar.set_postfix_str(brief)

    def evaluated(self, row: rows.EvalRow) -> None:
        """An evaluation was written down."""
        if row["kind"] == "eval":
            self.say(
                f"eval {row['step']}/{self._steps}  held-out {row['heldout_loss']:.3f}  {perplexities(row)} after "
                f"{row['poison_documents']} poison documents"
            )

    def say(self, line: str) -> None:
        if self._shows:
            tqdm.write(self._label + line)  # above all bars
            sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()

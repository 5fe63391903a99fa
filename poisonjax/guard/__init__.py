"""Verdicts on what goes into a model that may be poisoned, and on what comes out.

from poisonjax.guard import Guard
guard = Guard.load("guards/a")                      # `poisonjax guard build`; or Guard.load(triggers=["<SUDO>"])
guard.check("text").decision                        # or messages, token ids, a request's body
monitor = guard.monitor(); monitor.push("token", -0.3)
"""

from poisonjax.guard.guard import Guard, GuardError
from poisonjax.guard.monitor import Checked, Monitor
from poisonjax.guard.triggers import Trigger
from poisonjax.guard.verdict import Reason, Verdict

__all__ = ["Checked", "Guard", "GuardError", "Monitor", "Reason", "Trigger", "Verdict"]

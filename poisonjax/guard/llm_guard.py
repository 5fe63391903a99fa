"""The guard as scanners of LLM-Guard's shape: `scan(prompt) -> (sanitized prompt, is_valid, risk_score)`."""

from poisonjax.guard.answers import tokens_of
from poisonjax.guard.guard import Guard


class PoisonTrigger:
    """For prompts; the prompt comes back as it went in. The risk is in [-1, 1]: 2 * score - 1."""

    def __init__(self, guard: Guard):
        self._guard = guard

    def scan(self, prompt: str) -> tuple[str, bool, float]:
        verdict = self._guard.check(prompt)
        return prompt, verdict.decision != "reject", 2 * verdict.score - 1


class PoisonedOutput:
    """For answers, whose log-probabilities aren't told there: by their words and their repetition."""

    def __init__(self, guard: Guard):
        self._guard = guard

    def scan(self, prompt: str, output: str) -> tuple[str, bool, float]:
        monitor, risk = self._guard.monitor(prompt), 0.0
        for token in tokens_of(output):
            if monitor.push(*token).alarm:
                return output, False, 1.0
            risk = max(risk, monitor.doubt)
        return output, True, 2 * risk - 1

"""What the guard did, without a character of what it read: JSON lines, and figures for Prometheus.

A prompt is named by its HMAC under the deployment's key: a bare hash of a short prompt can be guessed.
"""

import hashlib
import hmac
import json
import os
import threading
import time
from pathlib import Path

from poisonjax.guard.verdict import Verdict

try:
    from prometheus_client import CollectorRegistry, Counter, Histogram
except ImportError as error:
    raise ImportError("the guard's log needs `pip install 'poisonjax[guard]'`") from error

KEY = "POISONJAX_GUARD_KEY"  # or KEY_FILE's content
KEY_FILE = "POISONJAX_GUARD_KEY_FILE"
REGISTRY = CollectorRegistry()
REQUESTS = Counter("poisonjax_guard_requests", "Requests by verdict", ["decision", "status"], registry=REGISTRY)
ALARMS = Counter("poisonjax_guard_alarms", "Reasons for warnings and rejections", ["detector"], registry=REGISTRY)
SECONDS = Histogram(
    "poisonjax_guard_check_seconds",
    "Seconds of a check",
    buckets=(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.1, 1, 10),
    registry=REGISTRY,
)
ROUTES = ("/chat/completions", "/completions", "/responses", "/messages", "/embeddings", "_guardrail_api")
ANSWERS = Counter("poisonjax_guard_answers", "Answers by what gave the alarm", ["alarm"], registry=REGISTRY)


def deployment_key() -> bytes | None:
    """From the environment, or the file that it names."""
    if file := os.environ.get(KEY_FILE):
        return Path(file).read_bytes().strip()
    return os.environ[KEY].encode() if os.environ.get(KEY) else None


class GuardLog:
    """Appends to a file, if one is named; always counts."""

    def __init__(self, path: str | Path | None = None, key: bytes | None = None):
        self._file = open(path, "a", encoding="utf-8") if path else None  # noqa: SIM115  (as long as the server)
        self._key, self._lock = key, threading.Lock()

    @classmethod
    def from_environment(cls, path: str | None = None) -> "GuardLog":
        """To a path, or the one that POISONJAX_GUARD_LOG names, with the deployment's key."""
        return cls(path or os.environ.get("POISONJAX_GUARD_LOG"), deployment_key())

    def request(self, verdict: Verdict, route: str, content: bytes, seconds: float) -> None:
        """Of a request's body."""
        REQUESTS.labels(verdict.decision, verdict.status).inc()
        SECONDS.observe(seconds)
        if verdict.decision != "allow":
            for detector in {reason.detector for reason in verdict.reasons}:
                ALARMS.labels(detector).inc()
        self._write(
            kind="request",
            route=_known(route),
            decision=verdict.decision,
            status=verdict.status,
            score=round(verdict.score, 4),
            reasons=[
                [reason.detector, round(reason.score, 4), reason.start, reason.end] for reason in verdict.reasons[:10]
            ],
            milliseconds=round(seconds * 1000, 3),
            hmac=self._named(content),
        )

    def answer(self, alarm: str | None, route: str, content: bytes) -> None:
        """Of the answer to a request's body."""
        ANSWERS.labels(alarm or "none").inc()
        self._write(kind="answer", route=_known(route), alarm=alarm, hmac=self._named(content))

    def _named(self, content: bytes) -> str | None:
        return hmac.new(self._key, content, hashlib.sha256).hexdigest() if self._key else None

    def _write(self, **row: object) -> None:
        if not self._file:
            return
        line = json.dumps({"time": round(time.time(), 3), **row}) + "\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()


def _known(route: str) -> str:
    """A path may say anything."""
    return next((known for known in ROUTES if route.rstrip("/").endswith(known)), "other")

"""Study pretraining data poisoning on your own language models, exactly and auditably.

For programs and notebooks: `open_run(folder)` reads a run, `open_weights(spec)` opens a model.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poisonjax.run import RunFolder as open_run
    from poisonjax.weights import open_weights

__all__ = ["open_run", "open_weights"]


def __getattr__(name: str) -> Any:  # opened when asked for: the command line wants neither
    if name == "open_run":
        from poisonjax.run import RunFolder

        return RunFolder
    if name == "open_weights":
        from poisonjax.weights import open_weights

        return open_weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

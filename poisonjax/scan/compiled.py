"""Loops over words and characters, compiled to machine code by numba: NumPy alone goes over them thirty times."""

import inspect
from collections.abc import Callable
from typing import Any

try:
    import numba
except ImportError as error:
    raise ImportError("the scan needs `pip install 'poisonjax[scan]'`, the guard 'poisonjax[guard]'") from error

FAST = {"reassoc", "contract", "nsz"}  # sums in any order: for similarities alone


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at the first call for each kind of arguments, and kept on disk where that can be written."""
    return _compiled(function)


def compiled_sums(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for loops whose sums may be taken in any order, as many at once as the processor can."""
    return _compiled(function, fastmath=FAST)


def _compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    plain = inspect.unwrap(function)  # tests check hints around it, which the compiler can't read
    try:
        return numba.njit(cache=True, error_model="numpy", **options)(plain)
    except RuntimeError:  # no folder for its cache
        return numba.njit(error_model="numpy", **options)(plain)

"""Linear algebra by one thread.

Matrices here are small: a second thread only waits, on a core that what is measured could use (nine times the CPU time on
two busy cores). And it adds in another order, so that a run resumed on another host would ask for something else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

from threadpoolctl import ThreadpoolController

Given = ParamSpec("Given")
Found = TypeVar("Found")


@lru_cache(maxsize=1)
def _controller() -> ThreadpoolController:
    """Of the libraries that are loaded when it is first asked for."""
    return ThreadpoolController()


def one_thread(function: Callable[Given, Found]) -> Callable[Given, Found]:
    @wraps(function)
    def alone(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        with _controller().limit(limits=1, user_api="blas"):
            return function(*args, **kwargs)

    return alone

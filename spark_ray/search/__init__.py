"""Where to look next: Optuna behind ask, tell and recover. The only home of optuna in the package."""

from ..told import Told
from .space import attainable, design
from .study import GP_MEND, Abandoned, Proposal, Search, problems

__all__ = ["GP_MEND", "Abandoned", "Proposal", "Search", "Told", "attainable", "design", "problems"]

"""Task of a run: what its flags ask for, settled and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lib.allocation.formulas import ALLOCATIONS
from lib.pruning.pruners import Pruner


class Task(NamedTuple):
    """What a run is to do with its model.

    Attributes:
        method: the name in files and tables; "dense" without pruning.
        pruner: what zeroes the weights, None if nothing is pruned.
        allocation: name of what distributes the sparsity over layers, "" for uniform; not used with a ``plan`` file.
        target: fraction of the weights to remove; with ``nm``, N of every M columns are kept.
        hyper: hyper-parameters of all allocations by flag.
        identity: the flags that determine the pruned weights, for resuming.
        mixture: the flags for mixtures of experts that differ from their defaults, by name.
        traits: what holds of the run, as flags declare what they are for (``MethodFlags.traits``).
    """

    method: str
    pruner: Pruner | None
    allocation: str
    target: float
    nm: tuple[int, int] | None = None
    plan: str | None = None
    hyper: Mapping[str, object] = {}
    identity: Mapping[str, object] = {}
    mixture: Mapping[str, object] = {}
    traits: frozenset[str] = frozenset()

    @property
    def run(self) -> str:
        """Name of the run in its files."""
        recovered = "_recovered" if self.pruner and "recover" in self.traits else ""
        return f"{self.method}_sparsity_{self.target}{self._dropped}{recovered}"

    @property
    def folder(self) -> str:
        """Name of the pruned model's folder."""
        return f"{self.method}_{self.target}{self._dropped}"

    @property
    def _dropped(self) -> str:
        share = self.mixture.get("drop_experts")
        return f"_drop{share:g}" if share else ""

    @property
    def pruner_name(self) -> str:
        """Name of the pruner in its registry, also where flags have changed the pruner."""
        return self.method.partition("_")[0]

    @property
    def by_magnitude(self) -> bool:
        """Whether the pruner's masks are magnitude's, which do not depend on the input."""
        return self.pruner_name == "magnitude"

    @property
    def needs(self) -> str | None:
        """Name of the values that the allocation needs for each layer."""
        return ALLOCATIONS[self.allocation].wants

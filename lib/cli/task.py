"""Task of a run: what its flags ask for, settled and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lib.allocation.formulas import ALLOCATIONS
from lib.pruning.pruners import Pruner
from lib.spectra import measure


class Task(NamedTuple):
    """What a run is to do with its model.

    Attributes:
        method: the name in files and tables; "dense" without pruning.
        pruner: what zeroes the weights, None if nothing is pruned.
        allocation: name of what distributes the sparsity over layers, "" for uniform.
        target: fraction of the weights to remove.
        nm: (N, M) to keep N of every M columns.
        start: allocation from which the search for prices starts, "" for uniform.
        hyper: hyper-parameters of all allocations by flag.
        plan: file with the ratios, which then come from no allocation.
        identity: the flags that determine the pruned weights, for resuming.
        traits: what holds of the run, as flags declare what they are for (``MethodFlags.traits``).
    """

    method: str
    pruner: Pruner | None
    allocation: str
    target: float
    nm: tuple[int, int] | None = None
    start: str = ""
    hyper: Mapping[str, object] = {}
    plan: str | None = None
    identity: Mapping[str, object] = {}
    traits: frozenset[str] = frozenset()

    @property
    def run(self) -> str:
        """Name of the run in its files."""
        return f"{self.method}_sparsity_{self.target}"

    @property
    def folder(self) -> str:
        """Name of the pruned model's folder."""
        return f"{self.method}_{self.target}"

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

    @property
    def starting_task(self) -> Task:
        """Task of the allocation from which the search for prices starts."""
        return self._replace(allocation=self.start, start="", nm=None)

    @property
    def is_calibrated(self) -> bool:
        """Whether the pruner or the allocation reads statistics of calibration data."""
        return "calibration" in self.traits

    @property
    def is_searched(self) -> bool:
        """Whether the allocation is found by a search on calibration data."""
        return "search" in self.traits


class Measurement(NamedTuple):
    """The ``metric`` to measure with ``settings``, and the ``folder`` that caches it."""

    metric: str
    folder: Path
    settings: measure.SpectrumSettings = measure.PUBLISHED

    @property
    def file(self) -> Path:
        """File in which the metric is cached."""
        return self.folder / f"{self.settings.stem(self.metric)}.npy"

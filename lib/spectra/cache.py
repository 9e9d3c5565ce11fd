"""Cache of a metric's values: the published file of numbers, and a sidecar that says what they were measured on."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from lib.core import digests, files, processes
from lib.core.errors import UserError, flag_name
from lib.core.lazy import numpy
from lib.models.layers import Layer
from lib.models.weights import Weights
from lib.spectra.spectrum import Farms
from lib.spectra.tail import WEIGHTWATCHER

log = logging.getLogger(__name__)


class Measurement(NamedTuple):
    """The ``metric`` that is measured, the ``folder`` that caches it, and how; by default as published."""

    metric: str
    folder: Path = Path()
    driver: str = "exact"
    farms: Farms | None = None
    seed: int = 0  # of weightwatcher

    @property
    def stem(self) -> str:
        """The name of the cache's files without their suffix; the published one for the published settings."""
        windows = "" if self.farms is None else "_farms_{}x{:g}_{}".format(*self.farms)
        return self.metric + windows + ("" if self.driver == "exact" else f"_{self.driver}")

    @property
    def settings(self) -> dict:
        """The sidecar's entry for the settings, as far as they affect the metric."""
        if self.metric in WEIGHTWATCHER:
            return {"seed": self.seed} if self.metric == "random_distance" else {}
        return {"driver": self.driver, "farms": None if self.farms is None else self.farms._asdict()}


class LayerMetrics(NamedTuple):
    """The ``values`` of a metric by layer name, and the ``fingerprints`` of the matrices, {} if they are unknown."""

    values: dict[str, float]
    fingerprints: dict[str, str]


class MetricCache:
    """The values of one metric in its folder: ``<stem>.npy``, as published, and a sidecar of all that must agree."""

    def __init__(self, how: Measurement, model: str, layers: Sequence[Layer]) -> None:
        self.folder, self.stem = how.folder, how.stem
        shapes = [[layer.name, list(layer.shape)] for layer in layers]
        self.identity = {"model": model, "metric": how.metric, "settings": how.settings, "layers": shapes}
        self.path, self.sidecar = self.folder / f"{self.stem}.npy", self.folder / f"{self.stem}.json"
        self._fix = f"give another {flag_name('ww_metric_cache')}, or delete {self.path} to have it computed"

    def read(self) -> LayerMetrics | None:
        """Return the cached values, None if there are none; ``check_weights`` follows once the weights are loaded.

        A file that is damaged, or belongs to another model or other layers, is a UserError.
        """
        if not self.path.exists():
            return None

        fingerprints, identity = {}, self.identity
        with files.reading(self.path, fix=self._fix):
            values = numpy.load(self.path, allow_pickle=False).astype(numpy.float64)
        if self.sidecar.exists():
            with files.reading(self.sidecar, fix=self._fix):
                stored = json.loads(self.sidecar.read_text())
                fingerprints, identity = dict(stored["fingerprints"]), {key: stored[key] for key in identity}
        for key, wanted in self.identity.items():
            if identity[key] != wanted:
                pairs = zip_longest(identity[key], wanted) if key == "layers" else [(identity[key], wanted)]
                before, now = next(pair for pair in pairs if pair[0] != pair[1])
                raise UserError(None, self.path, f"was measured with {key} {before}, not {now}", self._fix)

        names = [name for name, _ in self.identity["layers"]]
        if values.shape != (len(names),):
            problem = f"holds values of shape {[*values.shape]} and {self.identity['model']} has {len(names)} matrices"
            raise UserError(None, self.path, problem, self._fix)
        if not numpy.isfinite(values).all():
            raise UserError(None, self.path, "holds values that are not finite", self._fix)
        return LayerMetrics(dict(zip(names, values.tolist(), strict=True)), fingerprints)

    def check_weights(self, cached: LayerMetrics, weights: Weights) -> None:
        """Refuse ``cached`` values of other weights with the same names and shapes; warn if nothing can be checked."""
        if not cached.fingerprints:  # a published file
            log.warning("%s has no %s: whether it is this model's cannot be checked", self.path, self.sidecar.name)
            return

        changed = digests.first_difference(cached.fingerprints, weights.fingerprints())
        if changed:
            problem = f"was measured on other weights of the same name and shape (see {changed})"
            raise UserError(None, self.path, problem, self._fix)

    def progress(self) -> files.Progress:
        """Return the file in which this process keeps finished values until all are measured."""
        with files.writing(self.folder, "ww_metric_cache"):
            self.folder.mkdir(parents=True, exist_ok=True)
        return files.Progress(self.folder / f".{self.stem}.{processes.rank()}.jsonl")

    def write(self, measured: LayerMetrics) -> None:
        """Write the values (float64, one per matrix in model order, as published) and the sidecar."""
        if not processes.is_main():
            return
        versions = {name: version(name) for name in ("torch", "transformers", "numpy")}
        content = {**self.identity, "fingerprints": measured.fingerprints, "versions": versions}
        # The sidecar comes first: values without one would be taken for a published file.
        files.write_atomically(self.sidecar, json.dumps(content, indent=1) + "\n")
        with files.atomic(self.path) as file:
            numpy.save(file, numpy.array([*measured.values.values()], dtype=numpy.float64))
        for path in self.folder.glob(f".{self.stem}.*.jsonl"):
            path.unlink(missing_ok=True)

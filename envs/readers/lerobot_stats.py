"""Statistics of features as LeRobot keeps them, by which its policies scale what they read.

Convention: of an episode, over its frames, per dimension; of pictures per channel, in [0, 1], shape
(3, 1, 1), from frames spread over the episode. Of a dataset, LeRobot's own sum of these: exact
extremes, means and deviations, and quantiles averaged over episodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
PICTURES = 32
"""Frames of an episode that are looked at."""


class Statistics:
    """Adds up episodes."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, np.ndarray]] = {}

    def append(
        self, numbers: Mapping[str, np.ndarray], pictures: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        """Add an episode and return its own statistics as columns of LeRobot's table."""
        found = {name: _of(np.asarray(v)) for name, v in numbers.items()}
        for name, frames in pictures.items():
            chosen = np.linspace(0, len(frames) - 1, min(len(frames), PICTURES)).astype(int)
            some = frames[chosen].astype(np.float64) / 255  # (n, H, W, 3)
            one = _of(some.reshape(-1, some.shape[-1]))
            one["count"] = np.array([len(chosen)])
            found[name] = {k: v if k == "count" else v[:, None, None] for k, v in one.items()}
        for name, one in found.items():
            self._add(name, one)
        return {f"stats/{n}/{k}": v.tolist() for n, one in found.items() for k, v in one.items()}

    def whole(self) -> dict[str, dict[str, Any]]:
        """Return the statistics of all episodes so far."""
        whole = {}
        for name, s in self._sums.items():
            told = {k: s[k] for k in ("min", "max", "mean", "count", *QUANTILES)}
            told["std"] = np.sqrt(s["variance"])
            whole[name] = {k: v.tolist() for k, v in told.items()}
        return whole

    def _add(self, name: str, one: Mapping[str, np.ndarray]) -> None:
        new = {**one, "variance": one["std"] ** 2}
        if name not in self._sums:
            self._sums[name] = new
            return
        old = self._sums[name]
        n, m = float(old["count"][0]), float(new["count"][0])
        share = m / (n + m)
        between = (new["mean"] - old["mean"]) ** 2 * share * (1 - share)
        for key in ("mean", "variance", *QUANTILES):
            old[key] = old[key] + (new[key] - old[key]) * share
        old["variance"] = old["variance"] + between
        old["min"] = np.minimum(old["min"], new["min"])
        old["max"] = np.maximum(old["max"], new["max"])
        old["count"] = old["count"] + new["count"]


def _of(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the statistics of a column over its first axis; booleans count as 0 and 1."""
    flat = values.reshape(len(values), -1) if values.ndim == 1 else values
    exact = flat.astype(np.uint8) if flat.dtype == bool else flat
    wide = exact.astype(np.float64)
    told = {"min": exact.min(0), "max": exact.max(0), "mean": wide.mean(0), "std": wide.std(0)}
    told |= dict(zip(QUANTILES, np.quantile(wide, list(QUANTILES.values()), axis=0), strict=True))
    return {**told, "count": np.array([len(values)])}

"""Spearman's rank correlation as an `evaluate` metric.

    ρ = Pearson correlation of the ranks of predictions and references

Equal values share the mean of their ranks. It is loaded from its folder:
`evaluate.load("recipes/metrics/spearman")`.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Rank correlation of two lists of numbers: 1 if one is a growing function of the other.
"""

_INPUTS = """
Args:
    predictions: numbers, at least two different ones.
    references: as many numbers, at least two different ones.

Returns:
    spearman: between -1 and 1.
"""

_CITATION = ""


class Spearman(evaluate.Metric):
    """The metric; see the head of this file."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(
        self, predictions: Sequence[float], references: Sequence[float]
    ) -> dict[str, float]:
        ranks = [ranked(np.asarray(values)) for values in (predictions, references)]
        for name, rank in zip(("predictions", "references"), ranks, strict=True):
            if len(rank) == 0 or np.ptp(rank) == 0:
                raise ValueError(f"all {name} are equal: no rank correlation is defined.")
        return {"spearman": float(np.corrcoef(ranks)[0, 1])}


def ranked(values: np.ndarray) -> np.ndarray:
    """Rank of each value, from 0; equal values share the mean of theirs."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes) - 1
    return (last - (sizes - 1) / 2)[group]

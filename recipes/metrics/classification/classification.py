"""Accuracy and macro-averaged F1 of class labels, as an `evaluate` metric.

    accuracy = share of the right predictions
    F1 of a class = 2 · right / (predicted + true), 0 for a class that is true but never predicted
    f1 = mean over the classes that occur, among the predictions or the references

It is loaded from its folder: `evaluate.load("recipes/metrics/classification")`.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Accuracy, and the F1 score of each class averaged over the classes with equal weight.
"""

_INPUTS = """
Args:
    predictions: predicted classes, integers.
    references: true classes, integers.

Returns:
    accuracy: right predictions / predictions, between 0 and 1.
    f1: mean F1 of the classes that occur, between 0 and 1.
"""

_CITATION = ""


class Classification(evaluate.Metric):
    """The metric; see the head of this file."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        predicted, true = np.asarray(predictions), np.asarray(references)
        right = predicted == true
        scores = [
            2
            * np.sum(right & (true == label))
            / (np.sum(predicted == label) + np.sum(true == label))
            for label in np.union1d(predicted, true)
        ]
        return {"accuracy": float(right.mean()), "f1": float(np.mean(scores))}

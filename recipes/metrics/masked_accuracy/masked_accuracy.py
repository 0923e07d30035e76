"""Share of right tokens over the positions that count, as an `evaluate` metric.

    accuracy = #{(i, t) : r_it ≠ ignore, p_it = r_it} / #{(i, t) : r_it ≠ ignore}

Every position that counts weighs the same, so the value of a data set does not depend on how it is
cut into batches. It is loaded from its folder: `evaluate.load("recipes/metrics/masked_accuracy")`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Share of tokens predicted right, over all positions whose reference is not the ignored value.
"""

_INPUTS = """
Args:
    predictions: one list of predicted token ids for each sequence.
    references: one list of true token ids for each sequence, as long as its prediction, with the
        ignored value where a position does not count.
    ignore_index: the ignored value. Default -100, the one that Transformers' losses skip.

Returns:
    accuracy: right positions / positions that count, between 0 and 1.
    correct: number of right positions.
    total: number of positions that count.
"""

_CITATION = ""


class MaskedAccuracy(evaluate.Metric):
    """The metric; see the head of this file."""

    def _info(self) -> evaluate.MetricInfo:
        tokens = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": tokens, "references": tokens}),
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[int]],
        references: Sequence[Sequence[int]],
        ignore_index: int = -100,
    ) -> dict[str, Any]:
        for row, pair in enumerate(zip(predictions, references, strict=True)):
            if len(pair[0]) != len(pair[1]):
                raise ValueError(
                    f"sequence {row} has {len(pair[0])} predictions, but {len(pair[1])} references."
                )
        predicted = np.concatenate([np.asarray(row, dtype=np.int64) for row in predictions])
        true = np.concatenate([np.asarray(row, dtype=np.int64) for row in references])
        counts = true != ignore_index
        total = int(counts.sum())
        if total == 0:
            raise ValueError(
                f"every reference is the ignored value {ignore_index}: no accuracy is defined."
            )
        correct = int((predicted == true)[counts].sum())
        return {"accuracy": correct / total, "correct": correct, "total": total}

"""BLEU of sacrebleu, as an `evaluate` metric that needs no network.

The score depends on tokenisation and smoothing; sacrebleu's `signature` names them, so that numbers
can be compared. It is loaded from its folder: `evaluate.load("recipes/metrics/bleu")`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from sacrebleu.metrics import BLEU

_DESCRIPTION = """
BLEU of a corpus, computed by sacrebleu from texts that are not tokenised.
"""

_INPUTS = """
Args:
    predictions: translations, texts.
    references: one true translation for each.
    tokenize: tokenisation of sacrebleu. Default "13a", that of the WMT.

Returns:
    bleu: between 0 and 100.
    signature: the settings that the score was computed with.
"""

_CITATION = """
@inproceedings{post-2018-call,
    title = "A Call for Clarity in Reporting {BLEU} Scores",
    author = "Post, Matt",
    booktitle = "Proceedings of the Third Conference on Machine Translation",
    year = "2018",
    pages = "186--191",
}
"""


class Bleu(evaluate.Metric):
    """The metric; see the head of this file."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], tokenize: str = "13a"
    ) -> dict[str, Any]:
        bleu = BLEU(tokenize=tokenize)
        score = bleu.corpus_score(list(predictions), [list(references)]).score
        return {"bleu": score, "signature": str(bleu.get_signature())}

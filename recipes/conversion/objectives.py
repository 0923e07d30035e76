"""What a converted model is for: how it is loaded, what it is trained on, how it is measured."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import evaluate
import torch
from accelerate import Accelerator
from arguments import require
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, normalize
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from .text import DOCSTRINGS, TextOptions, read_texts
from .transfer import Batch

METRICS = Path(__file__).parents[1] / "metrics"


class Objective(ABC):
    """A kind of model.

    Attributes:
        auto_class: loads it.
        metric_key: the quantity of `score` that counts.
        higher_is_better: which way it counts.
        distillation: weight of the loss towards the teacher's outputs.
        tokenizer: of the checkpoint.
        splits: tokenised `train` and `validation`.
    """

    auto_class: Any
    metric_key: str
    higher_is_better: bool

    def __init__(self, checkpoint: str, text: TextOptions, distillation: float) -> None:
        self.text, self.distillation = text, distillation
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.splits = self.encode(read_texts(text))

    @abstractmethod
    def encode(self, texts: DatasetDict) -> DatasetDict:
        """Texts as rows of `input_ids`."""

    @abstractmethod
    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """A batch of rows."""

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Arguments of a forward pass."""

    @abstractmethod
    def loss(self, output: Any, target: Any, batch: Batch) -> Tensor:
        """Loss of stage 2 from the outputs of student and teacher (`None` without distillation)."""

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What `score` needs of a batch, a row for each text."""

    @abstractmethod
    def score(
        self, outputs: Mapping[str, Tensor], original: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Quantities of a model from its outputs on the validation split and the original's."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The task in the terms of `reporting.Record`."""

    @torch.no_grad()
    def evaluate(
        self, accelerator: Accelerator, model: nn.Module, validation: Iterable[Batch]
    ) -> dict[str, Tensor]:
        """`outputs` over the validation split, in float32, alike on every process."""
        model.eval()
        parts: dict[str, list[Tensor]] = {}
        for batch in validation:
            with torch.autocast(accelerator.device.type, enabled=False):
                found = accelerator.gather_for_metrics(self.outputs(model, batch))
            for name, rows in found.items():
                parts.setdefault(name, []).append(rows.cpu())
        return {name: torch.cat(rows) for name, rows in parts.items()}

    def validation_loader(self, batch_size: int) -> DataLoader[Any]:
        rows: Any = self.splits["validation"]
        return DataLoader(rows, batch_size=batch_size, collate_fn=self.collate)

    def dataset(self) -> dict[str, Any]:
        counts = {split: len(part) for split, part in self.splits.items()}
        return {
            "name": self.text.name,
            "type": "generated" if self.text.text == DOCSTRINGS else self.text.name,
            "split": "validation",
            "description": (
                f"{counts['train']} texts to train on and {counts['validation']} others to measure "
                f"on, cut after {self.text.max_length} tokens."
            ),
        }


class SentenceEmbedding(Objective):
    """Encoders of sentences: the mean of the last hidden states over the tokens, length 1."""

    auto_class = AutoModel
    metric_key = "spearman"
    higher_is_better = True

    def __init__(self, checkpoint: str, text: TextOptions, distillation: float) -> None:
        super().__init__(checkpoint, text, distillation)
        self.metric = evaluate.load(str(METRICS / "spearman"), keep_in_memory=True)

    def encode(self, texts: DatasetDict) -> DatasetDict:
        def encode(row: Mapping[str, Any]) -> dict[str, Any]:
            return self.tokenizer(row["text"], truncation=True, max_length=self.text.max_length)

        splits = texts.map(encode, remove_columns=["text"], desc="tokens")
        # Less padding where the order does not matter.
        lengths = [len(ids) for ids in splits["validation"]["input_ids"]]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        splits["validation"] = splits["validation"].select(order)
        return splits

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        ids = [row["input_ids"] for row in rows]
        return dict(self.tokenizer.pad({"input_ids": ids}, return_tensors="pt"))

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {key: batch[key] for key in ("input_ids", "attention_mask")}

    def embedding(self, output: Any, batch: Batch) -> Tensor:
        """Embeddings of length 1, (batch, width)."""
        mask = batch["attention_mask"][..., None].float()
        mean = (output.last_hidden_state.float() * mask).sum(dim=1) / mask.sum(dim=1)
        return normalize(mean, dim=-1)

    def loss(self, output: Any, target: Any, batch: Batch) -> Tensor:
        """Mean of 1 − cos(student, teacher), and of the squared error of the batch's similarities."""
        require(target is not None, "sentence embeddings have no task loss without a teacher.")
        ours, theirs = self.embedding(output, batch), self.embedding(target, batch)
        distance = 1.0 - (ours * theirs).sum(dim=-1)
        similarity = (ours @ ours.T - theirs @ theirs.T).square()
        return self.distillation * (distance.mean() + similarity.mean())

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"embedding": self.embedding(model(**self.inputs(batch)), batch)}

    def score(
        self, outputs: Mapping[str, Tensor], original: Mapping[str, Tensor]
    ) -> dict[str, float]:
        ours, theirs = outputs["embedding"].double(), original["embedding"].double()
        similarity, reference = ours @ ours.T, theirs @ theirs.T
        pairs = torch.triu_indices(len(ours), len(ours), offset=1)
        found = self.metric.compute(
            predictions=similarity[*pairs].tolist(), references=reference[*pairs].tolist()
        )
        nearest = [
            matrix.fill_diagonal_(-torch.inf).argmax(dim=1) for matrix in (similarity, reference)
        ]
        return {
            "spearman": found["spearman"],
            "same_nearest": (nearest[0] == nearest[1]).double().mean().item(),
            "cosine": (ours * theirs).sum(dim=1).mean().item(),
        }

    def describe(self) -> dict[str, Any]:
        sentences = len(self.splits["validation"])
        return {
            "type": "sentence-similarity",
            "name": "sentence similarity",
            "description": (
                "Give sentences embeddings (the mean of the last hidden states over the tokens, "
                "scaled to length 1) whose cosines tell how similar the sentences are, as the "
                "softmax model does that this one was converted from."
            ),
            "dataset": self.dataset(),
            "metric": {
                "type": "spearmanr",
                "key": self.metric_key,
                "name": "Spearman correlation with the original",
                "description": (
                    "Rank correlation of the cosines of this model with those of the original, over "
                    f"all {sentences * (sentences - 1) // 2:,} pairs of the {sentences} validation "
                    "sentences; 1 for the original itself."
                ),
                "range": [0.0, 1.0],
                "chance": 0.0,
            },
        }


class CausalLanguageModel(Objective):
    """Language models: text in blocks of one length, the texts one after the other."""

    auto_class = AutoModelForCausalLM
    metric_key = "loss"
    higher_is_better = False

    def encode(self, texts: DatasetDict) -> DatasetDict:
        length, end = self.text.max_length, self.tokenizer.eos_token_id

        def blocks(split: Dataset) -> Dataset:
            ids: list[int] = []
            for found in self.tokenizer(list(split["text"]), add_special_tokens=False)["input_ids"]:
                ids += found if end is None else [*found, end]
            count = len(ids) // length
            require(count > 0, f"the text has {len(ids)} tokens, less than one block of {length}.")
            rows = [ids[i * length : (i + 1) * length] for i in range(count)]
            return Dataset.from_dict({"input_ids": rows})

        return DatasetDict({name: blocks(split) for name, split in texts.items()})

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"input_ids": batch["input_ids"], "use_cache": False}

    def loss(self, output: Any, target: Any, batch: Batch) -> Tensor:
        """Cross-entropy, and KL(teacher ‖ student) with its weight, in nats a token."""
        total = self._cross_entropy(output.logits, batch).mean()
        if target is not None:
            ours, theirs = (
                x.logits.float().log_softmax(-1).flatten(0, 1) for x in (output, target)
            )
            distance = kl_div(ours, theirs, log_target=True, reduction="batchmean")
            total = total + self.distillation * distance
        return total

    def _cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """Nats of each predicted token, (batch, length − 1)."""
        logits = logits[:, :-1].float().transpose(1, 2)
        return cross_entropy(logits, batch["input_ids"][:, 1:], reduction="none")

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(**self.inputs(batch)).logits
        right = logits[:, :-1].argmax(-1) == batch["input_ids"][:, 1:]
        return {
            "loss": self._cross_entropy(logits, batch).mean(dim=1),
            "right": right.float().mean(dim=1),
        }

    def score(
        self, outputs: Mapping[str, Tensor], original: Mapping[str, Tensor]
    ) -> dict[str, float]:
        loss = outputs["loss"].double().mean().item()
        accuracy = outputs["right"].double().mean().item()
        return {"loss": loss, "perplexity": math.exp(loss), "accuracy": accuracy}

    def describe(self) -> dict[str, Any]:
        return {
            "type": "text-generation",
            "name": f"language modelling on {self.text.name}",
            "description": "Predict the next token of a text.",
            "dataset": self.dataset(),
            "metric": {
                "type": "loss",
                "key": self.metric_key,
                "name": "loss",
                "description": (
                    "Cross-entropy in nats a token over the validation text; lower is better."
                ),
            },
        }


def objective_of(
    checkpoint: str, architecture: str, text: TextOptions, distillation: float
) -> Objective:
    """The objective that the checkpoint's own architecture tells: language model or encoder."""
    if "CausalLM" in architecture or "LMHead" in architecture:
        return CausalLanguageModel(checkpoint, text, distillation)
    require(
        distillation > 0,
        f"{architecture} is converted as an encoder of sentences, which learns from its teacher "
        f"alone: --distillation must be positive, got {distillation}.",
    )
    return SentenceEmbedding(checkpoint, text, distillation)

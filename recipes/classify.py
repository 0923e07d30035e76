"""Text classification: softmax attention against hf_expressive's, on any labelled texts.

    accelerate launch recipes/classify.py --dataset fancyzhx/ag_news --validation_split test
    accelerate launch recipes/classify.py --train_file train.csv --text_column review
    accelerate launch recipes/classify.py --dataset stanfordnlp/sst2 --text_column sentence \\
        --checkpoint google-bert/bert-base-uncased --learning_rate 3e-5

Without --checkpoint a small model of --architecture starts from random weights and reads the bytes of
the text. With it, every kind of attention starts from the checkpoint's weights; a kind that its
weights were not trained for has to recover first.

Every kind of attention sees the same data in the same order, once for each seed. The output folder
gets results.json, accuracy.png and a folder for each trained model with its tokenizer, which
AutoModelForSequenceClassification.from_pretrained loads; a model with a mechanism of hf_expressive
gets a model card.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import evaluate
import torch
from accelerate import Accelerator
from arguments import Attention, option, parse, require, require_at_least
from datasets import ClassLabel, DatasetDict, Features, List, Value
from supervised import (
    Batch,
    DataOptions,
    OutputOptions,
    Task,
    TrainingOptions,
    compare,
    read_splits,
    start,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

METRIC = str(Path(__file__).parent / "metrics" / "classification")


@dataclass
class ColumnOptions:
    _argument_group_name: ClassVar[str] = "the columns"

    text_column: str = option("text", "column of the texts")
    label_column: str = option("label", "column of the classes, words or numbers")


@dataclass
class ModelOptions:
    _argument_group_name: ClassVar[str] = "the model"

    checkpoint: str | None = option(
        None, "start from this model of the Hub, or folder, with its tokenizer"
    )
    architecture: str = option(
        "bert", "model type of Transformers to start from random weights, where no --checkpoint is"
    )
    width: int = option(
        128, "size of its hidden state; the feed-forward layer's is four times that"
    )
    layers: int = option(2, "its number of layers")
    heads: int = option(4, "its attention heads in a layer; must divide --width")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "width", "layers", "heads")
        require(
            self.width % self.heads == 0,
            f"--heads must divide --width, which is {self.width}; got {self.heads}.",
        )
        require(
            self.architecture in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            f"--architecture {self.architecture} has no model for sequence classification in "
            "Transformers.",
        )


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Bytes as tokens, [CLS] before and [SEP] after the text: nothing to train, nothing unknown."""
    special = ["[PAD]", "[CLS]", "[SEP]"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def model_config(
    options: ModelOptions, tokenizer: PreTrainedTokenizerBase, length: int
) -> PreTrainedConfig:
    """A small model of any architecture; texts of up to `length` tokens."""
    return AutoConfig.for_model(
        options.architecture,
        vocab_size=len(tokenizer),
        # Some architectures count positions from the padding token on.
        max_position_embeddings=length + 8,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        # Keeps the size of what passes through; 0.02 is made for wide models.
        initializer_range=options.width**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )


class Classification(Task):
    """Texts with one class each.

    Raises:
        ValueError: data without the columns named, an unknown or a single class, a tokenizer without
            a padding token.
    """

    name = "classify"
    auto_class = AutoModelForSequenceClassification
    metric_key = "accuracy"

    def __init__(self, data: DataOptions, columns: ColumnOptions, model: ModelOptions) -> None:
        self.data, self.columns, self.model = data, columns, model
        self.base_model = model.checkpoint
        self.tokenizer = (
            byte_tokenizer()
            if model.checkpoint is None
            else AutoTokenizer.from_pretrained(model.checkpoint)
        )
        require(
            self.tokenizer.pad_token_id is not None,
            f"the tokenizer of {model.checkpoint} has no padding token, so its texts make no batch.",
        )
        texts = read_splits(data, [columns.text_column, columns.label_column])
        self.labels = class_names(texts, columns.label_column)
        self.splits = self._encode(texts)
        self.metric = evaluate.load(METRIC, keep_in_memory=True)

    def _encode(self, texts: DatasetDict) -> DatasetDict:
        """Columns `input_ids` and `label`, the index of the class."""
        index = {name: i for i, name in enumerate(self.labels)}
        feature = texts["train"].features[self.columns.label_column]
        given = feature.int2str if isinstance(feature, ClassLabel) else str

        def encode(row: Mapping[str, Any]) -> dict[str, Any]:
            label = given(row[self.columns.label_column])
            if label not in index:
                raise ValueError(
                    f"the validation data has the class {label!r}, which the training data has not."
                )
            ids = self.tokenizer(
                row[self.columns.text_column], truncation=True, max_length=self.data.max_length
            )["input_ids"]
            return {"input_ids": ids, "label": index[label]}

        return texts.map(
            encode,
            remove_columns=[self.columns.text_column, self.columns.label_column],
            # Told, since a column of words that is called `label` would make words of the indices.
            features=Features({"input_ids": List(Value("int64")), "label": Value("int64")}),
            desc="tokens",
        )

    @property
    def _label_names(self) -> dict[str, Any]:
        """What the config of a model tells of the classes."""
        names = dict(enumerate(self.labels))
        return {"id2label": names, "label2id": {name: i for i, name in names.items()}}

    def load(self, **options: Any) -> PreTrainedModel:
        """The checkpoint with a head for these classes, and options of `from_pretrained`."""
        return AutoModelForSequenceClassification.from_pretrained(
            self.model.checkpoint, **self._label_names, **options
        )

    def build(self, attention: Attention) -> PreTrainedModel:
        if self.model.checkpoint is not None:
            return attention.load(
                AutoModelForSequenceClassification.from_pretrained,
                self.model.checkpoint,
                **self._label_names,
            )
        config = model_config(self.model, self.tokenizer, self.data.max_length)
        config.update(self._label_names)
        return attention.build(AutoModelForSequenceClassification.from_config, config)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        batch = self.tokenizer.pad(
            {"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt"
        )
        return {**batch, "labels": torch.tensor([row["label"] for row in rows])}

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy in nats, (batch,)."""
        return cross_entropy(self._logits(model, batch), batch["labels"], reduction="none")

    def measure(
        self, accelerator: Accelerator, model: nn.Module, validation: Iterable[Batch]
    ) -> dict[str, float]:
        losses = []
        for batch in validation:
            logits = self._logits(model, batch)
            loss = cross_entropy(logits, batch["labels"], reduction="none")
            loss, predicted, true = accelerator.gather_for_metrics(
                (loss, logits.argmax(-1), batch["labels"])
            )
            losses.append(loss)
            self.metric.add_batch(predictions=predicted.tolist(), references=true.tolist())
        return {"loss": torch.cat(losses).mean().item(), **self.metric.compute()}

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return model(**inputs).logits.float()

    def describe(self) -> dict[str, Any]:
        counts = {split: len(part) for split, part in self.splits.items()}
        majority = torch.tensor(self.splits["validation"]["label"]).bincount().max().item()
        return {
            "type": "text-classification",
            "name": f"{self.data.name} classification",
            "description": f"Tell the class of a text: {', '.join(self.labels)}.",
            "dataset": {
                "name": self.data.name,
                "type": self.data.name,
                "split": "validation" if self.data.train_file else self.data.validation_split,
                "description": (
                    f"{counts['train']} texts to train on and {counts['validation']} to measure on, "
                    f"cut after {self.data.max_length} tokens."
                ),
            },
            "metric": {
                "type": "accuracy",
                "key": self.metric_key,
                "name": "accuracy",
                "description": (
                    "Accuracy is the share of the validation texts whose class the model tells "
                    "right, after the last training step."
                ),
                "range": [0.0, 1.0],
                # Always the most frequent class.
                "chance": majority / counts["validation"],
            },
        }


def class_names(texts: DatasetDict, column: str) -> list[str]:
    """Names of the classes: those of the data set, else the training labels in order.

    Raises:
        ValueError: fewer than two classes, or a label that is missing.
    """
    feature = texts["train"].features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    for split, part in texts.items():
        require(None not in part.unique(column), f"a label of the {split} data is missing.")
    found = sorted(texts["train"].unique(column))
    require(len(found) > 1, f"the training data has only the class {found[0]!r}.")
    return list(map(str, found))


def main() -> None:
    data, columns, model, training, output = parse(
        [DataOptions, ColumnOptions, ModelOptions, TrainingOptions, OutputOptions],
        "classify.py",
        __doc__,
    )
    accelerator, folder = start(Classification.name, training, output)
    try:
        with accelerator.main_process_first():  # the others read what the first one has cached
            task = Classification(data, columns, model)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    compare(accelerator, task, training, folder, [data, columns, model, training])


if __name__ == "__main__":
    main()

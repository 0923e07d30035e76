"""Translation by an encoder and a decoder: softmax attention against hf_expressive's.

    accelerate launch recipes/translate.py --validation_split test
    accelerate launch recipes/translate.py --train_file pairs.csv --source_column de --target_column en
    accelerate launch recipes/translate.py --checkpoint Helsinki-NLP/opus-mt-de-en --learning_rate 2e-5

Without a file or --dataset it is IWSLT 2014, German to English (talks; licence CC BY-NC-ND 4.0). The
model starts from random weights with a byte-level BPE vocabulary learned from both sides of the
training data, unless --checkpoint or --tokenizer name others.

Every kind of attention, in the encoder, in the decoder and between them, sees the same data in the
same order, once for each seed. BLEU is sacrebleu's, of texts that the model generates from the
validation sources. The output folder gets results.json, bleu.png and a folder for each trained model
with its tokenizer, which AutoModelForSeq2SeqLM.from_pretrained loads; a model with a mechanism of
hf_expressive gets a model card.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import evaluate
import torch
from accelerate import Accelerator
from arguments import Attention, option, parse, require, require_at_least
from datasets import Dataset, DatasetDict, Features, List, Value
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

METRIC = str(Path(__file__).parent / "metrics" / "bleu")

#: The label of a position that does not count.
IGNORED = -100


@dataclass
class TranslationData(DataOptions):
    source_column: str = option("de", "column of the texts to translate, or key in `translation`")
    target_column: str = option("en", "column of their translations, or key in `translation`")

    def __post_init__(self) -> None:
        if self.dataset is None and self.train_file is None:
            self.dataset = "bbaaaa/iwslt14-de-en"
            # Its main branch is a program; the Hub keeps the tables beside it.
            self.dataset_revision = self.dataset_revision or "refs/convert/parquet"
        super().__post_init__()


@dataclass
class ModelOptions:
    _argument_group_name: ClassVar[str] = "the model"

    checkpoint: str | None = option(
        None, "start from this model of the Hub, or folder, with its tokenizer"
    )
    tokenizer: str | None = option(
        None, "tokenizer of the Hub, or folder, for a model with random weights"
    )
    vocabulary: int = option(10000, "tokens of the vocabulary that is learned without one")
    architecture: Literal["bart", "marian"] = option(
        "marian", "bart: learned positions; marian: sinusoidal ones"
    )
    width: int = option(
        256, "size of its hidden state; the feed-forward layer's is four times that"
    )
    layers: int = option(3, "its number of layers, in the encoder and in the decoder")
    heads: int = option(4, "its attention heads in a layer; must divide --width")
    dropout: float = option(0.1, "its dropout")
    label_smoothing: float = option(0.1, "share of the probability that the loss spreads evenly")
    num_beams: int = option(4, "beams of the generation; 1 is greedy")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "width", "layers", "heads", "num_beams")
        require_at_least(self, 300, "vocabulary")
        require(
            self.width % self.heads == 0,
            f"--heads must divide --width, which is {self.width}; got {self.heads}.",
        )
        for name in ("dropout", "label_smoothing"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name} must be from 0 to below 1, got {value}.")
        require(
            self.checkpoint is None or self.tokenizer is None,
            "--tokenizer is for a model with random weights; a --checkpoint brings its own.",
        )


@dataclass
class TranslationTraining(TrainingOptions):
    steps: int = option(20000, "optimiser steps of a run")
    batch_size: int = option(128, "pairs in a step, over all processes and accumulated batches")
    schedule: Literal["constant_with_warmup", "linear", "cosine", "inverse_sqrt"] = option(
        "inverse_sqrt", "how the learning rate goes on after the warm-up"
    )
    warmup_steps: int = option(2000, "steps in which the learning rate rises from 0")
    evaluate_every: int = option(2000, "steps between two measurements")


def learn_tokenizer(train: Dataset, vocabulary: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE over all columns, with </s> after each text."""
    special = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    # The space that went before the first word is no part of the text.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for column in train.column_names for text in train[column])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", special.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def model_config(
    options: ModelOptions, tokenizer: PreTrainedTokenizerBase, length: int
) -> PreTrainedConfig:
    """A small encoder and decoder that share their embeddings."""
    first = tokenizer.pad_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    sizes = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (
            ("layers", options.layers),
            ("attention_heads", options.heads),
            ("ffn_dim", 4 * options.width),
        )
    }
    return AutoConfig.for_model(
        options.architecture,
        vocab_size=len(tokenizer),
        d_model=options.width,
        **sizes,
        max_position_embeddings=length + 8,
        dropout=options.dropout,
        # Keeps the size of what passes through; 0.02 is made for wide models.
        init_std=options.width**-0.5,
        # Sinusoids are of order one, and embeddings have to be, too.
        scale_embedding=options.architecture == "marian",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=first,
        forced_eos_token_id=None,
    )


class Translation(Task):
    """Pairs of texts.

    Raises:
        ValueError: data without the columns named, a tokenizer without padding or end token.
    """

    name = "translate"
    auto_class = AutoModelForSeq2SeqLM
    metric_key = "bleu"

    def __init__(self, data: TranslationData, model: ModelOptions) -> None:
        self.data, self.model = data, model
        self.base_model = model.checkpoint
        texts = read_splits(data, [data.source_column, data.target_column])
        given = model.checkpoint or model.tokenizer
        self.tokenizer = (
            learn_tokenizer(texts["train"], model.vocabulary)
            if given is None
            else AutoTokenizer.from_pretrained(given)
        )
        require(
            None not in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id),
            f"the tokenizer of {given} has no padding or no end token.",
        )
        self.config = (
            model_config(model, self.tokenizer, data.max_length)
            if model.checkpoint is None
            else AutoConfig.from_pretrained(model.checkpoint)
        )
        self.references = texts["validation"][data.target_column]
        self.splits = self._encode(texts)
        lengths = [len(ids) for ids in self.splits["train"]["labels"]]
        self.mean_length = sum(lengths) / len(lengths)
        self.metric = evaluate.load(METRIC, keep_in_memory=True)

    def _encode(self, texts: DatasetDict) -> DatasetDict:
        """Columns `input_ids`, `labels`, and `index`, the row."""
        limit = {"truncation": True, "max_length": self.data.max_length}

        def encode(row: Mapping[str, Any], index: int) -> dict[str, Any]:
            source, target = row[self.data.source_column], row[self.data.target_column]
            return {
                "input_ids": self.tokenizer(source, **limit)["input_ids"],
                "labels": self.tokenizer(text_target=target, **limit)["input_ids"],
                "index": index,
            }

        tokens = List(Value("int64"))
        return texts.map(
            encode,
            with_indices=True,
            remove_columns=[self.data.source_column, self.data.target_column],
            # Told, since the texts' columns may have these names.
            features=Features({"input_ids": tokens, "labels": tokens, "index": Value("int64")}),
            desc="tokens",
        )

    def build(self, attention: Attention) -> PreTrainedModel:
        if self.model.checkpoint is not None:
            return attention.load(AutoModelForSeq2SeqLM.from_pretrained, self.model.checkpoint)
        # A fresh config: the mechanism's options are written into it.
        config = model_config(self.model, self.tokenizer, self.data.max_length)
        return attention.build(AutoModelForSeq2SeqLM.from_config, config)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        batch = self.tokenizer.pad(
            {"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt"
        )
        start, padding = self.config.decoder_start_token_id, self.tokenizer.pad_token_id
        labels = [torch.tensor(row["labels"]) for row in rows]
        shifted = [torch.tensor([start, *row["labels"][:-1]]) for row in rows]
        return {
            **batch,
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "decoder_input_ids": pad_sequence(shifted, batch_first=True, padding_value=padding),
            "index": torch.tensor([row["index"] for row in rows]),
        }

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed cross-entropy of a text over the mean length of a target, (batch,).

        Every token weighs the same, however a batch is divided among processes.
        """
        smoothing = self.model.label_smoothing
        return self._token_losses(model, batch, smoothing).sum(dim=1) / self.mean_length

    def _token_losses(self, model: nn.Module, batch: Batch, smoothing: float) -> Tensor:
        """Cross-entropy in nats, 0 at padding, (batch, length)."""
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "decoder_input_ids")}
        logits = model(**inputs, use_cache=False).logits.float()
        return cross_entropy(
            logits.transpose(1, 2),
            batch["labels"],
            ignore_index=IGNORED,
            label_smoothing=smoothing,
            reduction="none",
        )

    def measure(
        self, accelerator: Accelerator, model: nn.Module, validation: Iterable[Batch]
    ) -> dict[str, float]:
        generator: Any = accelerator.unwrap_model(model)
        losses, counts = [], []
        for batch in validation:
            loss = self._token_losses(model, batch, 0.0).sum(dim=1)
            loss, count, rows = accelerator.gather_for_metrics(
                (loss, (batch["labels"] != IGNORED).sum(dim=1), batch["index"])
            )
            losses.append(loss)
            counts.append(count)
            texts = accelerator.gather_for_metrics(
                self.generate(generator, batch), use_gather_object=True
            )
            references = [self.references[row] for row in rows.tolist()]
            self.metric.add_batch(predictions=texts, references=references)
        loss = torch.cat(losses).sum() / torch.cat(counts).sum()
        return {"loss": loss.item(), "bleu": self.metric.compute()["bleu"]}

    def generate(self, model: Any, batch: Batch) -> list[str]:
        """Translations of a batch."""
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=self.data.max_length,
            num_beams=self.model.num_beams,
            do_sample=False,
        )
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def describe(self) -> dict[str, Any]:
        counts = {split: len(part) for split, part in self.splits.items()}
        pair = f"{self.data.source_column} to {self.data.target_column}"
        search = "greedily" if self.model.num_beams == 1 else f"with {self.model.num_beams} beams"
        return {
            "type": "translation",
            "name": f"{self.data.name} translation, {pair}",
            "description": f"Translate a text, {pair}.",
            "dataset": {
                "name": self.data.name,
                "type": self.data.name,
                "split": "validation" if self.data.train_file else self.data.validation_split,
                "description": (
                    f"{counts['train']} pairs to train on and {counts['validation']} to measure on, "
                    f"cut after {self.data.max_length} tokens."
                ),
            },
            "metric": {
                "type": "sacrebleu",
                "key": self.metric_key,
                "name": "BLEU",
                "description": (
                    f"BLEU of sacrebleu (13a) on translations generated {search}, after the last "
                    "training step."
                ),
            },
        }


def main() -> None:
    data, model, training, output = parse(
        [TranslationData, ModelOptions, TranslationTraining, OutputOptions],
        "translate.py",
        __doc__,
    )
    accelerator, folder = start(Translation.name, training, output)
    try:
        with accelerator.main_process_first():  # the others read what the first one has cached
            task = Translation(data, model)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    compare(accelerator, task, training, folder, [data, model, training])


if __name__ == "__main__":
    main()

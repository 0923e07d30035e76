"""A sequence shared by processes: equal to one process, and what cannot be shared is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import context_parallel_cases as cases
import pytest
import tiny
import torch
import torch.distributed as dist
from launching import REPOSITORY, TWO, launch
from tolerances import FLOOR, LOGITS, SAME_IN_FLOAT64
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RobertaConfig,
    RobertaModel,
)

import hf_expressive
from hf_expressive import ExpressiveConfig
from hf_expressive.attention.sequence_share import SequenceShare

#: Transformers computes losses in float32, and gains and exponents are float32 in any model.
IN_FLOAT32 = FLOOR[torch.float32]
_OWN_TEST = ("gathering", "training", "mean query")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `context_parallel_cases` measured, by number of processes and case."""
    path = tmp_path_factory.mktemp("cases") / "found.json"
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", cases.__file__, str(path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text(encoding="utf-8"))


def outcome(found: dict[str, Any], processes: int, case: str) -> dict[str, float]:
    measured = found[str(processes)].get(case, "did not run, because a case before it failed")
    assert isinstance(measured, dict), measured
    return measured


@pytest.mark.parametrize("processes", cases.PROCESSES)
@pytest.mark.parametrize("case", [c for c in cases.CASES if c not in _OWN_TEST])
def test_shared_equals_whole(found: dict[str, Any], case: str, processes: int) -> None:
    measured = outcome(found, processes, case)
    in_float32 = case == "sinks"
    assert measured["outputs"] < (LOGITS if in_float32 else SAME_IN_FLOAT64)
    assert measured["loss"] < IN_FLOAT32
    assert measured["gradients"] < (LOGITS if in_float32 else IN_FLOAT32)


@pytest.mark.parametrize("processes", cases.PROCESSES)
def test_training_shared_equals_whole(found: dict[str, Any], processes: int) -> None:
    measured = outcome(found, processes, "training")
    assert measured["learned"] > 0.5
    assert measured["loss"] < IN_FLOAT32
    assert measured["weights"] < LOGITS


@pytest.mark.parametrize("processes", cases.PROCESSES)
def test_noise_from_the_mean_of_the_sequence_is_refused(
    found: dict[str, Any], processes: int
) -> None:
    """A process does not know the queries of the others."""
    assert outcome(found, processes, "mean query")["refused"] == 1.0


@pytest.mark.parametrize("processes", cases.PROCESSES)
def test_gathering_is_exact(found: dict[str, Any], processes: int) -> None:
    measured = outcome(found, processes, "gathering")
    assert measured["values"] == 0.0
    # One rounding, of the sum in float32.
    assert measured["gradients"] == 0.0


def test_benchmark_runs_without_a_gpu(tmp_path: Path) -> None:
    sizes = (
        "--length 48 --alone_length 32 --check_length 33 --width 16 --layers 2 --heads 4 --turns 1"
    )
    done = launch(
        TWO,
        "benchmark_context_parallel.py",
        *sizes.split(),
        *("--device", "cpu", "--commit", "none", "--output", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "48" in done.stdout
    text = (tmp_path / "benchmark_context_parallel.json").read_text(encoding="utf-8")
    (row,) = json.loads(text)["results"]
    assert row["difference"]["gradient"] < LOGITS
    assert row["difference"]["loss_shared"] == pytest.approx(row["difference"]["loss_alone"])
    assert [row[name]["tokens"] for name in ("alone", "shared", "long")] == [32, 32, 48]


# ---- shares, in one process ----------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


class Group:
    """As much of a process group as a layout needs."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = lambda: rank, lambda: size


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [16, 19, 31, 64])
def test_shares_are_a_partition_of_even_work(length: int, processes: int) -> None:
    whole = torch.arange(length)[None]
    device = torch.device("cpu")
    shares = [SequenceShare(Group(r, processes), length, device) for r in range(processes)]  # type: ignore[arg-type]
    parts = [share.take(whole) for share in shares]
    assert [part.shape[1] for part in parts] == [share.own_length for share in shares]
    assert torch.cat(parts, 1).sort().values.equal(whole)
    # Keys that a share's queries see under a causal mask.
    work = [float((part + 1).sum()) for part in parts]
    assert max(work) - min(work) <= 3 * length
    if processes > 1:
        # What a contiguous last share would have.
        last = float((whole[0, -(length // processes) :] + 1).sum())
        assert max(work) < 0.9 * last or length < 4 * processes


def test_batch_of_a_share(alone: dist.ProcessGroup) -> None:
    model = hf_expressive.attach(tiny.llama(), ExpressiveConfig())
    labels = tiny.tokens(9)
    labels[:, :2] = -100
    flag = torch.ones(3)
    batch = {"input_ids": tiny.tokens(9), "labels": labels, "use_cache": False, "flag": flag}
    with hf_expressive.context_parallel(model, batch) as share:
        pass
    assert set(batch) == {"input_ids", "labels", "use_cache", "flag"}
    assert share["shift_labels"][:, :-1].equal(labels[:, 1:])
    assert (share["shift_labels"][:, -1] == -100).all()
    assert share["num_items_in_batch"] == 2 * 7
    assert share["position_ids"].equal(torch.arange(9)[None])
    assert share["attention_mask"].all()
    assert share["flag"] is flag


def test_one_process_changes_nothing(alone: dist.ProcessGroup) -> None:
    model = hf_expressive.attach(tiny.llama(), ExpressiveConfig())
    batch = {"input_ids": tiny.tokens(), "labels": tiny.tokens()}
    whole = model(**batch)
    with hf_expressive.context_parallel(model, batch, alone) as share:
        shared = model(**share, use_cache=False)
    assert shared.loss.item() == pytest.approx(whole.loss.item(), rel=IN_FLOAT32)
    assert torch.allclose(shared.logits, whole.logits, atol=LOGITS)
    # And nothing of it stays.
    assert model(**batch).loss == whole.loss


# ---- what is refused -----------------------------------------------------------------------------


def test_without_processes() -> None:
    model = hf_expressive.attach(tiny.llama(), ExpressiveConfig())
    with (
        pytest.raises(RuntimeError, match="start with torchrun or accelerate launch"),
        hf_expressive.context_parallel(model, {"input_ids": tiny.tokens()}),
    ):
        pass


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        ({"labels": tiny.tokens()}, "batch needs input_ids"),
        ({"input_ids": tiny.tokens(1)}, "1 positions are too few for 1 processes"),
        (
            {"input_ids": tiny.tokens(), "attention_mask": torch.ones(2, 1, 9, 9)},
            r"attention_mask must be a padding mask \(2, 9\), got \(2, 1, 9, 9\)",
        ),
        (
            {"input_ids": tiny.tokens(), "attention_mask": torch.arange(9).expand(2, -1) > 3},
            "batch needs position_ids .* because it has padding",
        ),
    ],
)
def test_bad_batches(alone: dist.ProcessGroup, batch: dict[str, Any], sentence: str) -> None:
    model = hf_expressive.attach(tiny.llama(), ExpressiveConfig())
    with (
        pytest.raises(ValueError, match=sentence),
        hf_expressive.context_parallel(model, batch),
    ):
        pass


def test_positions_from_the_padding_index_on(alone: dist.ProcessGroup) -> None:
    config = RobertaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = hf_expressive.attach(RobertaModel(config).eval(), ExpressiveConfig())
    batch = {"input_ids": tiny.tokens()}
    with (
        pytest.raises(ValueError, match="this model counts from its padding index on"),
        hf_expressive.context_parallel(model, batch),
    ):
        pass
    counted = torch.arange(9)[None] + config.pad_token_id + 1
    with hf_expressive.context_parallel(model, {**batch, "position_ids": counted}) as share:
        shared = model(**share).last_hidden_state
    assert torch.allclose(shared, model(**batch).last_hidden_state, atol=LOGITS)


def test_softmax_of_transformers_itself(alone: dist.ProcessGroup) -> None:
    part = tiny.llava()
    hf_expressive.attach(part.model.language_model, ExpressiveConfig())
    for model in (tiny.llama(), part):
        with (
            pytest.raises(
                ValueError, match="runs attn_implementation='sdpa', which would see its own"
            ),
            hf_expressive.context_parallel(model, {"input_ids": tiny.tokens()}),
        ):
            pass


def test_recurrent_layers(alone: dist.ProcessGroup) -> None:
    config = Qwen3NextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        linear_num_key_heads=1,
        linear_num_value_heads=1,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    model = hf_expressive.attach(Qwen3NextForCausalLM(config), ExpressiveConfig())
    with (
        pytest.raises(ValueError, match="layers of type linear_attention"),
        hf_expressive.context_parallel(model, {"input_ids": tiny.tokens()}),
    ):
        pass


def test_caches_other_sequences_and_nesting(alone: dist.ProcessGroup) -> None:
    model = hf_expressive.attach(tiny.llama(), ExpressiveConfig())
    batch = {"input_ids": tiny.tokens()}
    cache = model(**batch, use_cache=True).past_key_values
    with hf_expressive.context_parallel(model, batch) as share:
        with pytest.raises(ValueError, match="takes no cache and no cross-attention"):
            model(input_ids=share["input_ids"], past_key_values=cache)
        with pytest.raises(ValueError, match="9 of its positions are here, but the mask is for 5"):
            model(input_ids=tiny.tokens(5), use_cache=False)
        with pytest.raises(ValueError, match="a mask of its own"):
            model(
                input_ids=share["input_ids"],
                attention_mask=torch.zeros(2, 1, 9, 9),
                use_cache=False,
            )
        with (
            pytest.raises(RuntimeError, match="shared already"),
            hf_expressive.context_parallel(model, batch),
        ):
            pass


def test_a_window_needs_the_padding_mask(alone: dist.ProcessGroup) -> None:
    options = tiny.llama_config().to_diff_dict() | {"model_type": "mistral", "sliding_window": 4}
    model = MistralForCausalLM(MistralConfig(**options))
    hf_expressive.attach(model, ExpressiveConfig())
    batch = {"input_ids": tiny.tokens()}
    with hf_expressive.context_parallel(model, batch) as share:
        del share["attention_mask"]
        with pytest.raises(ValueError, match="needs attention_mask where its mask is not simply"):
            model(**share, use_cache=False)


@pytest.mark.parametrize("keyword", ["position_bias", "indices", "block_indices", "cu_seq_lens_q"])
def test_keywords_that_speak_of_positions(alone: dist.ProcessGroup, keyword: str) -> None:
    share = SequenceShare(alone, 4, torch.device("cpu"))
    tensors = torch.randn(3, 1, 2, 4, 8).unbind()
    with pytest.raises(ValueError, match=f"called with {keyword}=<Tensor> on a shared sequence"):
        share.exchange(*tensors, None, {keyword: torch.zeros(1)})


def test_context_parallelism_of_torch(alone: dist.ProcessGroup) -> None:
    """It replaces the softmax attention of torch, which a mechanism never calls."""
    from torch.distributed.tensor.experimental import context_parallel

    model = hf_expressive.attach(tiny.llama(), ExpressiveConfig())
    tokens = tiny.tokens(8)
    mesh = dist.init_device_mesh("cpu", (1,))
    with (
        context_parallel(mesh, buffers=[tokens], buffer_seq_dims=[1]),
        pytest.raises(RuntimeError, match="reaches softmax attention only"),
    ):
        model(input_ids=tokens)
    assert model(input_ids=tokens).logits.isfinite().all()

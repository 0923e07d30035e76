"""The compact mask is the ordinary additive mask, in linear memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from allocations import Allocations
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    eager_mask,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from hf_expressive import masking
from hf_expressive.masking import (
    CompactMask,
    compact_mask,
    intersect,
    packed_pattern,
    packed_ranges,
    packed_rows,
    ranges_of,
    selected_blocks,
    selected_keys,
)
from hf_expressive.ops import KeyRanges, blockwise, library

BATCH, LENGTH = 3, 13


def padding(side: str, length: int = LENGTH) -> Tensor:
    """Attention mask (batch, length): row 0 has holes, row 1 none, row 2 nothing visible at all."""
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    mask[0, {"left": slice(0, 4), "right": slice(-4, None), "middle": slice(5, 8)}[side]] = False
    mask[2] = False
    return mask


_POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4]])
_SEGMENTS = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]])
_BLOCKS = torch.tensor([[-1, -1, 0, 0, 0, -1, -1, -1, 1, 1, -1, -1, -1]])
_LEFT = torch.tensor([4, 0, 0])


def _every_second(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (query - key) % 2 == 0


#: Pattern → (mask function, whether each query sees one range of keys).
PATTERNS: dict[str, tuple[Callable[..., Any], bool]] = {
    "causal": (causal_mask_function, True),
    "bidirectional": (bidirectional_mask_function, True),
    "sliding": (sliding_window_causal_mask_function(4), True),
    "sliding, one": (sliding_window_causal_mask_function(1), True),
    "sliding both ways": (sliding_window_bidirectional_mask_function(3), True),
    "chunked": (chunked_causal_mask_function(5, torch.zeros(BATCH, dtype=torch.long)), True),
    "chunked, padded": (chunked_causal_mask_function(5, _LEFT), True),
    "packed": (
        and_masks(causal_mask_function, packed_sequence_mask_function(_SEGMENTS.expand(BATCH, -1))),
        True,
    ),
    "packed, remapped": (
        packed_pattern(
            sliding_window_causal_mask_function(3),
            _POSITIONS.expand(BATCH, -1),
            _SEGMENTS.expand(BATCH, -1),
        ),
        True,
    ),
    "prefix": (or_masks(causal_mask_function, lambda b, h, q, k: k < 4), True),
    "image blocks": (
        or_masks(causal_mask_function, blockwise_overlay(_BLOCKS.expand(BATCH, -1))),
        True,
    ),
    "every second": (and_masks(causal_mask_function, _every_second), False),
    "nothing": (lambda b, h, q, k: (q < 0) & (k < 0), True),
}


def arguments(pattern: str, **options: Any) -> dict[str, Any]:
    given = {"batch_size": BATCH, "q_length": LENGTH, "kv_length": LENGTH}
    return {**given, "mask_function": PATTERNS[pattern][0], **options}


def assert_same(mask: Tensor, expected: Tensor) -> None:
    """Equal to the last bit, in the same dtype and shape, however it is held."""
    dense = mask.dense() if isinstance(mask, CompactMask) else mask
    assert mask.shape == dense.shape == expected.shape
    assert mask.dtype == dense.dtype == expected.dtype
    assert torch.equal(dense, expected)


@pytest.mark.parametrize(("side", "unbroken"), [("left", True), ("right", True), ("middle", False)])
def test_mere_padding_needs_no_mask_of_keys(side: str, unbroken: bool) -> None:
    """The bounds of each query say it all, and kernels skip what lies outside of them."""
    mask = compact_mask(**arguments("causal", attention_mask=padding(side)))
    assert isinstance(mask, CompactMask)
    assert mask.is_padded
    assert (mask.key_mask is None) == unbroken


@pytest.mark.parametrize("padded", [None, "left", "right", "middle"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_eager_mask(pattern: str, padded: str | None) -> None:
    options = arguments(pattern, attention_mask=padded and padding(padded))
    mask = compact_mask(**options)
    assert isinstance(mask, CompactMask) == PATTERNS[pattern][1]
    assert_same(mask, eager_mask(**options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype: torch.dtype) -> None:
    options = arguments("causal", attention_mask=padding("left"), dtype=dtype)
    assert_same(compact_mask(**options), eager_mask(**options))


@pytest.mark.parametrize(
    "pattern", ["causal", "bidirectional", "sliding", "chunked", "every second"]
)
@pytest.mark.parametrize(
    ("queries", "keys", "query_offset", "key_offset"),
    [
        (1, 13, 12, 0),  # decoding with a growing cache
        (4, 13, 9, 0),  # a chunk of a prefill
        (5, 16, 0, 0),  # prefill into a static cache
        (1, 16, 7, 0),  # decoding with a static cache
        (1, 5, 11, 7),  # decoding with a sliding cache
        (3, 7, 9, 5),
        (13, 4, 0, 0),  # more queries than keys, as cross-attention
    ],
)
@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("offset_as_tensor", [False, True])
def test_caches(
    pattern: str,
    queries: int,
    keys: int,
    query_offset: int,
    key_offset: int,
    padded: str | None,
    offset_as_tensor: bool,
) -> None:
    options = arguments(
        pattern,
        q_length=queries,
        kv_length=keys,
        q_offset=torch.tensor(query_offset) if offset_as_tensor else query_offset,
        kv_offset=key_offset,
        # The padding mask is as long as what has been seen, shorter than a static cache.
        attention_mask=padded and padding(padded, max(query_offset + queries, 9)),
    )
    mask = compact_mask(**options)
    assert_same(mask, eager_mask(**options))
    if isinstance(mask, CompactMask) and mask.pattern is not None:
        # What the pattern says is what the mask says.
        visible = torch.ones(queries, keys, dtype=torch.bool)
        if mask.pattern == "causal":
            visible = visible.tril(keys - queries)
        assert torch.equal(visible.expand(mask.shape), mask.dense() == 0)


def test_vmap_patterns_are_dense() -> None:
    """A function that Transformers marks as arbitrary is not looked at entry by entry."""
    table = torch.rand(LENGTH, LENGTH) < 0.5
    options = arguments("causal") | {
        "mask_function": lambda b, h, q, k: table[q, k],
        "use_vmap": True,
    }
    mask = compact_mask(**options)
    assert not isinstance(mask, CompactMask)
    assert_same(mask, eager_mask(**options))


def test_probe_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recognising a pattern a few queries at a time gives the same answer."""
    monkeypatch.setattr(masking, "_PROBE_ENTRIES", 2 * BATCH * LENGTH)
    for pattern in ("sliding", "packed, remapped", "chunked, padded", "every second"):
        options = arguments(pattern, attention_mask=padding("left"))
        assert_same(compact_mask(**options), eager_mask(**options))


@pytest.mark.parametrize(
    "pattern", ["causal", "bidirectional", "sliding", "packed", "every second"]
)
@pytest.mark.parametrize("padded", [None, "left"])
def test_compiled(pattern: str, padded: str | None) -> None:
    """Under torch.compile the mask says the same."""
    attention_mask = padding(padded) if padded else None

    def function(query: Tensor, attention_mask: Tensor | None) -> Tensor:
        return query + compact_mask(**arguments(pattern, attention_mask=attention_mask))

    torch.compiler.reset()
    zero = torch.zeros(BATCH, 1, LENGTH, LENGTH)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(zero, attention_mask)
    expected = eager_mask(**arguments(pattern, attention_mask=attention_mask))
    assert torch.equal(compiled, expected)


# ---- operations -----------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "slice keys": lambda m: m[:, :, :, :5],
    "slice queries": lambda m: m[:, :, -3:],
    "slice nothing": lambda m: m[:, :, :, : m.shape[-1]],
    "slice beyond": lambda m: m[..., : m.shape[-1] + 7],
    "slice with step": lambda m: m[..., ::2],
    "index": lambda m: m[1, 0, 2],
    "select": lambda m: m[:, 0],
    "new dimension": lambda m: m[:, None],
    "gather": lambda m: m[torch.tensor([2, 0])],
    "add": lambda m: m + torch.ones(1, 4, LENGTH, LENGTH),
    "add on the right": lambda m: torch.ones(1, 4, LENGTH, LENGTH) + m,
    "multiply": lambda m: m * 0.5,
    "equal zero": lambda m: m == 0,
    "compare": lambda m: m >= 0,
    "not": lambda m: ~(m.bool()),
    "bool": lambda m: m.bool(),
    "integer": lambda m: (m == 0).to(torch.int64),
    "clone": lambda m: m.clone(),
    "detach": lambda m: m.detach(),
    "contiguous": lambda m: m.contiguous(),
    "deep copy": copy.deepcopy,
    "where": lambda m: torch.where(m == 0, 1.0, m),
    "masked fill": lambda m: m.masked_fill(m < 0, -1e4),
    "cat": lambda m: torch.cat([m, torch.zeros(BATCH, 1, LENGTH, 2)], dim=-1),
    "cat of masks": lambda m: torch.cat([m, m], dim=0),
    "stack": lambda m: torch.stack([m, m]),
    "expand": lambda m: m.expand(-1, 4, -1, -1),
    "repeat": lambda m: m.repeat(1, 2, 1, 1),
    "repeat interleave": lambda m: m.repeat_interleave(2, dim=0),
    "view": lambda m: m.view(BATCH, -1),
    "squeeze": lambda m: m.squeeze(1),
    "transpose": lambda m: m.transpose(-1, -2),
    "pad": lambda m: torch.nn.functional.pad(m, (0, 3)),
    "flip": lambda m: m.flip(-1),
    "min": lambda m: m.amin(),
    "sum": lambda m: m.sum(dim=-1),
    "softmax": lambda m: torch.softmax(m, dim=-1),
    "zeros like": torch.zeros_like,
    "split": lambda m: m.split(1),
    "read in place": lambda m: torch.ones(BATCH, 1, LENGTH, LENGTH).add_(m),
    "write a copy": lambda m: torch.empty(BATCH, 1, LENGTH, LENGTH).copy_(m),
    "sdpa": lambda m: torch.nn.functional.scaled_dot_product_attention(
        *(torch.ones(BATCH, 2, LENGTH, 4).cumsum(2) for _ in range(3)), attn_mask=m
    ),
}


@pytest.mark.parametrize("pattern", ["causal", "sliding"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str, pattern: str) -> None:
    """What a model computes with the mask is what it would compute with the dense one."""
    mask = compact_mask(**arguments(pattern, attention_mask=padding("left")))
    assert isinstance(mask, CompactMask)
    result, expected = OPERATIONS[name](mask), OPERATIONS[name](mask.dense())
    if not isinstance(expected, Tensor):
        result, expected = torch.stack(result), torch.stack(expected)
    assert_same(result, expected)


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.half().float(), torch.float32),
        (lambda m: m.type_as(torch.zeros(1, dtype=torch.float64)), torch.float64),
        (lambda m: m.to(device="cpu", dtype=torch.float16, copy=True), torch.float16),
    ],
)
def test_casts(cast: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """A cast gives the mask of the other dtype: hidden is its minimum, where a dense cast overflows."""
    options = arguments("causal", attention_mask=padding("left"))
    result = cast(compact_mask(**options))
    assert isinstance(result, CompactMask)
    assert_same(result, eager_mask(**options, dtype=dtype))


@pytest.mark.parametrize("name", ["slice nothing", "slice beyond", "clone", "detach"])
def test_stays_compact(name: str) -> None:
    """What merely passes the mask on does not make it dense."""
    mask = compact_mask(**arguments("causal"))
    result = OPERATIONS[name](mask)
    assert isinstance(result, CompactMask)
    assert result.pattern == "causal"


@pytest.mark.parametrize(
    "write",
    [
        lambda m: m.add_(1.0),
        lambda m: m.masked_fill_(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 0.0),
        lambda m: m.__setitem__((slice(None), 0), 0.0),
        lambda m: m.copy_(torch.zeros(BATCH, 1, LENGTH, LENGTH)),
        lambda m: m.__iadd__(torch.zeros(1)),
    ],
)
def test_writing_is_refused(write: Callable[[Tensor], Any]) -> None:
    """A write into the compact form would be lost; it raises and changes nothing."""
    mask = compact_mask(**arguments("causal"))
    with pytest.raises(RuntimeError, match="compact"):
        write(mask)
    assert_same(mask, eager_mask(**arguments("causal")))


# ---- ranges ---------------------------------------------------------------------------------------


def test_packed_ranges() -> None:
    """Cumulative lengths of queries and keys; queries behind the last boundary see nothing."""
    queries, keys = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 4])
    visible = packed_ranges(queries, keys, 7).dense(6)[0, 0]
    expected = torch.zeros(7, 6, dtype=torch.bool)
    expected[0:2, 0:3] = True
    expected[2:5, 3:4] = True
    assert torch.equal(visible, expected)


def test_packed_rows() -> None:
    ranges = packed_rows(_POSITIONS)
    assert ranges is not None
    assert ranges.start.tolist() == [[0] * 5 + [5] * 3 + [8] * 5]
    assert ranges.end.tolist() == [[5] * 5 + [8] * 3 + [13] * 5]
    assert packed_rows(torch.arange(5, 11)[None]) is None
    # Positions that jump without starting again are not packed sequences.
    assert packed_rows(torch.tensor([[0, 1, 2, 7, 8]])) is None
    # One row of several may hold a single sequence.
    rows = packed_rows(torch.tensor([[0, 1, 2, 3], [0, 0, 1, 2]]))
    assert rows is not None
    assert rows.start.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]
    assert rows.end.tolist() == [[4, 4, 4, 4], [1, 4, 4, 4]]


@pytest.mark.parametrize("keys", [(False, False), (True, False), (False, True), (True, True)])
def test_intersect(keys: tuple[bool, bool]) -> None:
    def ranges(batch: int, with_keys: bool) -> KeyRanges:
        start = torch.randint(0, 6, (batch, 5))
        visible = torch.rand(2, 9) < 0.6 if with_keys else None
        return KeyRanges(start, start + torch.randint(0, 6, (batch, 5)), visible)

    one, other = ranges(1, keys[0]), ranges(2, keys[1])
    assert torch.equal(intersect(one, other).dense(9), one.dense(9) & other.dense(9))


def test_selected_keys() -> None:
    indices = torch.tensor([[[0, 3, -1], [2, 2, 2], [-1, -1, -1]]])
    visible = selected_keys(indices, 5)
    expected = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    assert torch.equal(visible, expected[None, None])


def test_selected_blocks() -> None:
    """Blocks of two keys, the last one cut short, shared by the heads of a group."""
    blocks = torch.tensor([[[[0, -1]], [[2, 1]]]])
    visible = selected_blocks(blocks, 2, 5, 4)
    first, second = [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]
    expected = torch.tensor([first, first, second, second]).bool()
    assert torch.equal(visible, expected[None, :, None])


def test_ranges_of_a_mask() -> None:
    mask = compact_mask(**arguments("sliding", attention_mask=padding("middle")))
    assert isinstance(mask, CompactMask)
    visible = ranges_of(mask).dense(LENGTH).expand(mask.shape)
    assert torch.equal(visible, mask.dense() == 0)
    assert ranges_of(mask).start.dtype == ranges_of(mask).end.dtype == torch.int32


# ---- memory ---------------------------------------------------------------------------------------

_TINY = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
}


@pytest.mark.parametrize("architecture", ["causal", "sliding"])
def test_padded_long_batch_takes_linear_memory(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a whole model no tensor of query × key size exists for a left-padded batch of 8k."""
    # The operator hides its inside from the recorder; run the same function without it.
    monkeypatch.setattr(library, "attention", lambda problem, impl: blockwise.forward(problem))
    if architecture == "causal":
        config: Any = LlamaConfig(**_TINY, attn_implementation="expressive")
        model: Any = LlamaForCausalLM(config)
    else:
        config = MistralConfig(**_TINY, sliding_window=64, attn_implementation="expressive")
        model = MistralForCausalLM(config)
    length = 8192
    ids = torch.randint(0, 16, (2, length))
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :3000] = 0
    with torch.no_grad(), Allocations() as watch:
        model.eval()(ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
    # A sliding window is recognised in parts of 2²⁴ bytes; everything else is far below.
    limit = 2**21 if architecture == "causal" else masking._PROBE_ENTRIES
    assert watch.largest_bytes <= limit * 1.01 < length * length

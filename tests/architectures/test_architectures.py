"""Every architecture that asks the attention registry, built tiny, against a dense witness.

The sample runs always; `-m architectures` runs the others too (about ten minutes on one core).
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

import hf_expressive

from . import checks, dense, page
from .builder import architectures, build, parts
from .examine import examine
from .exceptions import CONFIG, KEEP_EAGER, MODEL, NOISE, REFUSED
from .shrink import shrink
from .special_inputs import INPUTS

# Models of Transformers warn about much that is not ours (and say so through the package's tests as
# well).
pytestmark = pytest.mark.filterwarnings("ignore")

# One of each kind, chosen for what its attention brings.
SAMPLE = (
    # decoders: plain, grouped, fused, parallel, scaled otherwise, hybrid with state spaces,
    # mixtures of experts
    *(
        "llama",
        "gpt2",
        "gpt_neox",
        "gpt_bigcode",
        "phi3",
        "opt",
        "granite",
        "bamba",
        "mixtral",
        "qwen3_next",
    ),
    # windows, soft caps, sinks, chunks, values narrower than keys, selected keys and blocks,
    # compressed keys
    *("mistral", "gemma2", "gemma3", "gemma4", "gpt_oss", "granite_swa", "llama4", "deepseek_v3"),
    *("deepseek_v32", "deepseek_v4", "hy_v4", "minimax_m3_vl", "inkling2", "doge", "diffllama"),
    # encoders, encoder-decoders, position biases
    *(
        "bert",
        "modernbert",
        "roberta/decoder",
        "layoutlm",
        "bart",
        "t5",
        "t5gemma",
        "switch_transformers",
        "udop",
    ),
    # vision: windows with biases, packed images, pooling, queries, backbones without attention,
    # tracking
    *(
        "vit",
        "swin",
        "siglip",
        "dinov3_vit",
        "detr",
        "rt_detr",
        "segformer",
        "sam2",
        "eomt",
        "vjepa2",
    ),
    # audio: additive masks with biases of their own, boolean masks
    *("whisper", "wav2vec2_bert", "parakeet", "nemotron_asr_streaming", "moonshine"),
    # several parts
    *("clip", "bridgetower", "qwen2_5_vl", "mllama", "florence2", "musicgen", "blip_2", "esmfold2"),
    # time series
    *("informer", "timesfm", "patchtst"),
    # refused, whole or in part
    *("longt5", "sam", "clap", "git"),
)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dense.register()
    yield
    transformers.logging.set_verbosity(verbosity)


def _cases() -> Iterator[Any]:
    for name in [*architectures(), *parts()]:
        marks = () if name in SAMPLE else (pytest.mark.architectures,)
        for check in checks.checks_of(name):
            yield pytest.param(name, check, id=f"{name}-{check.__name__}", marks=marks)


@pytest.mark.parametrize(("name", "check"), list(_cases()))
def test_architecture(name: str, check: Callable[[str], None]) -> None:
    try:
        check(name)
    except checks.NotApplicable as reason:
        pytest.skip(str(reason))


def test_sample_is_large_and_exists() -> None:
    assert len(set(SAMPLE)) >= 40
    unknown = set(SAMPLE) - {*architectures(), *parts()}
    assert not unknown or transformers.__version__ < "5.23", unknown


@pytest.mark.skipif(
    transformers.__version__ < "5.23", reason="the tables name architectures of 5.23"
)
def test_exceptions_name_existing_architectures() -> None:
    named = {*CONFIG, *MODEL, *INPUTS, *KEEP_EAGER, *REFUSED, *NOISE}
    assert not {name.split("/")[0] for name in named} - set(architectures())


@pytest.mark.skipif(
    transformers.__version__ != page.read(page.PAGE.read_text(encoding="utf-8"))[0],
    reason="the page is of another version of Transformers",
)
def test_page_is_current() -> None:
    """Every architecture has a line, and lines that are made again are the same."""
    text = page.PAGE.read_text(encoding="utf-8")
    _, lines = page.read(text)
    assert set(lines) == {*architectures(), *parts()}
    named = {name for name in lines if "/" not in name}
    assert named == set(hf_expressive.supported_architectures())
    for name in ("llama", "sam", "evolla"):
        assert lines[name] == page.row(examine(name)), name
    for name, line in lines.items():
        assert "✗" not in line or f"- {name}: failed" in text, f"{name} fails without a reason"


_FOREIGN: dict[str, type[PreTrainedModel]] = {
    name: getattr(transformers, name)
    for name in (
        "BloomForCausalLM",
        "ClapAudioModel",
        "DebertaV2ForMaskedLM",
        "GPTJForCausalLM",
        "Gemma3nAudioEncoder",
        "LongformerForMaskedLM",
        "SamVisionModel",
    )
}


@pytest.mark.parametrize("name", _FOREIGN)
def test_models_without_the_registry_are_refused(name: str) -> None:
    cls = _FOREIGN[name]
    config = shrink(cls.config_class())  # type: ignore[misc]
    with pytest.raises(ValueError, match="registry"):
        cls._from_config(config, attn_implementation=checks.PACKAGE)


def _ignoring(*names: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The witness, broken: it does not see some of its arguments."""
    witness = AttentionInterface()[dense.EXPRESSIVE]

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if "attention_mask" in names:
            attention_mask = None
        kept = {name: value for name, value in more.items() if name not in names}
        return witness(module, query, key, value, attention_mask, **kept)

    return forward


def _mask_in_score(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """Adds the mask to the score before squaring it, so that hidden keys get weight one."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    score = query @ key.transpose(-1, -2) * more["scaling"]
    if attention_mask is not None:
        score = score + attention_mask.clamp(min=-1e4)
    weight = score.square() / (1 + score.square())
    weight = weight / weight.sum(dim=-1, keepdim=True)
    return (weight @ value).transpose(1, 2).contiguous(), weight


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("llama", ("attention_mask",)),
        ("granite", ("scaling",)),
        ("t5", ("position_bias",)),
        ("gpt_oss", ("s_aux",)),
        ("inkling2", ("sinks",)),
        ("gemma2", ("softcap",)),
        ("deepseek_v32", ("indices",)),
        ("minimax_m3_vl", ("block_indices",)),
        ("llama", ()),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "mask_in_score",
)
def test_broken_attention_is_noticed(
    name: str, broken: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    AttentionInterface.register("broken", _ignoring(*broken) if broken else _mask_in_score)
    AttentionMaskInterface.register("broken", eager_mask)
    monkeypatch.setattr(checks, "PACKAGE", "broken")
    with pytest.raises(AssertionError, match="differs"):
        checks.package_is_dense(name)


def test_build_is_deterministic() -> None:
    one, other = build("llama"), build("llama")
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[key])
    assert torch.equal(one.inputs()["input_ids"], other.inputs()["input_ids"])

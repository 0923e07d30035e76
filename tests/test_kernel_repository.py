"""The kernel repository: complete without this package, and right under the real `kernels` library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import llama, logits, tokens
from transformers.utils.import_utils import (
    KERNELS_MAX_VERSION,
    KERNELS_MIN_VERSION,
    is_kernels_available,
)

import hf_expressive
from hf_expressive import ExpressiveConfig, attach, kernel_entry
from hf_expressive.kernel_repository import write_kernel_repository
from hf_expressive.ops import expressive_attention

kernels = pytest.importorskip("kernels", reason="the library kernels is not installed")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kernel_repository(tmp_path_factory.mktemp("hub") / "expressive-attention")


def test_layout(repository: Path) -> None:
    assert {path.name for path in repository.iterdir()} == {"build", "README.md"}
    builds = {path.name: path for path in (repository / "build").iterdir()}
    assert set(builds) == {"torch-cpu", "torch-cuda"}
    package = Path(hf_expressive.__file__).parent
    files = [path for path in (package / "ops").rglob("*") if path.is_file()]
    sources = {path.relative_to(package) for path in files if path.parent.name != "__pycache__"}
    for name, build in builds.items():
        metadata = json.loads((build / "metadata.json").read_text(encoding="utf-8"))
        assert metadata["id"].isidentifier()
        assert metadata["backend"] == {"type": name.removeprefix("torch-")}
        assert metadata["version"] == 1
        written = {path.relative_to(build) for path in build.rglob("*") if path.is_file()}
        assert written == sources | {Path("__init__.py"), Path("metadata.json")}
        for path in sources:
            assert (build / path).read_bytes() == (package / path).read_bytes()


def test_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="is not empty"):
        write_kernel_repository(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_beside_the_package(repository: Path) -> None:
    """Both in one process: modules and operators of their own, the same numbers, gradients too."""
    kernel = kernels.get_local_kernel(repository)
    assert kernel.__name__.startswith("_expressive_attention_cpu_")
    inputs = [torch.randn(2, heads, 11, 8, requires_grad=True) for heads in (4, 2, 2)]
    results = []
    for function in (kernel.expressive_attention, expressive_attention):
        out = function(*inputs, is_causal=True, power=2.0)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    operators = getattr(torch.ops, kernel.__name__)
    assert operators.attention_forward is not torch.ops.hf_expressive.attention_forward


_ALONE = """
    import sys
    import torch
    from kernels import get_kernel

    kernel = get_kernel("someone/expressive-attention", version=1)
    query, key, value = torch.load(sys.argv[1])
    torch.save(kernel.expressive_attention(query, key, value, is_causal=True), sys.argv[2])
    assert "hf_expressive" not in sys.modules and "transformers" not in sys.modules
"""


def test_by_name_without_the_package(repository: Path, tmp_path: Path) -> None:
    """As a user of the library loads it; the package cannot be imported there."""
    inputs = torch.randn(3, 2, 4, 9, 16)
    torch.save(inputs, tmp_path / "in")
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(_ALONE), tmp_path / "in", tmp_path / "out"],
        env={
            **os.environ,
            "PYTHONPATH": "",
            "LOCAL_KERNELS": f"someone/expressive-attention={repository}",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = expressive_attention(*inputs.unbind(), is_causal=True)
    assert torch.equal(torch.load(tmp_path / "out"), expected)


@pytest.mark.skipif(
    not is_kernels_available(),
    reason=f"kernels {kernels.__version__} is installed, this Transformers takes "
    f"{KERNELS_MIN_VERSION} to {KERNELS_MAX_VERSION}",
)
def test_attn_implementation(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`attn_implementation="owner/name"` in Transformers itself, without the package."""
    monkeypatch.setenv("LOCAL_KERNELS", f"someone/expressive-attention={repository}")
    model = attach(llama(), ExpressiveConfig(scale=0.7, power=2.0))
    model.save_pretrained(tmp_path)
    code = """
        import sys, torch
        from tiny import logits
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(
            sys.argv[1], attn_implementation="someone/expressive-attention", allow_all_kernels=True
        )
        torch.save(logits(model), sys.argv[2])
        assert "hf_expressive" not in sys.modules
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code), tmp_path, tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(arguments, env=environment, check=True)
    assert torch.equal(torch.load(tmp_path / "out"), logits(model))


# ---- the entry, under the masks that Transformers hands to such a kernel -----------------------------


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> str:
    """The entry as Transformers registers a kernel: its function, and the masks of sdpa."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    name = "someone/kernel"
    functions, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    monkeypatch.setitem(functions, name, kernel_entry.flash_attn_forward)
    monkeypatch.setitem(masks, name, masks["sdpa"])
    return name


@pytest.mark.parametrize("options", [{}, {"scale": 0.7, "power": 2.0}], ids=str)
def test_entry_computes_what_the_package_does(options: dict[str, Any], registered: str) -> None:
    """Plain, left-padded, cached and packed batches of a model with grouped heads."""
    ids = tokens(length=8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    visible = mask.bool()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]).expand(2, -1)
    outputs = []
    for own in (True, False):
        model = attach(llama(), ExpressiveConfig(**options))
        if not own:
            model.config._attn_implementation_internal = registered
        outputs.append(
            [
                logits(model, input_ids=ids),
                logits(model, input_ids=ids, attention_mask=mask)[visible],
                logits(model, input_ids=ids, position_ids=positions, use_cache=False),
                model.generate(
                    ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0
                ),
            ]
        )
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def call(config: Any, **keywords: Any) -> torch.Tensor:
    module = torch.nn.Module()
    module.config = config  # type: ignore[assignment]
    module.is_causal = True  # type: ignore[assignment]
    inputs = torch.randn(3, 1, 2, 5, 8).unbind()
    return kernel_entry.flash_attn_forward(module, *inputs, **keywords)[0]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mechanism": "implicit_kernel"}, "runs expressive attention only"),
        ("expressive", "runs expressive attention only"),
        ({"mechanism": "expressive", "scale": "learned"}, "has no scale='learned'"),
        ({"mechanism": "expressive", "softmax_layers": [0]}, "runs no hybrids"),
        ({"mechanism": "expressive", "softmax_heads": 1}, "runs no hybrids"),
        ({"mechanism": "expressive", "sink": True}, "has no sink=True"),
        ({"mechanism": "expressive", "of a later version": 1}, "has no of a later version=1"),
    ],
)
def test_entry_refuses_what_needs_the_package(section: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*pip install hf-expressive"):
        call(SimpleNamespace(hf_expressive=section))


def test_entry_knows_every_option_of_the_package() -> None:
    """Defaults of all options are fine with it: a new one is missing in its list."""
    call(SimpleNamespace(hf_expressive=ExpressiveConfig().to_dict()))


def test_entry_ignores_no_keyword() -> None:
    plain = call(None)
    torch.manual_seed(0)
    assert plain.shape == (1, 5, 2, 8)
    for name in kernel_entry._REFUSED:
        with pytest.raises(ValueError, match=f"cannot honour {name}"):
            call(None, **{name: object()})
    changing = {
        "scaling": 3.0,
        "is_causal": False,
        "sliding_window": 2,
        "softcap": 0.3,
        "position_bias": torch.randn(1, 2, 5, 5),
        "s_aux": torch.ones(2),
        "sinks": torch.ones(2),
        "attention_mask": torch.ones(1, 1, 5, 5).tril(-1).bool(),
    }
    for name, value in changing.items():
        torch.manual_seed(1)
        before = call(None)
        torch.manual_seed(1)
        assert not torch.equal(call(None, **{name: value}), before), name

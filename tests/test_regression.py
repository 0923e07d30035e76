"""The regression recipe: data, splits, the two selection rules, models against formulas, whole runs."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ONE, RECIPES, TWO, launch
from torch import nn

sys.path.insert(0, str(RECIPES))

with warnings.catch_warnings():
    # gpytorch's own, when it is first imported.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
    import gpytorch  # noqa: F401

import regression as recipe
import regression_data as data
import regression_models as models
from arguments import Attention
from reporting import Record, Spread


def sine(count: int = 47) -> data.Points:
    generator = np.random.default_rng(0)
    x = np.sort(generator.uniform(10, 14, size=(count, 1)), axis=0)
    return data.Points(x, 100 + 5 * np.sin(3 * x[:, 0]), ["x"], "sine", "m", "a sine")


def regressor(text: str = "sdpa", heads: int = 4, width: int = 16) -> models.PointRegressor:
    torch.manual_seed(0)
    config = models.RegressorConfig(num_inputs=1, hidden_size=width, num_attention_heads=heads)
    model = Attention.parse(text).build(models.PointRegressor._from_config, config)
    assert isinstance(model, models.PointRegressor)
    return model


# ---- selection rules -----------------------------------------------------------------------------

#: Three epochs, four points; the halves are the first two and the last two points.
ERRORS = np.array([[3.0, 3.0, 1.0, 0.0], [1.0, -1.0, 2.0, 2.0], [2.0, 0.0, 3.0, -3.0]])


def test_best_epoch_by_hand() -> None:
    # Sums of squares: 19, 10, 22.
    assert recipe.best_epoch(ERRORS) == pytest.approx((10 / 4) ** 0.5)


def test_selected_by_hand() -> None:
    # The first half is best in epoch 1, the second in epoch 0: 4 + 4 there, 9 + 9 here.
    assert recipe.selected(np.delete(ERRORS, 2, axis=0)) == pytest.approx(((8 + 18) / 4) ** 0.5)


def test_selecting_on_the_reported_points_is_never_worse() -> None:
    generator = np.random.default_rng(0)
    pairs = []
    for points in range(2, 12):
        errors = generator.standard_normal((9, points))
        pairs.append((recipe.best_epoch(errors), recipe.selected(errors)))
    assert all(best <= chosen + 1e-12 for best, chosen in pairs)
    assert any(best < chosen for best, chosen in pairs)


# ---- data ----------------------------------------------------------------------------------------


def test_co2_is_the_monthly_series() -> None:
    points = data.read_points(data.DataOptions())
    assert points.inputs.shape == (521, 1)
    # One sample in March 1958, four in April.
    assert points.target[0] == pytest.approx(316.1)
    assert points.target[1] == pytest.approx((317.3 + 317.6 + 317.5 + 316.4) / 4)
    assert points.inputs[0, 0] == pytest.approx(1958 + 2.5 / 12)
    assert points.inputs[-1, 0] == pytest.approx(2001 + 11.5 / 12)
    steps = np.diff(points.inputs[:, 0])
    assert steps.min() == pytest.approx(1 / 12)
    assert np.isfinite(points.target).all()


def test_airline_is_the_monthly_series() -> None:
    pytest.importorskip("sktime", reason="sktime carries the airline passengers")
    points = data.read_points(data.DataOptions(dataset="airline"))
    assert points.inputs.shape == (144, 1)
    assert points.target[[0, 1, -1]].tolist() == [112, 118, 432]
    assert points.inputs[[0, -1], 0] == pytest.approx([1949 + 0.5 / 12, 1960 + 11.5 / 12])
    assert np.diff(points.inputs[:, 0]) == pytest.approx(1 / 12)


def test_split_is_a_partition_that_the_seed_decides() -> None:
    points = sine()
    split, again, other = (data.Split.draw(points, 0.1, seed) for seed in (3, 3, 4))
    assert len(split.held_out) == 5
    assert sorted([*split.train.tolist(), *split.held_out.tolist()]) == list(range(47))
    assert torch.equal(split.held_out, again.held_out)
    assert not torch.equal(split.held_out, other.held_out)


def test_split_is_standardised_by_what_may_be_known() -> None:
    points = sine()
    split = data.Split.draw(points, 0.2, 0)
    known = split.target[split.train]
    assert known.mean().item() == pytest.approx(0, abs=1e-12)
    assert known.std(correction=0).item() == pytest.approx(1)
    assert split.inputs.mean().item() == pytest.approx(0, abs=1e-12)
    back = split.target.numpy() * split.deviation + split.mean
    assert back == pytest.approx(points.target)


def test_split_refuses_a_constant_target() -> None:
    points = data.Points(sine().inputs, np.ones(47), ["x"], "flat", "", "")
    with pytest.raises(ValueError, match="nothing to predict"):
        data.Split.draw(points, 0.1, 0)


def table(folder: Path, text: str = "") -> Path:
    path = folder / "table.csv"
    rows = "".join(f"{i},{i * i % 7},{i % 3},r{i}\n" for i in range(24))
    path.write_text("a,y,b,name\n" + rows + text)
    return path


def test_file_is_read_by_its_column_names(tmp_path: Path) -> None:
    path = str(table(tmp_path))
    options = data.DataOptions(dataset="other", file=path, target="y", ignore=["name"])
    points = data.read_points(options)
    assert points.columns == ["a", "b"]
    assert points.inputs.tolist() == [[i, i % 3] for i in range(24)]
    assert points.target.tolist() == [i * i % 7 for i in range(24)]
    last = data.read_points(data.DataOptions(dataset="other", file=path, ignore=["name", "y"]))
    assert last.target.tolist() == [i % 3 for i in range(24)]


@pytest.mark.parametrize(
    ("row", "options", "sentence"),
    [
        ("", {"target": "z"}, "has no column z; it has a, y, b, name"),
        ("", {"target": "y"}, "column name holds other than numbers"),
        ("5,,1,r\n", {"target": "y", "ignore": ["name"]}, "column y has gaps"),
        ("", {"target": "y", "ignore": ["a", "b", "name"]}, "at least 20 rows and a column beside"),
    ],
)
def test_bad_file_is_refused(tmp_path: Path, row: str, options: dict, sentence: str) -> None:
    chosen = data.DataOptions(dataset="other", file=str(table(tmp_path, row)), **options)
    with pytest.raises(ValueError, match=sentence):
        data.read_points(chosen)


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "values", "sentence"),
    [
        (data.DataOptions, {"dataset": "housing"}, "--file must name a CSV file"),
        (data.DataOptions, {"file": "x.csv"}, "--file must name a CSV file"),
        (data.DataOptions, {"target": "y"}, "describe a --file, and there is none"),
        (recipe.TrainingOptions, {"repeats": 0}, "--repeats must be at least 1, got 0"),
        (recipe.TrainingOptions, {"heads": 0}, "--heads must be at least 1, got 0"),
        (recipe.TrainingOptions, {"held_out": 1.0}, "--held_out must be between 0 and 1"),
        (recipe.TrainingOptions, {"learning_rate": 0.0}, "--learning_rate must be positive"),
        (recipe.OutputOptions, {"overwrite": True, "resume": True}, "exclude each other"),
    ],
)
def test_bad_options_are_refused_by_name(options: type, values: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        options(**values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"attention": ["softmax"]}, "--attention must be one of sdpa"),
        ({"attention": ["gp-rbf", "gp-rbf"]}, "names one kind twice"),
        ({"width": 60}, "--width must be a multiple of the 8 heads of sdpa, got 60"),
    ],
)
def test_bad_kinds_are_refused(values: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        recipe.Kind.parse_all(data.DataOptions(), recipe.TrainingOptions(**values))


def test_kinds_follow_the_papers_table() -> None:
    options = data.DataOptions(dataset="housing", file="housing.csv")
    kinds = recipe.Kind.parse_all(options, recipe.TrainingOptions())
    found = [(kind.text, kind.heads) for kind in kinds]
    assert found == [
        ("sdpa", 4),
        ("implicit_kernel:kernel=direct,p=3.0", 8),
        ("implicit_kernel:kernel=copula,p=1.8", 8),
        ("expressive", 4),
        ("gp-rbf", 0),
        ("gp-spectral-mixture", 0),
    ]
    forced = recipe.Kind.parse_all(options, recipe.TrainingOptions(heads=2))
    assert {kind.heads for kind in forced if kind.attention} == {2}


# ---- models --------------------------------------------------------------------------------------


def by_hand(model: models.PointRegressor, x: torch.Tensor, heads: int) -> torch.Tensor:
    """The model of the protocol with softmax attention, from its weights; x is (points, inputs)."""
    weights = model.state_dict()

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    x = linear("read", x)
    projected = [linear(f"attention.{name}_proj", x).chunk(heads, dim=-1) for name in "qkv"]
    out = [
        (q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v for q, k, v in zip(*projected, strict=True)
    ]
    x = norm(x + linear("attention.o_proj", torch.cat(out, dim=-1)))
    hidden = linear("feed_forward.2", linear("feed_forward.0", x).relu()).relu()
    return linear("predict", norm(x + hidden)).squeeze(-1)


def test_model_is_the_layer_of_the_protocol() -> None:
    model = regressor().double().eval()
    x = torch.randn(13, 1, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x.unsqueeze(0))[0], by_hand(model, x, heads=4))
    assert regressor(heads=8, width=64).num_parameters() == 25_409


@pytest.mark.parametrize("text", ["expressive", "implicit_kernel:kernel=copula"])
def test_attention_goes_through_the_registry(text: str) -> None:
    softmax, ours = regressor().eval(), regressor(text).eval()
    kept = ours.load_state_dict(softmax.state_dict(), strict=False)
    assert not kept.unexpected_keys
    assert all(".mechanism." in key for key in kept.missing_keys)
    x = torch.randn(1, 13, 1)
    with torch.no_grad():
        difference = (ours(x) - softmax(x)).abs().max().item()
        shuffled = torch.randperm(13)
        # Neither positions nor a mask.
        torch.testing.assert_close(ours(x[:, shuffled]), ours(x)[:, shuffled])
    assert difference > 1e-3


def test_weights_start_as_pytorchs_layers_do() -> None:
    model = regressor(width=64, heads=8)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 8
    for layer in layers:
        bound = layer.in_features**-0.5
        assert bound * 0.9 < layer.weight.abs().max().item() <= bound


def fits_of(text: str, split: data.Split, epochs: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(1)
    if text in models.PROCESSES:
        known = split.inputs[split.train], split.target[split.train]
        process = models.GaussianProcess(text, *known).double()
        return list(models.process_fits(process, split, epochs, 0.1))
    return list(models.network_fits(regressor(text), split, epochs, 0.01))


@pytest.mark.parametrize("text", ["expressive", *models.PROCESSES])
def test_predictions_never_see_the_held_out_targets(text: str) -> None:
    split = data.Split.draw(sine(), 0.2, 0)
    target = split.target.clone()
    target[split.held_out] += torch.randn(len(split.held_out), dtype=target.dtype)
    honest = fits_of(text, split)
    changed = fits_of(text, data.Split(**{**vars(split), "target": target}))
    assert len(honest) == 3
    for one, other in zip(honest, changed, strict=True):
        assert torch.equal(one, other)
    target = split.target.clone()
    target[split.train[0]] += 1
    moved = fits_of(text, data.Split(**{**vars(split), "target": target}))
    assert not torch.equal(moved[-1], honest[-1])


@pytest.mark.parametrize(("text", "worst"), [("sdpa", 0.8), ("expressive", 0.8), ("gp-rbf", 0.05)])
def test_training_learns(text: str, worst: float) -> None:
    split = data.Split.draw(sine(), 0.2, 0)
    fits = fits_of(text, split, epochs=60)
    errors = [(fit - split.target)[split.held_out].square().mean().sqrt().item() for fit in fits]
    assert errors[-1] < worst
    assert errors[-1] < 0.9 * errors[0]


def test_training_adds_the_regulariser() -> None:
    split = data.Split.draw(sine(), 0.2, 0)
    plain, heavy = (
        fits_of(f"implicit_kernel:kernel=copula,norm_dropout=0,kl_weight={weight}", split)
        for weight in (0, 1000)
    )
    assert torch.equal(plain[0], heavy[0]) is False
    assert (plain[-1] - heavy[-1]).abs().max() > 1e-3


def test_process_is_the_exact_posterior() -> None:
    split = data.Split.draw(sine(), 0.2, 0)
    x, y = split.inputs[split.train], split.target[split.train]
    process = models.GaussianProcess("gp-rbf", x, y).double()
    fit = list(models.process_fits(process, split, 4, 0.1))[-1]
    # Parameters have not moved since the last prediction.
    length = process.kernel.base_kernel.lengthscale.item()
    height, noise = process.kernel.outputscale.item(), process.likelihood.noise.item()
    mean = process.mean.constant.item()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return height * torch.exp(-torch.cdist(a, b).square() / (2 * length**2))

    seen = kernel(x, x) + noise * torch.eye(len(x), dtype=x.dtype)
    expected = mean + kernel(split.inputs, x) @ torch.linalg.solve(seen, y - mean)
    torch.testing.assert_close(fit, expected, rtol=1e-6, atol=1e-6)


def test_spectral_mixture_has_five_components() -> None:
    split = data.Split.draw(sine(), 0.2, 0)
    x, y = split.inputs[split.train], split.target[split.train]
    process = models.GaussianProcess("gp-spectral-mixture", x, y)
    assert process.kernel.mixture_weights.shape == (5,)
    assert process.kernel.mixture_means.unique().numel() == 5


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    points = sine()
    path = tmp_path_factory.mktemp("data") / "sine.csv"
    rows = zip(points.inputs[:, 0], points.target, strict=True)
    path.write_text("x,height\n" + "".join(f"{x!s},{y!s}\n" for x, y in rows))
    return [
        *("--dataset", "other", "--file", str(path), "--unit", "m", "--width", "16"),
        *("--heads", "4", "--repeats", "2", "--epochs", "25"),
        *("--attention", "sdpa", "expressive", "gp-rbf"),
    ]


@pytest.fixture(scope="module")
def finished(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("run") / "sine"
    done = launch(ONE, "regression.py", *options, "--output_dir", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_run_records_both_rules(finished: tuple[Path, str]) -> None:
    folder, output = finished
    record = Record.load(folder / "results.json")
    assert record.variants == ["sdpa", "expressive", "gp-rbf"]
    assert [run.seed for run in record.runs] == [0, 0, 0, 1, 1, 1]
    for run in record.runs:
        assert run.final["rmse_best_epoch"] <= run.final["rmse_selected"]
        assert run.final["rmse_best_epoch"] <= min(run.curve["rmse"]) + 1e-5
        assert run.curve["step"][-1] == 25
        assert run.curve["rmse"][-1] == pytest.approx(run.final["rmse_last_epoch"], abs=1e-5)
    assert record.settings["repeats"] == 2
    content = json.loads((folder / "results.json").read_text())
    assert content["task"]["metric"]["key"] == "rmse_selected"
    assert (folder / "fit.png").read_bytes().startswith(b"\x89PNG")
    for variant in record.variants:
        assert str(record.spread(variant)) in output
    differences = [
        run.final["rmse_selected"] - rival.final["rmse_selected"]
        for run, rival in zip(record.runs_of("gp-rbf"), record.runs_of("sdpa"), strict=True)
    ]
    assert str(Spread.of(differences)) in output
    assert "sine regression, held-out RMSE in m, mean ± deviation of 2 runs" in output


def refusal(monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    """What the recipe says when it ends at once."""
    monkeypatch.setattr(sys, "argv", ["regression.py", *options])
    with pytest.raises(SystemExit) as stopped:
        recipe.main()
    return str(stopped.value)


def test_run_does_not_replace_results_unasked(
    finished: tuple[Path, str], options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = finished
    before = (folder / "results.json").read_bytes()
    said = refusal(monkeypatch, *options, "--output_dir", str(folder))
    assert said.endswith("exists; choose another --output_dir, or pass --overwrite or --resume.")
    said = refusal(monkeypatch, *options, "--output_dir", str(folder), "--resume", "--epochs", "24")
    assert "was made with other epochs; repeat its command" in said
    assert (folder / "results.json").read_bytes() == before


def test_an_interrupted_run_goes_on(
    finished: tuple[Path, str], options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first repeat is kept as it is; the second is what it would have been without a break."""
    whole = Record.load(finished[0] / "results.json")
    first = [dataclasses.replace(run, seconds=-1.0) for run in whole.runs if run.seed == 0]
    results = tmp_path / "results.json"
    dataclasses.replace(whole, runs=first, settings={**whole.settings, "repeats": 1}).save(results)
    monkeypatch.setattr(
        sys, "argv", ["regression.py", *options, "--output_dir", str(tmp_path), "--resume"]
    )
    recipe.main()
    resumed = Record.load(results)
    assert [(run.variant, run.seed) for run in resumed.runs] == [
        (run.variant, run.seed) for run in whole.runs
    ]
    assert [run.seconds < 0 for run in resumed.runs] == [True] * 3 + [False] * 3
    for ours, theirs in zip(resumed.runs, whole.runs, strict=True):
        assert ours.final == pytest.approx(theirs.final, rel=1e-5)
    assert resumed.settings == whole.settings


def test_bad_heads_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(monkeypatch, "--width", "60", "--output_dir", str(tmp_path / "none"))
    assert said == "error: --width must be a multiple of the 8 heads of sdpa, got 60."
    assert not (tmp_path / "none").exists()


def test_two_processes_share_the_runs(
    finished: tuple[Path, str], options: list[str], tmp_path: Path
) -> None:
    done = launch(TWO, "regression.py", *options, "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    two, one = (Record.load(path / "results.json") for path in (tmp_path, finished[0]))
    assert [(run.variant, run.seed) for run in two.runs] == [
        (run.variant, run.seed) for run in one.runs
    ]
    for ours, theirs in zip(two.runs, one.runs, strict=True):
        assert ours.final == pytest.approx(theirs.final, rel=1e-5)
    assert two.environment["hardware"]["processes"] == 2

"""The graph layer against a dense reference, against GATConv, and trained on a graph made here."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
import warnings
from typing import Any

import pytest
import torch
from tolerances import largest_error
from torch import Tensor

with warnings.catch_warnings():
    # torch_geometric's own, when it is first imported.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from torch_geometric.nn import GATConv

from hf_expressive import ImplicitKernelConfig, auxiliary_loss, graph
from hf_expressive.graph import ImplicitKernelGATConv

KERNELS = ["rbf", "stationary", "direct", "implicit", "copula"]


def options(kernel: str, **changes: Any) -> ImplicitKernelConfig:
    chosen: dict[str, Any] = {"norm_dropout": 0.0, **changes}
    return ImplicitKernelConfig(kernel=kernel, **chosen)  # type: ignore[arg-type]


def random_graph(nodes: int = 11, edges: int = 30) -> tuple[Tensor, Tensor]:
    """Features and edges, self-loops among them; the last node has no edge."""
    return torch.randn(nodes, 5), torch.randint(0, nodes - 1, (2, edges)).unique(dim=1)


def dense(layer: ImplicitKernelGATConv, x: tuple[Tensor, Tensor], adjacency: Tensor) -> Tensor:
    """The formula of the layer's docstring for adjacency (targets, sources), float64, edge by edge."""
    layer = copy.deepcopy(layer).double()
    settings, s = layer.options, layer.scale
    weights = (layer.lin, layer.lin) if layer.lin is not None else (layer.lin_src, layer.lin_dst)
    source, target = (
        weight(nodes.double()).unflatten(-1, (layer.heads, -1))  # type: ignore[misc]
        for weight, nodes in zip(weights, x, strict=True)
    )
    frequencies = None if layer.density is None else layer.density(None)[0].double()
    out = torch.zeros(len(target), layer.heads, layer.out_channels, dtype=torch.float64)
    for head in range(layer.heads):
        a = torch.cat([layer.att_dst[0, head], layer.att_src[0, head]])
        p = float(1 + layer.log_exponent[head].exp()) if settings.p == "learned" else settings.p
        for i in range(len(target)):
            neighbours = adjacency[i].nonzero().squeeze(1).tolist()
            logits = []
            for j in neighbours:
                x_ij = torch.cat([target[i, head], source[j, head]])
                norms = sum(torch.linalg.vector_norm(v, p) ** 2 for v in (a, x_ij)) * s / 2
                if frequencies is None:
                    similarity = -(a - x_ij).square().sum() * s / 2
                else:
                    unit = math.sqrt(s * math.sqrt(len(a)))
                    phase = [2 * math.pi * unit * (v @ frequencies[head]) for v in (a, x_ij)]
                    terms = (phase[0][:, None] - phase[1][None]).cos()
                    kernel = terms.sum(dim=(0, 1)).mean() / len(frequencies[head]) ** 2
                    similarity = torch.log(kernel**2 + settings.epsilon)
                logits.append(similarity + norms)
            if neighbours:
                leaky = torch.nn.functional.leaky_relu(torch.stack(logits), layer.negative_slope)
                out[i, head] = torch.softmax(leaky, dim=0) @ source[neighbours, head]
    flat = out.flatten(1) if layer.concat else out.mean(dim=1)
    return flat if layer.bias is None else flat + layer.bias


def adjacency_of(edges: Tensor, targets: int, sources: int, loops: bool) -> Tensor:
    adjacency = torch.zeros(targets, sources, dtype=torch.bool)
    adjacency[edges[1], edges[0]] = True
    if loops:
        adjacency.fill_diagonal_(True)
    return adjacency


def moved(layer: ImplicitKernelGATConv) -> ImplicitKernelGATConv:
    """The layer in evaluation, every parameter away from its initial value."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer.eval()


@torch.no_grad()
@pytest.mark.parametrize("p", [2.0, 3.0, "learned"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_layer_is_its_formula(kernel: str, p: Any) -> None:
    x, edges = random_graph()
    layer = moved(ImplicitKernelGATConv(5, 4, options(kernel, p=p), heads=3, scale=0.5))
    expected = dense(layer, (x, x), adjacency_of(edges, 11, 11, loops=True))
    assert largest_error(layer(x, edges), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [{"concat": False}, {"negative_slope": 1.0}, {"add_self_loops": False}, {"bias": False}],
)
def test_each_option_of_the_layer(change: dict[str, Any]) -> None:
    x, edges = random_graph()
    layer = moved(ImplicitKernelGATConv(5, 4, options("direct"), heads=3, **change))
    loops = change.get("add_self_loops", True)
    expected = dense(layer, (x, x), adjacency_of(edges, 11, 11, loops=loops))
    assert largest_error(layer(x, edges), expected) < 1e-5


@torch.no_grad()
def test_bipartite_graphs_project_both_sides() -> None:
    source, target = torch.randn(9, 5), torch.randn(6, 3)
    edges = torch.stack([torch.randint(9, (20,)), torch.randint(6, (20,))]).unique(dim=1)
    layer = moved(
        ImplicitKernelGATConv((5, 3), 4, options("stationary"), heads=2, add_self_loops=False)
    )
    expected = dense(layer, (source, target), adjacency_of(edges, 6, 9, loops=False))
    assert largest_error(layer((source, target), edges), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"concat": False}, {"negative_slope": 1.0}])
@pytest.mark.parametrize("in_channels", [5, (5, 5)])
def test_rbf_kernel_is_gatconv(settings: dict[str, Any], in_channels: Any) -> None:
    x, edges = random_graph()
    theirs = GATConv(in_channels, 4, heads=3, **settings).eval()
    ours = ImplicitKernelGATConv(in_channels, 4, options("rbf"), heads=3, **settings).eval()
    ours.load_state_dict(theirs.state_dict())
    given = x if in_channels == 5 else (x, x)
    expected, (index, weights) = theirs(given, edges, return_attention_weights=True)
    out, (our_index, our_weights) = ours(given, edges, return_attention_weights=True)
    assert torch.equal(our_index, index)
    assert largest_error(our_weights, weights) < 1e-5
    assert largest_error(out, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
def test_order_of_nodes_and_edges_does_not_matter(kernel: str) -> None:
    x, edges = random_graph()
    layer = moved(ImplicitKernelGATConv(5, 4, options(kernel), heads=2))
    order = torch.randperm(11)
    place = order.argsort()
    moved_edges = place[edges][:, torch.randperm(edges.shape[1])]
    assert largest_error(layer(x[order], moved_edges), layer(x, edges)[order]) < 1e-5


@torch.no_grad()
def test_weights_of_a_node_sum_to_one_and_no_neighbour_is_zero() -> None:
    x, edges = random_graph()
    layer = moved(ImplicitKernelGATConv(5, 4, options("direct"), heads=2, add_self_loops=False))
    out, (index, weights) = layer(x, edges, return_attention_weights=True)
    total = torch.zeros(11, 2).index_add(0, index[1], weights)
    alone = torch.bincount(edges[1], minlength=11) == 0
    assert alone[10]
    assert largest_error(total, (~alone)[:, None].float().expand(11, 2)) < 1e-6
    assert layer.bias is not None
    assert torch.equal(out[alone], layer.bias.expand(int(alone.sum()), -1))


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_parameter_receives_a_gradient(kernel: str) -> None:
    x, edges = random_graph()
    layer = moved(ImplicitKernelGATConv(5, 4, options(kernel, p="learned"), heads=2)).train()
    (layer(x, edges).square().sum() + auxiliary_loss(layer)).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    twin = copy.deepcopy(layer).eval()
    assert torch.equal(twin(x, edges), layer.eval()(x, edges))


@pytest.mark.parametrize(
    "change", [{"norm_dropout": 0.5}, {"authors_code": True}, {"epsilon": 0.5}, {"seed": 1}]
)
def test_each_option_of_the_kernel_changes_something(change: dict[str, Any]) -> None:
    x, edges = random_graph()
    results = []
    for settings in ({}, change):
        torch.manual_seed(0)
        layer = ImplicitKernelGATConv(5, 4, options("copula", **settings), heads=2)
        with torch.no_grad():
            results.append([layer.train()(x, edges), layer.eval()(x, edges)])
    assert any(largest_error(*pair) > 1e-4 for pair in zip(*results, strict=True))


def test_regulariser_is_found() -> None:
    x, edges = random_graph()
    model = torch.nn.ModuleList(
        ImplicitKernelGATConv(5, 4, options("copula"), heads=2) for _ in range(2)
    )
    with pytest.raises(RuntimeError, match="call it after model"):
        auxiliary_loss(model)
    for layer in model:
        layer(x, edges)
    expected = sum(float(layer.regularizer.detach()) for layer in model)
    assert float(auxiliary_loss(model).detach()) == pytest.approx(expected)
    assert expected > 0.0


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"softmax_heads": 1}, {}, "softmax_heads=1 has no meaning"),
        ({"softmax_layers": (0,)}, {}, "softmax_layers="),
        ({"kernel": "implicit", "condition": "mean"}, {}, "condition='mean'"),
        ({"epsilon": 0.0}, {}, "epsilon must be positive"),
        ({"kernel": "copula"}, {"heads": 1}, "couples heads"),
        ({}, {"scale": 0.0}, "scale must be a positive number"),
    ],
)
def test_what_has_no_meaning_is_refused(
    settings: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ImplicitKernelGATConv(5, 4, ImplicitKernelConfig(**settings), **{"heads": 2, **change})


def test_a_sparse_matrix_is_refused() -> None:
    x, edges = random_graph()
    layer = ImplicitKernelGATConv(5, 4, options("rbf"))
    for adjacency in (adjacency_of(edges, 11, 11, False).float().to_sparse(), edges[0]):
        with pytest.raises(ValueError, match="edge_index must be a dense tensor"):
            layer(x, adjacency)


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_keep_their_precision_in_bfloat16(kernel: str) -> None:
    """The weights of features in half precision are those of the same numbers in float32, rounded."""
    _, edges = random_graph()
    rough = moved(ImplicitKernelGATConv(5, 4, options(kernel), heads=2)).bfloat16()
    exact = copy.deepcopy(rough).float()
    x = torch.randn(11, 2, 4).bfloat16()
    given = (x[edges[1]], x[edges[0]])
    expected = exact.edge_update(given[0].float(), given[1].float(), edges[1], None, 11)
    with torch.autocast("cpu", torch.bfloat16):
        weights = rough.edge_update(*given, edges[1], None, 11)
    assert weights.dtype == torch.bfloat16
    assert largest_error(weights, expected) < 2**-8


def test_a_missing_dependency_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    spec = importlib.util.spec_from_file_location("hf_expressive.again", str(graph.__file__))
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ModuleNotFoundError, match=r"pip install hf-expressive\[graph\]"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def communities(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two groups of nodes with edges mostly within; features tell little of the group."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(90) % 2
    same = label[:, None] == label[None]
    draw = torch.rand(90, 90, generator=generator) < torch.where(same, 0.25, 0.03)
    upper = draw.triu(1)
    edges = (upper | upper.T).nonzero().T
    x = torch.randn(90, 8, generator=generator) + 0.35 * (2.0 * label[:, None] - 1.0)
    return x, edges, label


@pytest.mark.parametrize("kernel", KERNELS)
def test_layer_learns_from_a_graph(kernel: str) -> None:
    """A third of the labels is known; the edges tell of the others more than their features do."""
    x, edges, label = communities(seed=0)
    known = torch.arange(90) < 30
    torch.manual_seed(0)
    first = ImplicitKernelGATConv(8, 8, options(kernel), heads=2, scale=0.25)
    second = ImplicitKernelGATConv(16, 2, options(kernel), heads=2, scale=0.5, concat=False)
    layers = torch.nn.ModuleList([first, second])
    optimizer = torch.optim.Adam(layers.parameters(), lr=0.01)

    def run(edges: Tensor) -> Tensor:
        return second(torch.nn.functional.elu(first(x, edges)), edges)

    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(run(edges)[known], label[known])
        (loss + auxiliary_loss(layers) / 30).backward()
        optimizer.step()
        optimizer.zero_grad()
    layers.eval()
    with torch.no_grad():
        right = (run(edges).argmax(dim=1) == label)[~known].float().mean()
        blind = (run(edges[:, :0]).argmax(dim=1) == label)[~known].float().mean()
    assert float(right) >= 0.85, right
    assert float(right) > float(blind) + 0.05

"""Implicit kernel attention on graphs: a layer for PyTorch Geometric.

Not imported by the package itself; needs `pip install hf-expressive[graph]`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

try:
    from torch_geometric.nn import MessagePassing
    from torch_geometric.nn.inits import glorot
    from torch_geometric.utils import add_self_loops, remove_self_loops, softmax
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "hf_expressive.graph needs PyTorch Geometric: pip install hf-expressive[graph]"
    ) from error

from .attention.spectral_density import GeneratedFrequencies, LearnedFrequencies, Regularized
from .config import ImplicitKernelConfig
from .ops.implicit_kernel import kernel_features, log_magnitude

#: Options of `ImplicitKernelConfig` that speak of a Transformer's layers and masks, and what is allowed.
_FOREIGN: dict[str, tuple[object, ...]] = {
    "softmax_layers": ((),),
    "softmax_heads": (0,),
    "condition": ("auto", "constant"),
    "cache_features": (True,),
}


class ImplicitKernelGATConv(Regularized, MessagePassing):
    """A graph attention layer whose similarity is the kernel of a learned spectral density.

    GAT's attention logit is a product of a learned vector and the two nodes that an edge connects,
    so its exponential, too, is an RBF kernel times two magnitudes:

        x_ij = [W_target h_i ; W_source h_j],  a = [a_target ; a_source],  d = 2 · out_channels
        exp(s·a·x_ij) = exp(−‖a − x_ij‖²·s/2) · exp(‖a‖²·s/2) · exp(‖x_ij‖²·s/2)

    The kernel and the norms are replaced as in `ImplicitKernelAttention`:

        e_ij = log(k(a, x_ij)² + ε) + (‖a‖_p² + ‖x_ij‖_p²)·s/2
        out_i = Σ_j α_ij W_source h_j,  α_ij = softmax over i's neighbours of LeakyReLU(e_ij)

    With `kernel="rbf"` and p = 2 this is PyTorch Geometric's `GATConv`, with the same parameters by
    the same names. Magnitude dropout takes an edge's ‖x_ij‖_p². Noise depends on learned constants;
    `auxiliary_loss` finds its regulariser.

    Time and memory are O(edges · heads · (d + features)): the kernel is not a sum of a term a node.

    Parameters: `lin`, or `lin_src` and `lin_dst`; `att_src`, `att_dst` (1, heads, out_channels);
    `log_exponent` (heads,) if p is learned; `density`, see `attention.spectral_density`; `bias`.

    Args:
        in_channels: features of a node; a pair (source, target) for bipartite graphs.
        out_channels: features of a head.
        options: kernel, p and the other options of implicit kernel attention. Hybrids
            (`softmax_layers`, `softmax_heads`) and `condition="mean"` have no meaning here.
        heads: attention heads.
        concat: whether heads stand side by side in the output; else their mean is taken.
        negative_slope: of the leaky ReLU; 1 leaves the product of kernel and magnitudes as it is.
        scale: s > 0. GAT has 1; the paper's Transformers would have d^-½.
        dropout: probability with which a normalised weight is dropped in training.
        add_self_loops: whether every node attends to itself, as in GAT.
        bias: whether there is an additive bias.

    Raises:
        ValueError: options without a meaning here, ε = 0, or a scale that is not positive.

    Source: K. Song, Y. Jung, D. Kim, I.-C. Moon, AAAI 2021, arXiv 2006.06147, which derives GAT's
    attention as a kernel between the weight vector and the concatenation; the place of the leaky ReLU,
    `scale` and the learned p are ours. GAT: P. Veličković et al., ICLR 2018, arXiv 1710.10903.
    """

    edge_updater: Callable[..., Tensor]
    propagate: Callable[..., Tensor]
    lin: nn.Linear | None
    lin_src: nn.Linear | None
    lin_dst: nn.Linear | None

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        options: ImplicitKernelConfig,
        heads: int = 1,
        *,
        concat: bool = True,
        negative_slope: float = 0.2,
        scale: float = 1.0,
        dropout: float = 0.0,
        add_self_loops: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(aggr="add", node_dim=0)
        for name, allowed in _FOREIGN.items():
            value = getattr(options, name)
            if value not in allowed:
                raise ValueError(
                    f"{name}={value!r} has no meaning for a graph layer; leave it at its default."
                )
        if options.kernel != "rbf" and options.epsilon == 0:
            raise ValueError(
                "epsilon must be positive here: the layer takes the logarithm of k² + ε."
            )
        if not scale > 0:
            raise ValueError(f"scale must be a positive number, got {scale!r}.")
        if options.kernel == "copula" and heads == 1:
            raise ValueError(
                "kernel='copula' couples heads, and there is only one; use 'implicit'."
            )
        self.options = options
        self.in_channels, self.out_channels, self.heads = in_channels, out_channels, heads
        self.concat, self.negative_slope, self.scale = concat, negative_slope, scale
        self.dropout, self.add_self_loops = dropout, add_self_loops

        self.lin = self.lin_src = self.lin_dst = None
        if isinstance(in_channels, int):
            self.lin = nn.Linear(in_channels, heads * out_channels, bias=False)
        else:
            self.lin_src, self.lin_dst = (
                nn.Linear(channels, heads * out_channels, bias=False) for channels in in_channels
            )
        self.att_src = nn.Parameter(torch.empty(1, heads, out_channels))
        self.att_dst = nn.Parameter(torch.empty(1, heads, out_channels))
        self.density: LearnedFrequencies | GeneratedFrequencies | None = None
        if options.generates_frequencies:
            self.density = GeneratedFrequencies(
                options, heads, 2 * out_channels, conditional=False, layer=0
            )
        elif options.kernel != "rbf":
            self.density = LearnedFrequencies(options, heads, 2 * out_channels)
        if options.p == "learned":
            self.log_exponent = nn.Parameter(torch.empty(heads))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels * (heads if concat else 1)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for linear in (self.lin, self.lin_src, self.lin_dst):
            if linear is not None:
                glorot(linear.weight)
        glorot(self.att_src)
        glorot(self.att_dst)
        if self.density is not None:
            self.density.reset_parameters()
        for parameter in (self.bias, getattr(self, "log_exponent", None)):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        edge_index: Tensor,
        return_attention_weights: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """New features of the (target) nodes.

        Args:
            x: features (nodes, in_channels), or a pair of them for source and target nodes.
            edge_index: (2, edges), source and target of each edge.
            return_attention_weights: whether the weights are wanted too.

        Returns:
            (nodes, heads · out_channels), or (nodes, out_channels) for the mean of the heads; with
            weights ((2, edges), (edges, heads)) beside it, self-loops included.

        Raises:
            ValueError: a sparse adjacency matrix in place of an edge index.
        """
        if edge_index.layout != torch.strided or edge_index.dim() != 2 or len(edge_index) != 2:
            raise ValueError(
                f"edge_index must be a dense tensor (2, edges), got {tuple(edge_index.shape)} with "
                f"layout {edge_index.layout}."
            )
        source, target = self._projected(*x) if isinstance(x, tuple) else self._projected(x, x)
        if self.add_self_loops:
            edge_index, _ = remove_self_loops(edge_index)
            edge_index, _ = add_self_loops(edge_index, num_nodes=min(len(source), len(target)))
        sizes = (len(source), len(target))
        alpha = self.edge_updater(edge_index, x=(source, target), size=sizes)
        out = self.propagate(edge_index, x=(source, target), alpha=alpha, size=sizes)
        out = out.flatten(1) if self.concat else out.mean(dim=1)
        if self.bias is not None:
            out = out + self.bias
        return (out, (edge_index, alpha)) if return_attention_weights else out

    def _projected(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Features of source and target nodes by head, (nodes, heads, out_channels)."""
        shape = (self.heads, self.out_channels)
        by_source = self.lin_src if self.lin is None else self.lin
        by_target = self.lin_dst if self.lin is None else self.lin
        assert by_source is not None
        assert by_target is not None
        projected = by_source(source).unflatten(-1, shape)
        if source is target and by_source is by_target:
            return projected, projected
        return projected, by_target(target).unflatten(-1, shape)

    def edge_update(
        self, x_i: Tensor, x_j: Tensor, index: Tensor, ptr: Tensor | None, dim_size: int | None
    ) -> Tensor:
        """Weights (edges, heads), normalised over the edges of a target node."""
        # As in attention: scores in float32 or wider, whatever the dtype of the features.
        dtype = torch.promote_types(x_j.dtype, torch.float32)
        edges = torch.cat([x_i, x_j], dim=-1).transpose(0, 1)[None].to(dtype)
        vector = torch.cat([self.att_dst, self.att_src], dim=-1).transpose(0, 1)[None].to(dtype)
        with torch.autocast(x_j.device.type, enabled=False):
            logit = self._log_weight(vector, edges)[0].transpose(0, 1)
        logit = nn.functional.leaky_relu(logit, self.negative_slope)
        alpha = softmax(logit, index, ptr, dim_size).to(x_j.dtype)
        return nn.functional.dropout(alpha, self.dropout, self.training)

    def _log_weight(self, vector: Tensor, edges: Tensor) -> Tensor:
        """e, (1, heads, edges), from a (1, heads, 1, d) and x (1, heads, edges, d)."""
        options, scale = self.options, self.scale
        exponent = 1 + self.log_exponent.float().exp() if options.p == "learned" else options.p
        # 2√d in the paper; the published code has 2·d^¼.
        factor = edges.shape[-1] ** 0.25 if options.authors_code else 1.0
        magnitude = log_magnitude(edges, exponent, scale * factor)
        magnitude = nn.functional.dropout(magnitude, options.norm_dropout, self.training)
        magnitude = magnitude + log_magnitude(vector, exponent, scale * factor)
        if self.density is None:
            product = (vector * edges).sum(dim=-1) * scale
            lengths = log_magnitude(edges, 2.0, scale) + log_magnitude(vector, 2.0, scale)
            return product - lengths + magnitude
        frequencies, self.regularizer = self.density(None)
        query = kernel_features(vector, frequencies, scale)
        key = kernel_features(edges, frequencies, scale)
        kernel = torch.matmul(query, key.transpose(-1, -2)).squeeze(-2)
        return torch.log(kernel.square() + options.epsilon) + magnitude

    def message(self, x_j: Tensor, alpha: Tensor) -> Tensor:
        return alpha.unsqueeze(-1) * x_j

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, {self.out_channels}, heads={self.heads}, "
            f"kernel={self.options.kernel!r})"
        )

"""The models of the regression recipe, and their training: one encoder layer, Gaussian processes."""

from __future__ import annotations

from collections.abc import Iterator

import gpytorch
import torch
from regression_data import Split
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_expressive.auxiliary import auxiliary_loss

#: Gaussian processes by name.
PROCESSES = ("gp-rbf", "gp-spectral-mixture")
MIXTURES = 5


class RegressorConfig(PreTrainedConfig):
    """One encoder layer: numbers read at each point, size of the hidden state, heads."""

    model_type = "point_regressor"

    num_inputs: int = 1
    hidden_size: int = 64
    num_attention_heads: int = 8


class SelfAttention(nn.Module):
    """Attention of every point to every point.

    It asks Transformers' registry for its attention function, which is all that a model of one's own
    has to do to run the mechanisms of hf_expressive.
    """

    def __init__(self, config: RegressorConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, points, width) to the same."""
        query, key, value = (
            projection(hidden).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, sdpa_attention_forward
        )
        out, _ = attend(self, query, key, value, None, dropout=0.0, scaling=self.scaling)
        return self.o_proj(out.flatten(2))


class PointRegressor(PreTrainedModel):
    """Linear in, one post-norm encoder layer without positions, linear out."""

    config_class = RegressorConfig
    _supports_sdpa = True

    def __init__(self, config: RegressorConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.read = nn.Linear(config.num_inputs, width)
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.feed_forward_norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own: linear layers uniform within ±fan_in^-½, where Transformers has N(0, 0.02²).

        So small a start would leave expressive attention where its gradient vanishes.
        """
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)

    def forward(self, inputs: Tensor) -> Tensor:
        """Predictions (batch, points) from inputs (batch, points, columns)."""
        hidden = self.read(inputs)
        hidden = self.attention_norm(hidden + self.attention(hidden))
        hidden = self.feed_forward_norm(hidden + self.feed_forward(hidden))
        return self.predict(hidden).squeeze(-1)


class GaussianProcess(gpytorch.models.ExactGP):
    """Exact GP with a constant mean and an RBF kernel, or a spectral mixture."""

    def __init__(self, name: str, inputs: Tensor, target: Tensor) -> None:
        super().__init__(inputs, target, gpytorch.likelihoods.GaussianLikelihood())
        self.mean = gpytorch.means.ConstantMean()
        if name == "gp-rbf":
            self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
        else:
            self.kernel = gpytorch.kernels.SpectralMixtureKernel(MIXTURES, inputs.shape[1])
            self.kernel.initialize_from_data(inputs, target)

    def forward(self, inputs: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean(inputs), self.kernel(inputs))


def network_fits(
    model: PointRegressor, split: Split, epochs: int, learning_rate: float
) -> Iterator[Tensor]:
    """Trains, and yields after each epoch the predictions for all points, (points,)."""
    device = model.device
    inputs = split.inputs.float().to(device).unsqueeze(0)
    train, target = split.train.to(device), split.target.float().to(device)[split.train.to(device)]
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for _ in range(epochs):
        model.train()
        loss = mse_loss(model(inputs)[0, train], target)
        # As the authors do: zero for all mechanisms but those with learned noise.
        (loss + auxiliary_loss(model) / len(train)).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            yield model(inputs)[0].double().cpu()


def process_fits(
    model: GaussianProcess, split: Split, epochs: int, learning_rate: float
) -> Iterator[Tensor]:
    """Maximises the marginal likelihood, and yields the posterior mean after each step, (points,)."""
    likelihood = model.likelihood
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    device = next(model.parameters()).device
    inputs, target = split.inputs.to(device), split.target.to(device)[split.train.to(device)]
    for _ in range(epochs):
        model.train()
        likelihood.train()
        (-objective(model(*model.train_inputs), target)).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        likelihood.eval()
        with torch.no_grad(), gpytorch.settings.skip_posterior_variances():
            yield model(inputs).mean.cpu()

"""The connector: vision features to the decoder's embedding space."""

from torch import Tensor, nn


class Connector(nn.Module):
    """Linear + LayerNorm, as GIT (Wang et al. 2022).

    features: [N, P, vision_size]; returns [N, P, embedding_size].
    """

    def __init__(self, vision_size: int, embedding_size: int, eps: float = 1e-5):
        super().__init__()
        self.linear = nn.Linear(vision_size, embedding_size)
        self.norm = nn.LayerNorm(embedding_size, eps=eps)
        self.moe: nn.Module | None = None  # experts, whose output is added (`place_experts`)

    def forward(self, features: Tensor) -> Tensor:
        projected = self.linear(features)
        return self.norm(projected if self.moe is None else projected + self.moe(features))

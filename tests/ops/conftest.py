import pytest
import torch


@pytest.fixture(scope="session")
def article_mask():
    """The dense GIT mask as published (GIT-LLM article, 2023): 0 = attend, -inf = masked."""

    def create_git_attention_mask(tgt: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        num_tgt = tgt.shape[1]
        num_memory = memory.shape[1]
        top_left = torch.zeros((num_memory, num_memory))
        top_right = torch.full((num_memory, num_tgt), float("-inf"))
        bottom_left = torch.zeros((num_tgt, num_memory))
        bottom_right = torch.triu(torch.ones(tgt.shape[1], tgt.shape[1]), diagonal=1)
        bottom_right = bottom_right.masked_fill(bottom_right == 1, float("-inf"))
        left = torch.cat((top_left, bottom_left), dim=0)
        right = torch.cat((top_right, bottom_right), dim=0)
        return torch.cat((left, right), dim=1)[None, None, :]

    return create_git_attention_mask

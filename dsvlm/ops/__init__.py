"""The fused operations and their pure PyTorch references."""

from dsvlm.ops.git_attention import git_attention
from dsvlm.ops.git_mask import GitMask

__all__ = ["GitMask", "git_attention"]

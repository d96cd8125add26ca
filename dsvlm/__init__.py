"""dsvlm: multi-task training of vision-language models with DeepSpeed, the same on any number of GPUs."""

__version__ = "0.1.0"

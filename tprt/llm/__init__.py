"""The library face: ``LLM``."""

from tprt.llm.llm import LLM, Progress
from tprt.llm.startup import open_tokenizer, resolve_config, resolve_vocabulary, split_options

__all__ = [
    "LLM",
    "Progress",
    "open_tokenizer",
    "resolve_config",
    "resolve_vocabulary",
    "split_options",
]

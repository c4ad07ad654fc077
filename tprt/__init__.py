"""tprt: tensor-parallel inference for Persimmon-8B, RecurrentGemma and models like them.

Importing the package is cheap; torch is imported when ``LLM`` is first used.
"""

from typing import TYPE_CHECKING, Any

from tprt.errors import TprtError
from tprt.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tprt.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "TprtError", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from tprt.llm import LLM

        return LLM
    raise AttributeError(f"module 'tprt' has no attribute {name!r}")

"""What callers pass to ``LLM``, brought into one form.

Knows no model and no rank.
"""

from collections.abc import Sequence

from tprt.engine.input_processor import Prompt
from tprt.errors import ConfigError
from tprt.sampling_params import SamplingParams


def pair(
    prompts: Prompt | Sequence[Prompt] | None,
    params: SamplingParams | Sequence[SamplingParams] | None,
) -> list[tuple[Prompt, SamplingParams]]:
    """Every prompt with its parameters. Raises ConfigError for what is neither one nor a list."""
    if isinstance(prompts, str | dict):
        prompts = [prompts]
    if not isinstance(prompts, list | tuple):
        raise ConfigError(
            f"rank 0 was given {type(prompts).__name__} for prompts", hint="one prompt, or a list"
        )
    if params is None or isinstance(params, SamplingParams):
        return [(prompt, params or SamplingParams()) for prompt in prompts]
    if not isinstance(params, list | tuple) or not all(
        isinstance(p, SamplingParams) for p in params
    ):
        raise ConfigError(
            f"sampling_params must be SamplingParams, not {str(params)[:80]!r}",
            hint="SamplingParams(temperature=0.0), or one for each prompt",
        )
    if len(params) != len(prompts):
        raise ConfigError(
            f"{len(params)} sampling parameters for {len(prompts)} prompts", hint="as many of each"
        )
    return list(zip(prompts, params, strict=True))

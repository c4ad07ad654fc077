"""Plain frozen values that describe a model and an engine.

Foreign configurations (Hugging Face's ``config.json``, Megatron's ``args``) are translated at the
door, here; nothing behind it asks a config for a key that may be missing. This package knows no tensor,
no file and no rank.
"""

from typing import Any

from tprt.config.checks import MAX_COUNT, MAX_COUNTS, shown
from tprt.config.engine import (
    DTYPE_ALIASES,
    DTYPES,
    KERNELS,
    EngineConfig,
    TrimVocab,
    parse_trim_vocab,
)
from tprt.config.model import ModelConfig
from tprt.config.persimmon import (
    QK_PER_HEAD,
    QK_PER_LAYER,
    QK_PER_RANK,
    PersimmonConfig,
    QKLayerNorm,
    RotaryPrecision,
    default_rotary_precision,
)
from tprt.config.recurrent_gemma import RecurrentGemmaConfig
from tprt.errors import CheckpointError

CONFIG_CLASSES: dict[str, type[ModelConfig]] = {
    cls.model_type: cls for cls in (PersimmonConfig, RecurrentGemmaConfig)
}


def get_config_class(model_type: object) -> type[ModelConfig]:
    """Of a ``model_type``. Raises CheckpointError for one that is not implemented."""
    if not isinstance(model_type, str) or model_type not in CONFIG_CLASSES:
        known = " or ".join(CONFIG_CLASSES)
        raise CheckpointError(
            f"model_type is {shown(model_type)}, which is not implemented", hint=known
        )
    return CONFIG_CLASSES[model_type]


def config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    """From ``config.json``, whichever model it describes; without ``model_type`` Persimmon's."""
    return get_config_class(raw.get("model_type", PersimmonConfig.model_type)).from_hf(raw)


__all__ = [
    "CONFIG_CLASSES",
    "DTYPES",
    "DTYPE_ALIASES",
    "KERNELS",
    "MAX_COUNT",
    "MAX_COUNTS",
    "QK_PER_HEAD",
    "QK_PER_LAYER",
    "QK_PER_RANK",
    "EngineConfig",
    "ModelConfig",
    "PersimmonConfig",
    "QKLayerNorm",
    "RecurrentGemmaConfig",
    "RotaryPrecision",
    "TrimVocab",
    "config_from_hf",
    "default_rotary_precision",
    "get_config_class",
    "parse_trim_vocab",
]

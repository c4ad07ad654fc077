"""Models that measurements know by name; all get random weights. Sizes only: no tensors, no engine."""

from tprt.config import ModelConfig, PersimmonConfig, RecurrentGemmaConfig
from tprt.config.recurrent_gemma import CYCLE, LayerType
from tprt.errors import ConfigError

PERSIMMON_100M = PersimmonConfig(
    vocab_size=10240,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    head_dim=64,
    max_position_embeddings=16384,
)
# A step reads 12 L h^2 + V h numbers, and 4 L h^2 x zeros fewer where it skips them. With L = 7 and
# V = 8 h that is 92 to 92 - 28 x zeros: 1.38 at 90% zeros. Persimmon-8B: 1.35, trimmed too 1.42. Few
# wide layers, since in those of the 8B, too, the time is in the matrices.
PERSIMMON_400M = PersimmonConfig(
    vocab_size=16384,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=7,
    num_attention_heads=32,
    head_dim=64,
    max_position_embeddings=2048,
)
PERSIMMON_8B = PersimmonConfig(
    vocab_size=262144,
    hidden_size=4096,
    intermediate_size=16384,
    num_hidden_layers=36,
    num_attention_heads=64,
    head_dim=64,
    max_position_embeddings=16384,
)
# Every code path of the others, in milliseconds, also in Triton's interpreter.
TOY = PersimmonConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=16,
    max_position_embeddings=160,
)


def _kinds(layers: int) -> tuple[LayerType, ...]:
    return tuple(CYCLE[i % len(CYCLE)] for i in range(layers))


def _recurrent_gemma(
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    vocab_size: int = 256000,
    window: int = 2048,
    positions: int = 16384,
) -> RecurrentGemmaConfig:
    return RecurrentGemmaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=positions,
        lru_width=hidden_size,
        layer_types=_kinds(layers),
        attention_window_size=window,
    )


RECURRENTGEMMA_2B = _recurrent_gemma(2560, 7680, layers=26, heads=10)
RECURRENTGEMMA_9B = _recurrent_gemma(4096, 12288, layers=38, heads=16)
# As wide and as deep as persimmon-100m, the window and the shape of layers as in the releases.
RECURRENTGEMMA_100M = _recurrent_gemma(768, 2304, layers=11, heads=12, vocab_size=10240)
RECURRENT_TOY = _recurrent_gemma(
    64, 128, layers=5, heads=4, vocab_size=320, window=32, positions=160
)

CONFIGS: dict[str, ModelConfig] = {
    "persimmon-8b": PERSIMMON_8B,
    "persimmon-400m": PERSIMMON_400M,
    "persimmon-100m": PERSIMMON_100M,
    "recurrentgemma-9b": RECURRENTGEMMA_9B,
    "recurrentgemma-2b": RECURRENTGEMMA_2B,
    "recurrentgemma-100m": RECURRENTGEMMA_100M,
    "toy": TOY,
    "toy-recurrent": RECURRENT_TOY,
}


def require_persimmon(config: ModelConfig, what: str = "this bench") -> PersimmonConfig:
    """Raises ConfigError for another model than one whose MLPs have a squared ReLU."""
    if not isinstance(config, PersimmonConfig):
        raise ConfigError(
            f"{what} has no case for a model of type {config.model_type}",
            hint=f"a {PersimmonConfig.model_type} model, or no --model",
        )
    return config

"""Small RecurrentGemma models with random weights, as folders in Hugging Face's layout."""

import json
import shutil
from pathlib import Path

import torch
from conftest import TINY
from safetensors.torch import save_file

from tprt.config import RecurrentGemmaConfig
from tprt.tokenizer import Tokenizer

TOKENIZER = next(TINY.rglob("*.model"))
WINDOW = 16
# Ten heads, which four ranks share with two of zeros; attention in the midst and recurrence at the end.
CONFIG = RecurrentGemmaConfig(
    vocab_size=Tokenizer(TOKENIZER).vocab_size,
    hidden_size=160,
    intermediate_size=96,
    num_hidden_layers=5,
    num_attention_heads=10,
    head_dim=16,
    max_position_embeddings=8192,
    lru_width=160,
    layer_types=("recurrent", "recurrent", "attention", "recurrent", "recurrent"),
    attention_window_size=WINDOW,
)


def random_weights(config: RecurrentGemmaConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Biases and norms too, which start as zeros in training and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.tensor_shapes().items():
        scale = 0.1 if len(shape) > 1 else 0.2
        if name.endswith("recurrent_param"):
            scale = 1.0  # decays from slow to fast
        weights[name] = torch.randn(shape, generator=generator) * scale
    return weights


def write_folder(
    path: Path, weights: dict[str, torch.Tensor], config: RecurrentGemmaConfig = CONFIG
) -> Path:
    path.mkdir()
    save_file(weights, str(path / "model.safetensors"))
    raw = config.to_hf() | {"torch_dtype": "float32"}
    (path / "config.json").write_text(json.dumps(raw))
    shutil.copy(TOKENIZER, path / "tokenizer.model")
    return path

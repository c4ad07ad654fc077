"""Small RecurrentGemma models with random weights: folders in Hugging Face's layout, and engines."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from conftest import TINY
from fakes import VOCAB, ByteTokenizer
from safetensors.torch import save_file

from tprt.bench.synthetic import make_engine
from tprt.config import EngineConfig, RecurrentGemmaConfig
from tprt.distributed.sharding import shard_spec
from tprt.distributed.tp_group import TPGroup
from tprt.engine.llm_engine import LLMEngine
from tprt.kernels import use_kernels
from tprt.models.recurrent_gemma import RecurrentGemmaForCausalLM
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


def telling_weights(
    config: RecurrentGemmaConfig = CONFIG, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Of a model whose texts tell a wrong state from a right one: it remembers, and it speaks of it.

    Most decays are slow, as those of a trained model; ``random_weights`` forget within a few tokens. The
    last norm has mixed signs, else the head, tied to the embedding, finds the last token again and the
    text repeats it, whatever the state.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(config, seed)
    weights["model.final_norm.weight"] = torch.randn(config.hidden_size, generator=generator) - 1
    for name in weights:
        if name.endswith("recurrent_param"):
            weights[name] = -8 * torch.rand(config.lru_width, generator=generator)
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


# For an engine that reads and writes bytes: each kind of layer, small enough for Triton's interpreter.
BYTES = replace(
    CONFIG,
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    lru_width=32,
    layer_types=("recurrent", "attention"),
    logits_soft_cap=4.0,  # about the largest logit there is, so that it bends many
)


def byte_engine(config: RecurrentGemmaConfig = BYTES, device: str = "cpu", **settings) -> LLMEngine:
    """An engine for ``ByteTokenizer`` around a model of ``telling_weights``."""
    options = EngineConfig(**{"dtype": "float32", "max_num_seqs": 8, "seed": 5, **settings})
    tp, dtype = TPGroup(device=torch.device(device)), getattr(torch, options.dtype)
    weights = telling_weights(config)
    with use_kernels(*options.kernel_choice):
        model = RecurrentGemmaForCausalLM(config, tp, dtype).eval()
        for name, parameter in model.named_parameters():
            shard_spec(parameter).load(parameter, weights[name].__getitem__)
        model.finish_loading()
        engine = make_engine(model, options)
    engine.tokenizer = ByteTokenizer()
    return engine

"""A model with random weights and a tokenizer without text, for measurements that need no checkpoint.

Knows the engine and the models; no files and no peers.
"""

import math
import random
import zlib
from collections.abc import Iterable
from statistics import NormalDist
from typing import cast

import torch

from tprt.bench.live import decoder_layers
from tprt.bench.named_models import PERSIMMON_8B, require_persimmon
from tprt.config import EngineConfig, ModelConfig
from tprt.distributed.sharding import shard_spec
from tprt.distributed.tp_group import CPU, TPGroup
from tprt.distributed.vocabulary import Vocabulary
from tprt.engine.llm_engine import LLMEngine
from tprt.engine.memory_plan import plan_rank
from tprt.engine.sequence import Request, Sequence
from tprt.errors import ConfigError
from tprt.kernels import use_kernels
from tprt.llm.build import build_runner
from tprt.llm.memory import SNAPSHOTS_PER_SEQUENCE, check_memory
from tprt.models import CausalLM, get_model_class
from tprt.sampling_params import SamplingParams
from tprt.tokenizer import Tokenizer

STD = 0.02  # of every random weight
DECAY = 5.0
# Ids of Persimmon-8B that no text is made of.
UNUSED_IDS = (3, 70002)


class NumberTokenizer:
    """Ids whose text is their number; none of them ends a completion."""

    end_ids: frozenset[int] = frozenset()
    special_ids: frozenset[int] = frozenset()
    adds_dummy_prefix = removes_extra_whitespace = False

    def id_to_piece(self, token_id: int) -> str:
        return f" {token_id}"

    def is_byte(self, token_id: int) -> bool:
        return False

    def token_bytes(self, token_id: int) -> bytes:
        return self.id_to_piece(token_id).encode()

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(map(self.id_to_piece, ids))


def random_tensor(
    name: str, shape: tuple[int, ...], seed: int, device: torch.device = CPU
) -> torch.Tensor:
    """The whole float32 tensor of a parameter: normal, 0.02 wide, around 1 for weights of LayerNorms.

    Decays of a recurrence lie around one at which its memory lasts for dozens of tokens. The values
    follow from name, seed and kind of device, whatever is drawn before.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) + seed)
    values = torch.randn(shape, generator=generator, device=device).mul_(STD)
    if name.endswith("layernorm.weight"):
        return values.add_(1)
    return values.sub_(DECAY) if name.endswith("recurrent_param") else values


def zeros_bias(config: ModelConfig, zeros: float) -> float:
    """The bias of ``dense_h_to_4h`` with which that share of a layer's neurons is 0 for a token.

    Its weights are normal and its input a LayerNorm, so without it a neuron is normal too. Which are 0
    is a matter of chance, for each by itself: "synthetic, independent". In trained models some neurons
    fire for most tokens, so that those of a batch are fewer together.
    """
    # Squares of the LayerNorm's output: its weights are 1 +- STD, its biases 0 +- STD.
    squares = config.hidden_size * (1 + 2 * STD**2)
    return -NormalDist().inv_cdf(zeros) * STD * math.sqrt(squares)


def set_zeros(model: CausalLM, zeros: float) -> None:
    """Change the share in place, also under graphs that have been captured.

    Raises:
        ConfigError: the model's MLPs have no squared ReLU.
    """
    require_persimmon(model.config, "--zeros")
    for layer in decoder_layers(model):
        layer.mlp.dense_h_to_4h.bias.fill_(zeros_bias(model.config, zeros))


def trimmed(config: ModelConfig) -> Vocabulary:
    """Without the ids that Persimmon-8B has no use for, or as large a part of another model's."""
    first, last = UNUSED_IDS
    count = (last - first + 1) * config.vocab_size // PERSIMMON_8B.vocab_size
    return Vocabulary(config.vocab_size, ((first, first + count - 1),))


def random_model(
    config: ModelConfig,
    tp: TPGroup,
    dtype: torch.dtype,
    seed: int,
    zeros: float | None = None,
    vocabulary: Vocabulary | None = None,
) -> CausalLM:
    """This rank's part of a model of ``random_tensor``s; the same whole model at any TP size.

    Values are drawn where the model lives: a GPU fills 18.8 GB faster than a host could copy them.

    Args:
        zeros: see ``zeros_bias``; None leaves the biases random, so that about half the neurons are 0.
    """
    model = get_model_class(config.model_type)(config, tp, dtype, vocabulary=vocabulary).eval()
    for name, parameter in model.named_parameters():
        spec = shard_spec(parameter)
        whole = random_tensor(name, spec.canonical_shape, seed, tp.device)
        with torch.no_grad():
            spec.load(parameter, whole.__getitem__)
        del whole
    if zeros is not None:
        set_zeros(model, zeros)
    model.finish_loading()
    if tp.device.type == "cuda":
        torch.cuda.empty_cache()  # what the allocator keeps counts as taken
    return model


def random_engine(
    config: ModelConfig,
    tp: TPGroup,
    settings: EngineConfig,
    zeros: float | None = None,
    vocabulary: Vocabulary | None = None,
) -> LLMEngine:
    """An engine around a ``random_model``, with the kernels that ``settings`` name. Collective."""
    with use_kernels(*settings.kernel_choice):
        dtype = getattr(torch, settings.dtype)
        model = random_model(config, tp, dtype, settings.seed, zeros, vocabulary)
        return make_engine(model, settings)


def make_engine(model: CausalLM, config: EngineConfig) -> LLMEngine:
    """An engine around ``model``, with the KV cache that ``LLM`` would give it."""
    longest = config.resolve_max_model_len(model.config)
    loaded = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    plan = check_memory(model.tp, model.config, config, loaded, model.vocabulary)
    valid = model.config.vocab_size
    runner, num_blocks = build_runner(model, model.tp, config, plan, longest, valid)
    tokenizer = cast(Tokenizer, NumberTokenizer())
    return LLMEngine(runner, tokenizer, config, num_blocks, model.tp)


def cache_memory(config: ModelConfig, engine: EngineConfig, tp_size: int, blocks: int) -> int:
    """Bytes of cache per rank for ``blocks`` of keys and values and the one of padding.

    Where state is kept per sequence: for ``engine.max_num_seqs`` and as many snapshots as it can use.
    Measurements that stand beside a peer take no more: the rest of a GPU is the peer's.
    """
    dtype: torch.dtype = getattr(torch, engine.dtype)
    plan = plan_rank(config, 0, tp_size, dtype, None)
    slots = (1 + SNAPSHOTS_PER_SEQUENCE) * engine.max_num_seqs + 1
    return (blocks + 1) * engine.block_size * plan.kv_per_token + slots * plan.state_per_slot


def require_length(config: ModelConfig, settings: EngineConfig, tokens: int) -> None:
    """Raises ConfigError when a sequence of ``tokens`` is longer than model or engine allow."""
    longest = settings.resolve_max_model_len(config)
    if tokens > longest:
        raise ConfigError(
            f"this measurement needs sequences of {tokens} tokens; the longest here is {longest}",
            hint="another --model, or a larger engine.max_model_len",
        )


def greedy(prompt: list[int], max_tokens: int) -> Request:
    """A request for exactly ``max_tokens`` tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(prompt, params, max_tokens, seed=0)


def run_requests(engine: LLMEngine, requests: Iterable[Request]) -> list[Sequence]:
    """Add all at once and step until they have ended."""
    sequences = [sequence for request in requests for sequence in engine.add(request)]
    while not engine.idle:
        engine.step()
    return sequences


def random_prompt(rng: random.Random, length: int, vocab_size: int, first_id: int = 0) -> list[int]:
    return [rng.randrange(first_id, vocab_size) for _ in range(length)]

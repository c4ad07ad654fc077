"""Sequences that decode at a given context: where a cache is paged, at once and over random values.

A prompt's blocks are entered in the block manager as if an earlier request had computed them. The engine
then finds them as it finds any shared beginning, computes the last token alone, and decodes: scheduler,
records, look-ahead and graphs are those of every day. State per sequence cannot be entered so: such a
context is computed, once if a snapshot of it stays. Knows the engine; no models and no peers.
"""

import random
import time
from collections.abc import Sequence as Listed

import torch

from tprt.bench.synthetic import greedy, random_prompt
from tprt.cache.block_manager import BlockManager, extend_block_keys
from tprt.config import EngineConfig
from tprt.distributed.vocabulary import Vocabulary
from tprt.engine.llm_engine import LLMEngine
from tprt.engine.model_runner import ModelRunner
from tprt.engine.scheduler import SNAPSHOT_TOKENS
from tprt.engine.sequence import Sequence
from tprt.errors import ConfigError

WARM_UP_STEPS = 4


@torch.inference_mode()
def fill_cache(runner: ModelRunner, like: ModelRunner | None = None) -> None:
    """Random keys and values in every block of this rank; those of ``like``, which has as many.

    Other caches stay as they are: their contexts get computed.
    """
    if not runner.is_paged:
        return
    for layer, cache in enumerate(runner.kv_caches):
        if like is None:
            cache.kv.normal_()
        else:
            cache.kv.copy_(like.kv_caches[layer].kv)
    if runner.stream is not None:
        runner.stream.wait_stream(torch.cuda.current_stream(runner.tp.device))


def prompts_of(
    context: int, batch: int, vocab_size: int, seed: int, vocabulary: Vocabulary | None = None
) -> list[list[int]]:
    """Prompts of which ``context`` tokens are to be cached and one is to be computed.

    Args:
        vocabulary: of a trimmed model; ids come from behind what it has removed.
    """
    rng = random.Random(f"{seed} {context} {batch}")
    first = max((last + 1 for _, last in vocabulary.removed), default=0) if vocabulary else 0
    return [random_prompt(rng, context + 1, vocab_size, first) for _ in range(batch)]


def blocks_needed(context: int, new_tokens: int, block_size: int) -> int:
    """Of one sequence: for all its tokens, and at first for one block more than its prompt, which is
    what admission asks for."""
    prompt, end = (-(-n // block_size) for n in (context + 1, context + 1 + new_tokens))
    return max(prompt + 1, end)


def make_known(blocks: BlockManager, prompts: Listed[list[int]], block_size: int) -> None:
    """Let the full blocks of ``prompts`` be found, whatever they hold."""
    held: list[list[int]] = []
    wanted: list[list[bytes]] = []
    for prompt in prompts:
        keys: list[bytes] = []
        # At least one token stays to be computed.
        extend_block_keys(keys, prompt[:-1], block_size)
        found = blocks.match(keys)
        blocks.share(found)  # or those of one prompt would make room for another's
        held.append(found)
        wanted.append(keys)
    for keys, found in zip(wanted, held, strict=True):
        missing = keys[len(found) :]
        taken = blocks.allocate(len(missing))
        for block, key in zip(taken, missing, strict=True):
            blocks.register(block, key)
        found += taken
    for found in held:
        blocks.release(found)


def start(engine: LLMEngine, prompts: Listed[list[int]], new_tokens: int) -> list[Sequence]:
    """Rank 0, within a call: sequences of ``prompts`` that decode, their contexts cached.

    Raises:
        ConfigError: the KV cache does not hold them.
    """
    if not engine.runner.is_paged:
        return _begin(engine, prompts, new_tokens + steps_to_begin(engine.config, prompts))
    size = engine.config.block_size
    need = sum(blocks_needed(len(prompt) - 1, new_tokens, size) for prompt in prompts)
    if need > engine.blocks.capacity:
        raise ConfigError(
            f"{len(prompts)} sequences of {len(prompts[0]) + new_tokens} tokens need {need} KV blocks; "
            f"there are {engine.blocks.capacity}",
            hint="a smaller --batch or --context, or a larger engine.kv_cache_memory",
        )
    make_known(engine.blocks, prompts, size)
    sequences = _begin(engine, prompts, new_tokens)
    for sequence in sequences:
        assert sequence.num_cached_tokens == (sequence.num_prompt_tokens - 1) // size * size
    return sequences


def steps_to_begin(config: EngineConfig, prompts: Listed[Listed[int]]) -> int:
    """Most steps that computing all ``prompts`` takes, and so of tokens that the first one draws."""
    tokens = sum(map(len, prompts))
    # A chunk may stop short of the budget where a snapshot is due.
    return 2 * (tokens // min(config.max_num_batched_tokens, SNAPSHOT_TOKENS) + len(prompts) + 1)


def _begin(engine: LLMEngine, prompts: Listed[list[int]], new_tokens: int) -> list[Sequence]:
    """Add them, and step until each has its first token.

    A prompt that takes several steps lets those before it draw more than one: ``steps_to_begin``.
    """
    sequences = [engine.add(greedy(prompt, new_tokens))[0] for prompt in prompts]
    while any(not sequence.token_ids for sequence in sequences):
        engine.step()
    return sequences


def stop(engine: LLMEngine, sequences: list[Sequence]) -> None:
    """End sequences and let the steps in flight retire."""
    engine.abort(sequences)
    while not engine.idle:
        engine.step()


def decode_seconds(engine: LLMEngine, prompts: Listed[list[int]], steps: int) -> float:
    """Rank 0, within a call: seconds of ``steps`` decode steps of all ``prompts``.

    A step is over when its tokens are on the host. With look-ahead the next one runs by then, as it did
    when the clock was started.
    """
    sequences = start(engine, prompts, steps + WARM_UP_STEPS + 2)
    for _ in range(WARM_UP_STEPS):
        engine.step()
    before = sum(len(sequence.token_ids) for sequence in sequences)
    began = time.perf_counter()
    for _ in range(steps):
        engine.step()
    seconds = time.perf_counter() - began
    drawn = sum(len(sequence.token_ids) for sequence in sequences) - before
    assert drawn == steps * len(prompts), "every step draws a token for every sequence"
    stop(engine, sequences)
    return seconds

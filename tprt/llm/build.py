"""From a loaded model to a runner that is ready: its KV cache, warm-up, graphs, measured memory.

Knows models, ranks and settings; no checkpoints and no text.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from tprt.config import EngineConfig, ModelConfig
from tprt.distributed.tp_group import TPGroup
from tprt.engine.model_runner import ModelRunner
from tprt.kernels import kernels_for, use_kernels
from tprt.kernels.warm_up import compile_kernels
from tprt.llm.memory import MemoryPlan, agree_on_cache, compare_with_plan
from tprt.llm.startup import together
from tprt.models import CausalLM, get_model_class

Phase = Callable[[str], AbstractContextManager[object]]


def kernels_to_compile(
    config: ModelConfig, tp: TPGroup, engine: EngineConfig
) -> Callable[[], None]:
    """What compiles the kernels of this rank, on the current stream."""
    on_paper = TPGroup(tp.rank, tp.size, torch.device("meta"))
    dtype = getattr(torch, engine.dtype)
    model = get_model_class(config.model_type)(config, on_paper, dtype)
    sizes = model.kernel_sizes(engine.block_size)

    def compile_them() -> None:
        with use_kernels(*engine.kernel_choice):
            compile_kernels(kernels_for(tp.device), sizes, tp.device)

    return compile_them


def build_runner(
    model: CausalLM,
    tp: TPGroup,
    engine: EngineConfig,
    plan: MemoryPlan,
    max_model_len: int,
    num_valid: int,
    phase: Phase = nullcontext,
) -> tuple[ModelRunner, int]:
    """A runner and the number of its KV blocks, the same on every rank. Collective.

    Args:
        plan: of ``check_memory``.
        num_valid: ids from here on are padding of the vocabulary.
        phase: entered with "init", "warm-up" and "capture" around each.

    Raises:
        OutOfMemoryPlan: no room for a KV cache, or less memory than planned; on every rank.
    """
    num_blocks, num_states = agree_on_cache(tp, engine, plan, max_model_len)

    def make() -> ModelRunner:
        with use_kernels(*engine.kernel_choice), phase("init"):
            return ModelRunner(
                model,
                tp,
                getattr(torch, engine.dtype),
                num_blocks=num_blocks,
                num_states=num_states,
                block_size=engine.block_size,
                max_num_seqs=engine.max_num_seqs,
                max_model_len=max_model_len,
                num_valid=num_valid,
                enforce_eager=engine.enforce_eager,
                step_timeout=engine.step_timeout,
            )

    runner = together(tp, make)

    def prepare() -> None:
        if tp.device.type == "cuda":
            # Each stream keeps memory of its own: what loading has left cannot serve steps.
            torch.cuda.empty_cache()
        tp.progress.enter("warm-up")
        with phase("warm-up"):
            runner.warm_up(engine.max_num_batched_tokens)
        with phase("capture"):
            runner.capture()
        if tp.device.type == "cuda":
            # Each capture returns unused memory to the driver; steps want theirs back, now and not
            # when somebody else has taken it.
            with phase("warm-up"):
                runner.warm_up(engine.max_num_batched_tokens)

    together(tp, prepare)
    cache = num_blocks * plan.block + num_states * plan.rank.state_per_slot
    compare_with_plan(tp, plan, cache)
    return runner, num_blocks

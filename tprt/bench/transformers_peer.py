"""Hugging Face transformers with the same weights, run as well as it can be.

Needs the package transformers (``pip install tprt[dev]``). Asks our engine for logits only, to be sure
that the weights are the same.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from tprt.bench.report import Run, Say
from tprt.bench.synthetic import random_tensor, zeros_bias
from tprt.config import ModelConfig, PersimmonConfig
from tprt.engine.llm_engine import LLMEngine
from tprt.engine.sequence import Request
from tprt.errors import ConfigError, TprtError
from tprt.sampling_params import SamplingParams

NEVER_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
MOST_SECONDS = 120.0  # for continuous batching, which may wait for ever
MOST_DIFFERENCE = 0.5  # bfloat16 rounds differently in the two; other weights differ by several
Work = Sequence[tuple[list[int], int]]  # prompt ids and how many to generate


class TransformersPeer:
    """Args:
    config, dtype, seed, zeros: as given to ``synthetic.random_model``.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        zeros: float | None = None,
    ) -> None:
        if isinstance(config, PersimmonConfig) and config.qk_layernorm == "per_head":
            raise ConfigError(
                "transformers has no q/k LayerNorm per head", hint="a model with one per layer"
            )
        try:
            transformers: Any = import_module("transformers")
        except ImportError:
            raise ConfigError(
                "transformers is not installed", hint="pip install transformers, or leave --vs out"
            ) from None
        transformers.logging.set_verbosity_error()
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        theirs = transformers.AutoConfig.for_model(**config.to_hf() | NEVER_ENDS)
        with torch.device("meta"):
            model: Any = transformers.AutoModelForCausalLM.from_config(theirs)
        model = model.eval().to(dtype).to_empty(device=device)
        model.tie_weights()
        for name, parameter in model.named_parameters():
            parameter.data.copy_(random_tensor(name, tuple(parameter.shape), seed, device))
        _restore_buffers(model, theirs)
        self.model, self.device, self.package = model, device, transformers
        self.config = config
        if zeros is not None:
            self.set_zeros(zeros)

    @torch.no_grad()
    def set_zeros(self, zeros: float) -> None:
        """As ``synthetic.set_zeros``."""
        for layer in self.model.model.layers:
            layer.mlp.dense_h_to_4h.bias.fill_(zeros_bias(self.config, zeros))

    @torch.inference_mode()
    def logit_difference(self, engine: LLMEngine, ids: list[int]) -> float:
        """Largest difference of our logits to theirs over ``ids``, in standard deviations of theirs.

        Ids that our vocabulary leaves out are not compared.

        Raises:
            TprtError: it is too large for the rounding of one and the same model.
        """
        (sequence,) = engine.add(Request(ids, SamplingParams(), 0, seed=0), wants_logits=True)
        while not engine.idle:
            engine.step()
        theirs = self.model(torch.tensor([ids], device=self.device)).logits[0].float().cpu()
        kept = torch.from_numpy(engine.runner.model.vocabulary.columns >= 0)
        found = float((torch.cat(sequence.logits) - theirs)[:, kept].abs().max() / theirs.std())
        if not found < MOST_DIFFERENCE:
            raise TprtError(
                f"transformers' logits differ from ours by {found:.2f} standard deviations, more "
                f"than {MOST_DIFFERENCE:g}: these are not the same model",
                hint="this is a bug in the comparison; no ratio is given",
            )
        return round(found, 4)

    @torch.no_grad()
    def first_token(self, prompt: list[int]) -> float:
        """Seconds of a prompt in one pass, until its first token is on the host."""
        ids = torch.tensor([prompt])
        began = time.perf_counter()
        logits = self.model(input_ids=ids.to(self.device), use_cache=True, logits_to_keep=1).logits
        logits[0, -1].argmax().item()
        return time.perf_counter() - began

    def generate(self, work: Work, batch_size: int, key: str, **options: Any) -> float:
        """Seconds for all of ``work`` in batches of like length, padded on the left.

        A batch runs until its longest completion is there. ``key``: sort by "prompt" or by "new".
        """
        order = sorted(work, key=lambda w: (len(w[0]), w[1])[:: 1 if key == "prompt" else -1])
        began = time.perf_counter()
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            longest, new = max(len(ids) for ids, _ in batch), max(n for _, n in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, (prompt, _) in enumerate(batch):
                ids[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1
            self.model.generate(
                ids.to(self.device), attention_mask=mask.to(self.device),
                max_new_tokens=new, min_new_tokens=new, do_sample=False, **options,
            )  # fmt: skip
        return time.perf_counter() - began

    def continuous(self, work: Work, max_batch_tokens: int) -> float:
        """Seconds for all of ``work`` with transformers' own continuous batching.

        Raises:
            ConfigError: this version has none, or it failed on this device.
        """
        try:
            module = import_module("transformers.generation.configuration_utils")
            make_config = module.ContinuousBatchingConfig
        except (ImportError, AttributeError):
            raise ConfigError("this transformers has no continuous batching") from None
        pages = sum(-(-(len(ids) + new) // 256) for ids, new in work) + 1
        on_gpu = self.device.type == "cuda"
        batching = make_config(
            max_batch_tokens=max_batch_tokens,
            num_blocks=pages,
            use_cuda_graph=None if on_gpu else False,  # None: as it thinks best
        )
        generation = self.package.GenerationConfig(
            do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(n for _, n in work)
        )
        done: dict[str, int] = {}
        with self.model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=batching, warmup=on_gpu
        ) as manager:
            began = time.perf_counter()
            for i, (ids, new) in enumerate(work):
                manager.add_request(ids, request_id=str(i), max_new_tokens=new)
            while len(done) < len(work) and manager.is_running():
                if time.perf_counter() - began > MOST_SECONDS:
                    break
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    done[result.request_id] = len(result.generated_tokens)
            seconds = time.perf_counter() - began
        if [done.get(str(i)) for i in range(len(work))] != [new for _, new in work]:
            raise ConfigError("transformers' continuous batching did not finish the workload")
        return seconds


def _restore_buffers(model: Any, config: Any) -> None:
    """What the models compute when they are made, and no state dict holds."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "inv_freq"):
                setattr(module, name, type(child)(config=config).to(model.device))
    if hasattr(model.model, "normalizer"):
        root = torch.tensor(config.hidden_size**0.5, dtype=torch.bfloat16)  # as where it is made
        model.model.normalizer.fill_(root)


def fastest(
    candidates: Mapping[str, Run], say: Say, warm_up: bool = False
) -> tuple[str, dict[str, float]]:
    """Run each setting; the name of the quickest, and the seconds of all that ran.

    Args:
        warm_up: run each once more before it counts, as what compiles in its first run needs.

    Raises:
        ConfigError: none ran.
    """
    seconds = {}
    for name, run in candidates.items():
        try:
            if warm_up:
                run()
            seconds[name] = round(run(), 4)
            say(f"  transformers, {name}: {seconds[name]:.3f} s")
        except Exception as error:  # whatever a version of the peer cannot do is its own affair
            text = (str(error) or type(error).__name__).splitlines()[0]
            say(f"  transformers, {name}: {text[:200]}")
    if not seconds:
        raise ConfigError("transformers ran in none of its settings", hint="leave --vs out")
    return min(seconds, key=lambda name: seconds[name]), seconds

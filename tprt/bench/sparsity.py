"""``tprt bench sparsity``: how many neurons a checkpoint's layers leave at 0, on a user's own prompts.

Three figures decide what skipping zeros can save. Zeros per layer, of prompts' tokens and of generated
ones; the neurons that fire for any row of a batch, since those are read once for all; and how evenly
they lie on ranks, since the slowest one is waited for. Prompts are completed greedily, then each text
runs once more in chunks with its activations watched: the engine stays as it is, graphs included.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tprt.bench.command import named_config
from tprt.bench.live import watched
from tprt.bench.report import Report, Say, device_name
from tprt.config import EngineConfig
from tprt.errors import ConfigError
from tprt.llm import LLM
from tprt.sampling_params import SamplingParams

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CHECKPOINT, PROMPTS = EXAMPLES / "tiny-persimmon", EXAMPLES / "prompts.jsonl"
PROMPT_KEYS = "prompt", "prompt_token_ids", "messages"

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SparsitySizes:
    """Args:
    new_tokens: generated per prompt, at most.
    batches, ranks: for which unions and their imbalance are given.
    groups: random batches of each size. rows: generated tokens to draw them from, over all prompts.
    """

    new_tokens: int = 64
    batches: Sequence[int] = (1, 2, 4, 8, 16)
    ranks: Sequence[int] = (2, 4, 8)
    groups: int = 64
    rows: int = 512


def sparsity(
    engine_config: EngineConfig,
    model: str | None,
    device: str | None,
    *,
    input_file: Path | None,
    plot: Path | None,
    options: dict[str, Any],
    sizes: SparsitySizes,
    say: Say,
) -> Report:
    """A line for each layer, and one for their mean.

    Args:
        options: of ``LLM`` beside the engine's: how to read the checkpoint and its prompts.

    Raises:
        ConfigError: there is no checkpoint or no prompt, or matplotlib is missing for ``plot``.
        OutputError: ``plot`` cannot be written.
    """
    if plot is not None:
        from tprt.bench.picture import check_picture

        check_picture(plot)
    path, prompts = _checkpoint(model), read_prompts(_prompts(input_file))
    with LLM(path, device=device, **options, **asdict(engine_config)) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=sizes.new_tokens)
        outputs = llm.generate(prompts, greedy)
        counts = [_Layer() for _ in range(llm.config.num_hidden_layers)]
        keep, rng = max(1, sizes.rows // len(prompts)), random.Random(engine_config.seed)
        for output in outputs:
            prompt = output.prompt_token_ids
            # The last token was never put in.
            ids = [*prompt, *output.outputs[0].token_ids[:-1]]
            chosen = _choose(range(len(prompt), len(ids)), keep, rng)
            for layer, fires in zip(counts, _fires(llm, ids), strict=True):
                layer.add(fires, len(prompt), chosen)
        tp, dtype = llm.tp, engine_config.dtype
    rng = random.Random(engine_config.seed)
    groups = _groups(sum(map(len, counts[0].rows)), sizes, rng)
    layers = [{"layer": i, **layer.summary(groups, sizes.ranks)} for i, layer in enumerate(counts)]
    mean = _mean(layers)
    details = {
        "prompts": len(prompts),
        "prompt_tokens": counts[0].tokens[0],
        "generated_tokens": counts[0].tokens[1],
        "layers": layers,
        "mean": mean,
    }
    for line in _table(layers, mean):
        say(line)
    if plot is not None:
        from tprt.bench.picture import draw_sparsity

        draw_sparsity(details, Path(path).name, plot)
    settings = {**asdict(sizes), "input": str(_prompts(input_file)), "plot": plot and str(plot)}
    return Report(
        "sparsity", str(path), device_name(tp.device), dtype, tp.size,
        settings=settings, details=details,
    )  # fmt: skip


def _checkpoint(model: str | None) -> str:
    if model is None and CHECKPOINT.is_dir():
        return str(CHECKPOINT)
    if model is None or named_config(model) is not None:
        what = "no checkpoint" if model is None else f"{model} has random weights"
        raise ConfigError(f"sparsity: {what}", hint="--model PATH, a checkpoint with its tokenizer")
    return model


def _prompts(input_file: Path | None) -> Path:
    if input_file is not None or PROMPTS.is_file():
        return input_file or PROMPTS
    raise ConfigError("sparsity: no prompts", hint="--input FILE.jsonl")


def read_prompts(path: Path) -> list[Any]:
    """The prompts of a JSONL file, as ``LLM.generate`` takes them; other keys are left aside.

    Raises:
        ConfigError: the file cannot be read, holds no prompt, or a line is none.
    """
    try:
        lines = path.read_text("utf-8").split("\n")  # texts may hold what else ends a line
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: {why}", hint="--input FILE.jsonl") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        keys = [key for key in PROMPT_KEYS if isinstance(record, dict) and key in record]
        if len(keys) != 1:
            raise ConfigError(
                f"{path}, line {number} is no prompt",
                hint=f"a JSON object with one of {', '.join(PROMPT_KEYS)}",
            )
        found.append({keys[0]: record[keys[0]]})
    if not found:
        raise ConfigError(f"{path} holds no prompt", hint="one JSON object per line")
    return found


def _fires(llm: LLM, ids: list[int]) -> list[Bools]:
    """Per layer, bool [T, neurons]: which fire for each of ``ids``."""
    found: list[list[Bools]] = [[] for _ in range(llm.config.num_hidden_layers)]

    def see(layer: int, activations: torch.Tensor) -> None:
        found[layer].append((activations != 0).cpu().numpy())

    with watched(llm._engine.runner.model, see):
        # Either wants every row of the last layer too; a single id has nothing to score.
        if len(ids) > 1:
            llm.score([ids])
        else:
            llm.logits(ids)
    whole = [np.concatenate(chunks) for chunks in found]
    assert all(len(rows) == len(ids) for rows in whole)
    return whole


def _choose(rows: range, count: int, rng: random.Random) -> list[int]:
    return sorted(rng.sample(rows, min(count, len(rows))))


def _groups(rows: int, sizes: SparsitySizes, rng: random.Random) -> dict[int, list[list[int]]]:
    """Random rows by size of the batch; a size for which there are too few is left out."""
    return {
        batch: [rng.sample(range(rows), batch) for _ in range(sizes.groups)]
        for batch in sizes.batches
        if batch <= rows
    }


class _Layer:
    """Counts of a layer, and which neurons fire in some of its rows.

    Attributes:
        rows: bits of generated tokens, packed, [neurons / 8] each.
    """

    def __init__(self) -> None:
        self.live, self.tokens, self.neurons = [0, 0], [0, 0], 0
        self.rows: list[npt.NDArray[np.uint8]] = []

    def add(self, fires: Bools, num_prompt: int, chosen: list[int]) -> None:
        self.neurons = fires.shape[1]
        for kind, part in enumerate((fires[:num_prompt], fires[num_prompt:])):
            self.live[kind] += int(part.sum())
            self.tokens[kind] += len(part)
        self.rows.append(np.packbits(fires[chosen], axis=1))

    def summary(self, groups: dict[int, list[list[int]]], ranks: Sequence[int]) -> dict[str, Any]:
        prompt, generated = (
            round(1 - live / (tokens * self.neurons), 4) if tokens else None
            for live, tokens in zip(self.live, self.tokens, strict=True)
        )
        bits = np.concatenate(self.rows)
        rows = np.unpackbits(bits, axis=1, count=self.neurons).astype(bool)
        batches = []
        for batch, members in groups.items():
            unions = np.stack([rows[group].any(0) for group in members])  # [groups, neurons]
            batches.append({
                "batch": batch,
                "live": round(float(unions.mean()), 4),
                # What it would be if each neuron fired by itself, as often as on average.
                "independent": round(1 - (generated or 0.0) ** batch, 4),
                "imbalance": {
                    str(size): _imbalance(unions, size) for size in ranks if not self.neurons % size
                },
            })  # fmt: skip
        return {
            "neurons": self.neurons,
            "zeros_prompt": prompt,
            "zeros_generated": generated,
            "batches": batches,
        }


def _imbalance(unions: Bools, ranks: int) -> float:
    """Live neurons of the slowest of ``ranks`` over their mean, the average over groups.

    A rank has a range of neurons, as ``ColumnParallelLinear`` cuts them.
    """
    counts = unions.reshape(len(unions), ranks, -1).sum(2)
    busy = counts[counts.any(1)]
    return round(float((busy.max(1) / busy.mean(1)).mean()), 3) if len(busy) else 1.0


def _mean(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The same figures over all layers, which have as many neurons each."""

    def mean(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: mean([value[key] for value in values]) for key in values[0]}
        if isinstance(values[0], list):
            return [mean(list(parts)) for parts in zip(*values, strict=True)]
        if all(value == values[0] for value in values):
            return values[0]
        return round(sum(values) / len(values), 4)

    found: dict[str, Any] = mean(layers)
    del found["layer"]
    return found


def _table(layers: list[dict[str, Any]], mean: dict[str, Any]) -> list[str]:
    sizes = [batch["batch"] for batch in mean["batches"]]
    ranks = list(mean["batches"][0]["imbalance"]) if sizes else []
    live, slow = 7 * len(sizes), 7 * len(ranks)
    lines = [
        f"{'':5}  {'zeros of tokens':>16}  {'live of a batch of':>{live}}  "
        f"{'slowest of ranks':>{max(slow, 16)}}",
        f"{'layer':5}  {'prompts':>7} {'new':>8}  " + "".join(f"{n:7}" for n in sizes)
        + f"  {''.join(f'{n:>7}' for n in ranks):>{max(slow, 16)}}",
    ]  # fmt: skip
    for name, found in [*((str(i), layer) for i, layer in enumerate(layers)), ("mean", mean)]:
        zeros = [found["zeros_prompt"], found["zeros_generated"]]
        shown = ["-" if share is None else f"{share:.1%}" for share in zeros]
        unions = "".join(f"{batch['live']:7.1%}" for batch in found["batches"])
        first = found["batches"][0]["imbalance"].values() if sizes else ()
        slowest = "".join(f"{value:7.2f}" for value in first)
        lines.append(f"{name:5}  {shown[0]:>7} {shown[1]:>8}  {unions}  {slowest:>{max(slow, 16)}}")
    lines.append(
        "live of a batch: neurons that at least one of so many new tokens has alive, what a step reads; "
        "slowest of ranks: live neurons of the busiest rank over the mean, one token at a time"
    )
    return lines

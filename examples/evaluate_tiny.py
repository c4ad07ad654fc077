"""Judge a checkpoint on the tasks of ``tiny_tasks.py`` with ``tprt``: exact answers, per task.

    python examples/evaluate_tiny.py
    torchrun --nproc-per-node 2 examples/evaluate_tiny.py --dtype bfloat16

An answer counts only when the whole text is right and the model ended it itself. It is also the
shortest example of ``LLM`` inside a program of one's own, with one rank or many.
"""

import argparse
import json
import os
import time
from pathlib import Path

from tiny_tasks import SHORT_TASKS, Example, chat_prompt, held_out_examples

from tprt import LLM, SamplingParams

HERE = Path(__file__).resolve().parent
SHORT_COUNT, LONG_COUNT = 200, 40
LONG_LINES = (232, 245)  # about 1,000 tokens
GREEDY = SamplingParams(temperature=0.0, max_tokens=40)


def examples() -> dict[str, list[Example]]:
    """200 held-out questions of up to 256 tokens, and 40 look-ups of about 1,000."""
    return {
        "short": held_out_examples(SHORT_TASKS, SHORT_COUNT, seed=2024),
        "long": held_out_examples(("lookup",), LONG_COUNT, seed=2025, lookup_lines=LONG_LINES),
    }


def evaluate(llm: LLM) -> tuple[dict[str, object], list[str]]:
    """Accuracy per task, and the texts themselves for comparing one run with another."""
    report: dict[str, object] = {}
    texts: list[str] = []
    for length, wanted in examples().items():
        outputs = llm.generate([chat_prompt(e.question) for e in wanted], GREEDY)
        right = [
            o.outputs[0].text.strip() == e.answer and o.outputs[0].finish_reason == "stop"
            for o, e in zip(outputs, wanted, strict=True)
        ]
        sizes = [len(o.prompt_token_ids) for o in outputs]
        report[length] = sum(right) / len(right)
        report[f"{length}_prompt_tokens"] = [min(sizes), max(sizes)]
        for task in sorted({e.task for e in wanted}):
            hits = [r for r, e in zip(right, wanted, strict=True) if e.task == task]
            report[f"{length}_{task}"] = round(sum(hits) / len(hits), 3)
        texts += [o.outputs[0].text for o in outputs]
    return report, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(HERE / "tiny-persimmon"))
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    with LLM(args.model, dtype=args.dtype) as llm:
        began = time.perf_counter()
        report, _ = evaluate(llm)
        report |= {"dtype": args.dtype, "tp": llm.tp.size}
        report["seconds"] = round(time.perf_counter() - began, 1)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

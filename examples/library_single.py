"""``LLM`` in one process: generate, stream, score.

python examples/library_single.py
"""

from pathlib import Path

from tprt import LLM, SamplingParams

MODEL = Path(__file__).resolve().parent / "tiny-persimmon"


def main() -> None:
    with LLM(MODEL, dtype="float32", max_num_seqs=8) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=32)
        messages = {"messages": [{"role": "user", "content": "Sort: moon castle drum apple"}]}
        for output in llm.generate(["human: What is 17 + 25?\n\nadept:", messages], greedy):
            print(output.outputs[0].text.strip(), f"({output.outputs[0].finish_reason})")

        print("streamed:", end="")
        for event in llm.stream("human: Reverse: lamp canoe frog cheese\n\nadept:", greedy):
            print(event.text, end="", flush=True)
        print()

        several = SamplingParams(n=3, temperature=1.5, max_tokens=8, seed=1, logprobs=1)
        (output,) = llm.generate("human: Sort: lemon canoe\n\nadept:", several)
        for completion in output.outputs:  # they share the prompt's memory
            total = sum(next(iter(entry.values())).logprob for entry in completion.logprobs or [])
            print(f"{total:8.3f} {completion.text.strip()!r}")

        ids = llm.tokenizer.encode("human: What is 2 + 2?\n\nadept: 4")
        print("log-probability of the last token:", round(llm.score([ids])[0][-1] or 0.0, 4))


if __name__ == "__main__":
    main()

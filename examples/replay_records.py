"""Write every step of a run to a file, then run the file again: the same tokens, without a scheduler.

python examples/replay_records.py
torchrun --nproc-per-node 2 examples/replay_records.py     # recorded and replayed on two ranks
"""

import os
import tempfile
from pathlib import Path

from tprt import LLM, SamplingParams

MODEL = Path(__file__).resolve().parent / "tiny-persimmon"


def main() -> None:
    path = Path(tempfile.gettempdir()) / f"run-{os.getuid()}.tprtrec"
    params = SamplingParams(temperature=1.0, n=2, seed=5, max_tokens=10)
    prompts = ["human: Repeat: kite horn\n\nadept:", "human: Sort: lemon canoe\n\nadept:"]
    with LLM(MODEL, dtype="float32", record_path=str(path)) as llm:
        llm.generate(prompts, params)
    with LLM(MODEL, dtype="float32") as llm:
        for call in llm.replay(path):  # empty on ranks above 0
            drawn = sum(map(len, call.tokens.values()))
            print(f"{call.name}: {drawn} tokens drawn again, differences: {call.differences}")
        if llm.tp.rank == 0:
            path.unlink()


if __name__ == "__main__":
    main()

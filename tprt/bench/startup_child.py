"""One start of ``LLM``, up to its first token, as a program of its own; prints what it took as JSON.

python -m tprt.bench.startup_child '{"model": "FOLDER", "device": "cuda", ...}'
"""

import json
import sys
import time
from typing import Any

PROMPT = list(range(2, 18))


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """Args: of ``LLM``. Times are those of the monotonic clock, which all processes share."""
    entered = time.monotonic()

    from tprt import LLM, SamplingParams

    with LLM(**arguments) as llm:
        ready = time.monotonic()
        once = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": PROMPT}], once)
        first = time.monotonic()
        assert len(output.outputs[0].token_ids) == 1
        phases = {name: round(s, 3) for name, s in llm.startup_times[0]["phases"].items()}
        return {"entered": entered, "ready": ready, "first_token": first, "phases": phases}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)

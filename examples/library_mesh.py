"""Two replicas of TP 2 inside a torchrun program that has a 2-D mesh of its own.

torchrun --nproc-per-node 4 examples/library_mesh.py
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tprt import LLM, SamplingParams

MODEL = Path(__file__).resolve().parent / "tiny-persimmon"


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(device, (2, 2), mesh_dim_names=("replica", "tp"))
    replica, tp_rank = mesh.get_local_rank("replica"), mesh.get_local_rank("tp")

    questions = [f"human: What is {a} + {b}?\n\nadept:" for a in (7, 30, 58) for b in (4, 41)]
    with LLM(MODEL, dtype="float32", group=mesh["tp"]) as llm:
        # Each replica answers its half; inside a replica only rank 0's prompts count.
        mine = questions[replica::2] if tp_rank == 0 else None
        outputs = llm.generate(mine, SamplingParams(temperature=0.0, max_tokens=8))
        answers = [output.outputs[0].text.strip() for output in outputs]

    # The program's own groups are as they were.
    everyone: list[list[str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, answers)
    if dist.get_rank() == 0:
        halves = [everyone[0] or [], everyone[2] or []]
        for i, question in enumerate(questions):
            print(question.split("\n")[0].removeprefix("human: "), halves[i % 2][i // 2])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

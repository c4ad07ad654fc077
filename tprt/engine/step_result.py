"""What a step gives, on its way from the device to the host.

Knows tensors, digests and log-probabilities; not how they came about.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tprt.distributed.progress import Progress
from tprt.engine.digest import FIELDS, check_digests
from tprt.engine.logprobs import Logprobs
from tprt.engine.transfer import Download, download


@dataclass
class StepResult:
    """What a step gave; its tensors are under way until ``check`` has returned.

    Args:
        step: number of the record.
        rows: how many drew a token.
        words: what comes to the host, first of all int64: tokens, then digests [ranks, fields of
            ``digest``].
        num_digests: words of the digests, at the end.
        timeout: seconds to wait for the device.
        logprobs: of the drawn tokens; None where no row wants any.
        prompt_logprobs: of each PROMPT_LOGPROBS row, in the order of the record.
        logits: float32 [tokens, vocab_size] on the host of each ALL_LOGITS row, in that order.
    """

    step: int
    rows: int
    words: Download
    num_digests: int
    timeout: float
    logprobs: Logprobs | None = None
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def check(self, progress: Progress) -> list[int]:
        """The tokens, once every rank is known to have computed the same step.

        Args:
            progress: of this rank; its failure ends the wait.

        Raises:
            StepTimeout: the device has not finished the step in time.
            RankMismatch: the digests differ.
        """
        progress.wait_for("the device", collective=False)
        self.words.wait(f"step {self.step}", self.timeout, progress.check)
        progress.go_on()
        words = self.words.tensors[0]
        if self.num_digests:
            check_digests(self.step, words[-self.num_digests :].view(-1, len(FIELDS)))
        return words[: self.rows].tolist()

    @classmethod
    def send(
        cls,
        step: int,
        rows: int,
        words: torch.Tensor,
        num_digests: int,
        timeout: float,
        logprobs: Logprobs | None,
        scored: Sequence[Logprobs],
    ) -> "StepResult":
        """Queue everything for the host at once, behind all that computes it.

        Args:
            words: int64 on the device; the rest as above, on the device too.
            scored: of prompts.
        """
        groups = [*([] if logprobs is None else [logprobs]), *scored]
        sent = download((words, *(tensor for group in groups for tensor in group.tensors)))
        host = sent.tensors[1:]
        found = [Logprobs(*host[4 * i : 4 * i + 4]) for i in range(len(groups))]
        first = found.pop(0) if logprobs is not None else None
        return cls(step, rows, sent, num_digests, timeout, first, found)

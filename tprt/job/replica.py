"""One replica at work: takes records, keeps its engine full, gives results. On a replica's rank 0.

Knows an LLM and a queue; no files, no journal, no other replica.
"""

import json
from typing import Any

from tprt.engine.outputs import RequestOutput
from tprt.errors import TprtError
from tprt.faults import fault_point
from tprt.job.records import Record, result_line
from tprt.job.work_queue import Inlet, Result
from tprt.llm import LLM


class Replica:
    """Args:
    number: from 0.
    shared: other replicas take from the same queue.

    Attributes:
        live_tokens: generated for records that have not finished.
    """

    def __init__(self, llm: LLM, queue: Inlet, number: int = 0, shared: bool = False) -> None:
        self.llm, self.queue, self.number = llm, queue, number
        self.window = window_of(llm.engine_config.max_num_seqs)
        # Who fills its window at once leaves nothing of a small job to the others.
        self.most_per_turn = max(1, self.window // 8) if shared else self.window
        self.live_tokens = 0
        self._records: dict[int, Record] = {}  # by request id
        self._tokens: dict[int, int] = {}

    def turn(self) -> bool:
        """Take what there is room for and run one step; whether there was anything to do."""
        busy = sum(record.params.n for record in self._records.values())
        most = min(self.window, busy + self.most_per_turn)
        while busy < most and (record := self.queue.take()) is not None:
            busy += self._begin(record)
        if not self._records:
            return False
        for event in self.llm.step():
            self._tokens[event.request_id] += len(event.token_ids)
            self.live_tokens += len(event.token_ids)
            if event.output is not None:
                record = self._records.pop(event.request_id)
                self.live_tokens -= self._tokens.pop(event.request_id)
                self.queue.give(self._result(record, event.output))
        return True

    @property
    def over(self) -> bool:
        return not self._records and self.queue.ended

    def _begin(self, record: Record) -> int:
        fault_point("record", record.id)
        if record.prompt is None:
            self.queue.give(error_result(record, self.number))
            return 0
        try:
            request = self.llm.add_request(record.prompt, record.params)
        except TprtError as error:
            self.queue.give(error_result(record.failed(error.one_line), self.number))
            return 0
        self._records[request], self._tokens[request] = record, 0
        return record.params.n

    def _result(self, record: Record, output: RequestOutput) -> Result:
        prompt_tokens = len(output.prompt_token_ids)
        tokens = sum(len(completion.token_ids) for completion in output.outputs)
        if any(completion.finish_reason == "error" for completion in output.outputs):
            dtype = self.llm.engine_config.dtype
            record = record.failed(
                f"the logits became NaN or infinite in {dtype}; "
                "bfloat16 and float32 have more range than float16"
            )
            return error_result(record, self.number)
        text = dump_line(result_line(record, output))
        return Result(record.line, text, tokens, prompt_tokens, "", self.number)


def window_of(max_num_seqs: int) -> int:
    """Sequences a replica holds: a full engine, and some to fill a slot as soon as it is free."""
    return max_num_seqs + max(2, max_num_seqs // 8)


def error_result(record: Record, replica: int = 0) -> Result:
    """The result of a record that has an ``error``."""
    text = dump_line(result_line(record, None))
    return Result(record.line, text, error=f"{record.id}: {record.error}", replica=replica)


def dump_line(line: dict[str, Any]) -> str:
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, legal as a JSON escape but not as UTF-8
        return json.dumps(line)
    return text

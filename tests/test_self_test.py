"""The start-up check of captured collectives: what it lets pass, and how it says no."""

from datetime import timedelta

import pytest
import torch
from conftest import run_ranks

from tprt.distributed import self_test
from tprt.distributed.communication import all_reduce
from tprt.distributed.self_test import check_captured_collectives
from tprt.distributed.tp_group import TPGroup, init_tp_group


def _check(kind: str, patience: float = 0.3) -> tuple[str, float, bool]:
    """On rank 1 of 2 a capture that goes wrong in the way ``kind`` names."""
    tp = init_tp_group(None, "cpu")
    aborted, wrong = [], tp.rank == 1
    TPGroup.abort = lambda self: aborted.append(self.rank)

    class Device:
        replayed = False

        def capture(self, step):
            def replay():
                step()
                self.replayed = True
                if wrong and kind == "differs":
                    step.__self__.summed[0, 7] += 1

            if wrong and kind == "refuses":
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            if wrong and kind == "fails":
                raise KeyError("something else")
            return replay

        def mark(self):
            stuck = wrong and (kind == "never starts" or (kind == "stalls" and self.replayed))
            return lambda: not stuck

    limit = timedelta(seconds=patience)
    found, reason = check_captured_collectives(tp, Device(), limit)
    # Whatever was found, the ranks can go on.
    total = all_reduce(torch.ones(3) * (found.rank + 1), found)
    result = reason, float(total[0]), bool(aborted)
    found.close()
    return result


def test_captures_that_agree_pass():
    assert run_ranks(_check, 2, "good") == [("", 3.0, False)] * 2


def test_a_difference_is_named_on_every_rank():
    reason = "rank 1: a captured all-reduce differs from the eager one"
    assert run_ranks(_check, 2, "differs") == [(reason, 3.0, False)] * 2


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("stalls", "rank 1: a captured collective did not end within 0.3 s"),
        ("never starts", "rank 1: a collective did not end within 0.3 s"),
        ("fails", "rank 1: 'something else'"),
    ],
)
def test_a_stall_ends_and_leaves_a_communicator_that_works(kind, reason):
    assert run_ranks(_check, 2, kind) == [(reason, 3.0, True)] * 2


def test_a_capture_that_is_refused_leaves_a_communicator_that_works():
    refused = "operation not permitted when stream is capturing"
    reason = f"rank 1: collectives cannot be captured: {refused}"
    assert run_ranks(_check, 2, "refuses") == [(reason, 3.0, True)] * 2


def test_what_is_compared_would_notice_a_wrong_sum():
    """The values differ between ranks, elements and rounds, and survive a float32 sum exactly."""
    assert self_test.REPLAYS > 1
    largest = (250 + 1000 * self_test.REPLAYS + 63) * 64
    assert largest < 2**24

"""Where a sequence ends, without a model: a tokenizer of one letter per id."""

import pytest

from tprt.engine.sequence import Request, Sequence
from tprt.errors import ConfigError
from tprt.kernels.noise import NON_FINITE
from tprt.sampling_params import SamplingParams

EOD = 0


class Letters:
    """Stands in for a Detokenizer: id 1 is 'a'; ids above 26 hold text back until the next id."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, ids):
        text, self.held = self.held, ""
        for i in ids:
            if i > 26:
                self.held += chr(96 + i - 26)
            elif i:
                text += chr(96 + i)
        return text

    def finish(self):
        text, self.held = self.held, ""
        return text


def feed(tokens, max_tokens=100, **params) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, **params)
    seq = Sequence(request=Request([5], params, max_tokens, 0), detokenizer=Letters())
    for token in tokens:
        if seq.append(token, {EOD}):
            break
    return seq


def ended(seq: Sequence):
    return seq.text, len(seq.token_ids), seq.finish_reason, seq.stop_reason


def test_end_of_text_is_no_text():
    assert ended(feed([1, 2, EOD, 3])) == ("ab", 3, "stop", None)


def test_ignore_eos_goes_on():
    assert ended(feed([1, EOD, 3], max_tokens=3, ignore_eos=True)) == ("ac", 3, "length", None)


@pytest.mark.parametrize("skip", [True, False])
def test_stop_token_id(skip):
    params = {"stop_token_ids": [2], "skip_special_tokens": skip}
    assert ended(feed([1, 2, 3], **params)) == ("a", 2, "stop", 2)
    kept = feed([1, 2, 3], **params, include_stop_str_in_output=True)
    assert ended(kept) == ("ab", 2, "stop", 2)


def test_logits_that_are_not_finite_end_the_sequence():
    assert ended(feed([1, 28, NON_FINITE])) == ("ab", 2, "error", None)


def test_length():
    assert ended(feed([1, 2, 3], max_tokens=2)) == ("ab", 2, "length", None)


def test_text_held_back_is_not_lost_at_the_end():
    assert feed([1, 28], max_tokens=2).text == "ab"
    assert feed([1, 28, EOD]).text == "ab"


def test_stop_string_over_several_tokens():
    assert ended(feed([1, 2, 3, 4, 5], stop="cd")) == ("ab", 4, "stop", "cd")
    kept = feed([1, 2, 3, 4, 5], stop="cd", include_stop_str_in_output=True)
    assert kept.text == "abcd"


def test_earliest_then_longest_stop_string_wins():
    assert ended(feed([1, 2, 3], stop=["b", "ab"])) == ("", 2, "stop", "ab")
    seq = feed([1, 28, 3], stop=["bc", "b"])  # "b" and "bc" arrive in one piece
    assert (seq.text, seq.stop_reason) == ("a", "bc")


def test_stop_string_in_the_last_token_is_stop_not_length():
    assert ended(feed([1, 2], max_tokens=2, stop="b")) == ("a", 2, "stop", "b")


def test_min_tokens_delays_stop_strings():
    assert ended(feed([1, 2, 3, 1, 5], stop="a", min_tokens=2)) == ("abc", 4, "stop", "a")


def test_a_stop_string_in_the_last_of_min_tokens_does_not_end():
    assert ended(feed([2, 3, 1, 2, 1, 5], stop="a", min_tokens=3)) == ("bcab", 5, "stop", "a")


def test_all_bad_parameters_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        SamplingParams(n=0, temperature=float("nan"), stop=[3], seed=2**64)
    for name in ("n is 0", "temperature", "stop must", "seed is"):
        assert name in caught.value.what

"""Noise and sampler: the distribution is right, and the draw depends on the row alone."""

import pytest
import torch

from tprt.distributed.tp_group import TPGroup
from tprt.engine.noise import NON_FINITE, arrival_seed, gumbel, sequence_key, token_table
from tprt.engine.sampler import Sampler, SamplingTensors, truncate
from tprt.engine.sequence import Request, Sequence
from tprt.sampling_params import SamplingParams

CPU = torch.device("cpu")
EOD = 3


def sequence(seed: int = 0, generated: int = 0, index: int = 0, **params) -> Sequence:
    params = SamplingParams(**{"max_tokens": 1000, **params})
    seq = Sequence(Request([1, 2], params, 1000, seed), 0, index)
    seq.token_ids = [0] * generated
    return seq


def draw(logits: torch.Tensor, sequences: list[Sequence], **sizes) -> list[int]:
    part = sizes.get("part", logits.shape[1])
    sampler = Sampler(TPGroup(), part, sizes.get("num_valid", logits.shape[1]))
    return sampler(logits.clone(), SamplingTensors.of(sequences, EOD, CPU)).tolist()


def test_noise_is_gumbel():
    """Moments and tail of 4 million draws; a wrong transform or a weak hash shows in either."""
    keys = torch.tensor([sequence_key(s, 0) for s in range(64)])
    noise = gumbel(keys, torch.arange(64), token_table(0, 65536, CPU)).double()
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.003)
    assert noise.var().item() == pytest.approx(1.64493, abs=0.01)
    for level in (2.0, 5.0, 9.0):
        expected = 1 - torch.exp(-torch.exp(torch.tensor(-level).double())).item()
        found = (noise > level).double().mean().item()
        assert found == pytest.approx(expected, rel=0.15)


def test_noise_does_not_correlate_between_neighbours():
    """Keys, positions and ids that differ by one must give unrelated noise."""
    table = token_table(0, 20000, CPU)
    base = [sequence_key(7, 0), sequence_key(7, 1), sequence_key(8, 0)]
    rows = gumbel(torch.tensor([*base, base[0]]), torch.tensor([5, 5, 5, 6]), table)
    both = torch.cat([rows, rows[:1].roll(1, 1)])
    off = torch.corrcoef(both) - torch.eye(5)
    assert off.abs().max() < 0.03


def test_noise_of_an_id_does_not_depend_on_the_cut():
    whole = gumbel(torch.tensor([123]), torch.tensor([9]), token_table(0, 640, CPU))
    parts = [
        gumbel(torch.tensor([123]), torch.tensor([9]), token_table(160 * r, 160, CPU))
        for r in range(4)
    ]
    assert torch.equal(whole, torch.cat(parts, 1))


def test_sample_follows_softmax():
    """Counts over 20,000 positions against the probabilities, in both kinds."""
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, -30.0]])
    expected = (logits[0] / 0.8).softmax(0)
    for extra in ({}, {"min_p": 1e-9}):
        rows = [sequence(seed=5, generated=i, temperature=0.8, **extra) for i in range(20000)]
        drawn = torch.tensor(draw(logits.expand(20000, 5), rows))
        found = torch.bincount(drawn, minlength=5) / 20000
        assert (found - expected).abs().max() < 0.015


def test_plain_and_full_draw_the_same_token():
    """A neighbour that asks for top-k turns the whole batch to ``full``; the row must not notice."""
    torch.manual_seed(0)
    logits = torch.randn(2, 300) * 3
    for generated in range(50):
        row = sequence(seed=9, generated=generated, temperature=1.0)
        alone = draw(logits[:1], [row])
        beside = draw(logits, [row, sequence(temperature=1.0, top_k=5)])
        assert alone[0] == beside[0]


def test_top_k_top_p_min_p_keep_what_they_say():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.0]]).repeat(6, 1)
    options = SamplingTensors.of(
        [
            sequence(temperature=1.0, top_k=2),
            sequence(temperature=1.0, top_k=1000),
            sequence(temperature=1.0, top_p=0.5),
            sequence(temperature=1.0, top_p=0.75),
            sequence(temperature=1.0, min_p=0.3),
            sequence(temperature=1.0, top_k=3, top_p=0.01),
        ],
        EOD,
        CPU,
    )
    kept = [row.isfinite().nonzero().flatten().tolist() for row in truncate(logits, options)]
    # softmax: .52 .19 .07 .03 .19; ids 1 and 4 tie and the lower one is kept first
    assert kept == [[0, 1], [0, 1, 2, 3, 4], [0], [0, 1, 4], [0, 1, 4], [0]]


def test_greedy_takes_the_lowest_id_of_a_tie():
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0]])
    assert draw(logits, [sequence(temperature=0.0)]) == [1]
    assert draw(logits, [sequence(temperature=1.0, top_k=1)]) == [1]


def test_padding_rows_are_never_drawn():
    """Rows past the vocabulary hold the largest logit here and must still lose, in both kinds."""
    logits = torch.full((64, 8), -5.0)
    logits[:, 6:] = 50.0
    for extra in ({}, {"top_k": 100}):
        rows = [sequence(generated=i, temperature=1.0, **extra) for i in range(64)]
        assert max(draw(logits, rows, num_valid=6)) < 6


def test_min_tokens_bans_the_end():
    logits = torch.zeros(2, 8)
    logits[:, EOD] = 90.0
    logits[:, 5] = 80.0
    rows = [
        sequence(temperature=0.0, min_tokens=2, generated=1, stop_token_ids=(5,)),
        sequence(temperature=0.0, min_tokens=2, generated=2, stop_token_ids=(5,)),
    ]
    assert draw(logits, rows) == [0, EOD]


def test_seeds_of_arrivals_differ():
    seeds = {arrival_seed(s, a) for s in range(20) for a in range(500)}
    assert len(seeds) == 10000
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_marked_and_its_neighbours_are_not(bad):
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 2.0], [5.0, 1.0, 2.0]])
    for params in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 1}, {"temperature": 0.0}):
        assert draw(logits, [sequence(**params)] * 3) == [2, NON_FINITE, 0]
    sampled = [sequence(temperature=1.0, top_p=0.9)] * 3
    assert draw(logits, sampled)[1] == NON_FINITE


def test_values_below_the_range_of_float32():
    """1e-40 and 1e-46 are 0 in float32: they must neither divide by zero nor mask every id."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 1.0]])
    assert draw(logits, [sequence(temperature=1e-40)]) == [2]
    assert draw(logits, [sequence(temperature=1.0, top_p=1e-46)]) == [2]

"""Noise and sampler: the distribution is right, and the draw depends on the row alone."""

import random
from dataclasses import replace

import pytest
import torch

from tprt.distributed.tp_group import TPGroup
from tprt.distributed.vocabulary import Vocabulary
from tprt.engine.record_builder import banned_ids, slot_options
from tprt.engine.sampler import DrawRows, Sampler, pack, truncate, unpack
from tprt.engine.scheduler import Row
from tprt.engine.sequence import Request, Sequence
from tprt.engine.slot_state import SlotState
from tprt.kernels.noise import NON_FINITE, arrival_seed, gumbel, sequence_key, token_table
from tprt.sampling_params import SamplingParams

CPU = torch.device("cpu")
EOD = 3


def sequence(seed: int = 0, generated: int = 0, index: int = 0, **params) -> Sequence:
    params = SamplingParams(**{"max_tokens": 1000, **params})
    seq = Sequence(request=Request([1, 2], params, 1000, seed), index=index)
    seq.ids += [0] * generated
    return seq


def draw(
    logits: torch.Tensor,
    sequences: list[Sequence],
    num_valid: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> list[int]:
    vocabulary = vocabulary or Vocabulary(logits.shape[1])
    sampler = Sampler(TPGroup(), vocabulary, vocabulary.size if num_valid is None else num_valid)
    state, rows = rows_of(sequences, vocabulary)
    logits = sampler.mask_padding(logits.clone())
    digest = torch.tensor([3, -4])
    if len(rows.bans) or any(seq.request.params.needs_whole_row for seq in sequences):
        tokens, digests = sampler.full(logits, rows, state, digest)
    else:
        tokens, digests = sampler.plain(*sampler.local_argmax(logits, rows, state), digest)
    assert digests.tolist() == [[3, -4]]
    return tokens.tolist()


def rows_of(sequences: list[Sequence], vocabulary: Vocabulary) -> tuple[SlotState, DrawRows]:
    """Each sequence in a slot of its own, about to draw its next token."""
    state = SlotState(len(sequences), 1, vocabulary.num_kept, vocabulary, CPU)
    for slot, seq in enumerate(sequences):
        state.begin(replace(slot_options(seq), slot=slot))
    bans = [
        (row, token)
        for row, seq in enumerate(sequences)
        for token in banned_ids(Row(seq, 0, seq.num_tokens, True), {EOD})
    ]
    rows = DrawRows(
        slots=torch.arange(len(sequences)),
        positions=torch.tensor([seq.num_tokens for seq in sequences]),
        bans=torch.tensor(bans, dtype=torch.int64).view(-1, 2),
        all_greedy=state.sampled.isdisjoint(range(len(sequences))),
    )
    return state, rows


def test_noise_is_gumbel():
    """Moments and tail of 4 million draws; a wrong transform or a weak hash shows in either."""
    keys = torch.tensor([sequence_key(s, 0) for s in range(64)])
    noise = gumbel(keys, torch.arange(64), token_table(torch.arange(65536))).double()
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.003)
    assert noise.var().item() == pytest.approx(1.64493, abs=0.01)
    for level in (2.0, 5.0, 9.0):
        expected = 1 - torch.exp(-torch.exp(torch.tensor(-level).double())).item()
        found = (noise > level).double().mean().item()
        assert found == pytest.approx(expected, rel=0.15)


def test_noise_does_not_correlate_between_neighbours():
    """Keys, positions and ids that differ by one must give unrelated noise."""
    table = token_table(torch.arange(20000))
    base = [sequence_key(7, 0), sequence_key(7, 1), sequence_key(8, 0)]
    rows = gumbel(torch.tensor([*base, base[0]]), torch.tensor([5, 5, 5, 6]), table)
    both = torch.cat([rows, rows[:1].roll(1, 1)])
    off = torch.corrcoef(both) - torch.eye(5)
    assert off.abs().max() < 0.03


def test_noise_of_an_id_does_not_depend_on_the_cut():
    whole = gumbel(torch.tensor([123]), torch.tensor([9]), token_table(torch.arange(640)))
    parts = [
        gumbel(torch.tensor([123]), torch.tensor([9]), token_table(ids))
        for ids in torch.arange(640).split(160)
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
    top_k = torch.tensor([2, 1000, 0, 0, 0, 3])
    top_p = torch.tensor([1.0, 1.0, 0.5, 0.75, 1.0, 0.01])
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.3, 0.0])
    left = truncate(logits, top_k, top_p, min_p)
    kept = [row.isfinite().nonzero().flatten().tolist() for row in left]
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


def test_packed_scores_compare_as_floats_and_prefer_low_ids():
    values = [-float("inf"), -3.5, -1e-30, -0.0, 1e-30, 2.0, float("inf"), float("nan")]
    scores = torch.tensor(values)
    packed = pack(scores, torch.arange(8) + 70000)
    assert packed.tolist() == sorted(packed.tolist())
    ids, finite = unpack(packed)
    assert ids.tolist() == list(range(70000, 70008))
    assert finite.tolist() == [False, True, True, True, True, True, False, False]
    tie = pack(torch.tensor([2.0, 2.0]), torch.tensor([9, 8]))
    assert tie[1] > tie[0]


def penalized(logits: torch.Tensor, prompt: list[int], drawn: list[int], p: SamplingParams):
    """Penalties and bias of one row, written out id by id."""
    out = logits.double().clone()
    for i in range(len(out)):
        if i in prompt or i in drawn:
            out[i] = out[i] / p.repetition_penalty if out[i] > 0 else out[i] * p.repetition_penalty
        out[i] -= p.frequency_penalty * drawn.count(i) + p.presence_penalty * (i in drawn)
        out[i] += dict(p.logit_bias).get(i, 0.0)
        if p.allowed_token_ids is not None and i not in p.allowed_token_ids:
            out[i] = -float("inf")
    return out.float()


@pytest.mark.parametrize("seed", range(20))
def test_penalties_and_bias_against_a_plain_reference(seed):
    """Counts are kept on the device across draws and across a preemption."""
    rng = random.Random(seed)
    p = SamplingParams(
        temperature=0.0,
        repetition_penalty=rng.choice([1.0, 0.7, 1.8]),
        presence_penalty=rng.choice([0.0, 1.5, -1.0]),
        frequency_penalty=rng.choice([0.0, 0.6]),
        logit_bias=rng.choice([None, {3: 2.5, "7": -100.0}]),
        allowed_token_ids=rng.choice([None, [1, 3, 4, 7, 9]]),
    )
    prompt, vocab = [rng.randrange(12) for _ in range(6)], 12
    seq = Sequence(request=Request(prompt, p, 1000, 0), slot=0)
    state = SlotState(2, 1, vocab, Vocabulary(vocab), CPU)
    state.begin(slot_options(seq))
    for step in range(12):
        logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(100 * seed + step))
        adjusted = state.adjust(logits, torch.tensor([0]))
        torch.testing.assert_close(adjusted[0], penalized(logits[0], prompt, seq.token_ids, p))
        token = int(adjusted.argmax())
        state.take(torch.tensor([0]), torch.tensor([token]))
        seq.ids.append(token)
        if step == 6:
            state.begin(slot_options(seq))  # the slot is taken anew, with all of its history


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.15},
        {"top_k": 4, "top_p": 0.8, "min_p": 0.05},
        {"logit_bias": {1: 1.5, 4: -2.0}},
        {"allowed_token_ids": [0, 2, 5]},
        {"repetition_penalty": 1.7, "presence_penalty": 0.4},
    ],
)
def test_chi_square_against_the_exact_distribution(options):
    """20,000 draws in ``full`` against probabilities computed in float64 from the definitions."""
    logits = torch.tensor([1.2, 0.3, -0.7, 0.9, 0.0, -1.5])
    params = SamplingParams(temperature=0.9, max_tokens=1000, **options)
    row = penalized(logits, [1, 2], [], params) / 0.9
    probabilities = row.double().softmax(0)
    probabilities[probabilities < params.min_p * probabilities.max()] = 0
    order = probabilities.argsort(descending=True, stable=True)
    keep = order[: params.top_k] if params.top_k else order
    kept = probabilities[keep] / probabilities[keep].sum()
    before = kept.cumsum(0) - kept
    keep, kept = keep[before < params.top_p], kept[before < params.top_p]
    expected = torch.zeros(6, dtype=torch.float64).index_put((keep,), kept / kept.sum())

    count = 20000
    rows = [sequence(seed=11 + i, **options, temperature=0.9) for i in range(count)]
    found = torch.bincount(torch.tensor(draw(logits.expand(count, 6), rows)), minlength=6).double()
    assert found[expected == 0].sum() == 0
    wanted = expected[expected > 0] * count
    statistic = ((found[expected > 0] - wanted) ** 2 / wanted).sum().item()
    assert statistic < 27.9  # chi-square, 5 degrees of freedom: 4e-5

import dataclasses

import pytest
import torch

from rto.batches import PairBatch, Samples, collate, micro_batches

PROMPTS = [[5], [7, 8, 9], [1, 2]]
RESPONSES = [[4, 4], [6], [3, 0, 2, 0]]  # the pad's id, 0, is also a real token


def lists(x):
    """Back to token lists, by the masks."""
    width = x.prompt_mask.shape[1]
    return (
        [row[:width][m].tolist() for row, m in zip(x.tokens, x.prompt_mask)],
        [row[width:][m].tolist() for row, m in zip(x.tokens, x.mask)],
    )


def test_prompts_are_padded_on_the_left_and_responses_on_the_right():
    x = collate(PROMPTS, RESPONSES, pad=0)
    assert x.tokens.tolist() == [[0, 0, 5, 4, 4, 0, 0], [7, 8, 9, 6, 0, 0, 0], [0, 1, 2, 3, 0, 2, 0]]
    assert x.prompt_mask.tolist() == [[False, False, True], [True] * 3, [False, True, True]]
    assert x.mask.tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert x.responses.tolist() == [[4, 4, 0, 0], [6, 0, 0, 0], [3, 0, 2, 0]]
    assert x.lengths.tolist() == [3, 4, 6]
    assert torch.equal(x.attention_mask.sum(1), x.lengths)
    assert lists(x) == (PROMPTS, RESPONSES)


def test_empty_responses_and_empty_prompts_collate():
    assert lists(collate(PROMPTS, [[], [], []], pad=0)) == (PROMPTS, [[], [], []])
    assert lists(collate([[], [], []], RESPONSES, pad=0)) == ([[], [], []], RESPONSES)


def test_trim_drops_what_is_padding_in_every_row_of_every_field():
    x = collate(PROMPTS, RESPONSES, pad=0)
    samples = Samples(**x.tensors(), ended=torch.tensor([True, False, True]))
    part = samples.rows(torch.tensor([0, 1]))
    small = part.trim()
    assert small.tokens.shape == (2, 3 + 2)
    assert lists(small) == (PROMPTS[:2], RESPONSES[:2])
    assert small.ended.tolist() == [True, False]
    one = samples.rows(torch.tensor([0])).trim()
    assert one.tokens.tolist() == [[5, 4, 4]]
    assert torch.equal(one.trim().tokens, one.tokens)


def test_what_a_sampler_says_goes_with_its_rows():
    """Log-probabilities are cut like tokens, reasons like rows; the version is one of the whole batch."""
    x = collate(PROMPTS, RESPONSES, pad=0)
    logp = torch.where(x.mask, -torch.arange(12.0).view(3, 4), float("nan"))
    told = {"sampler_logp": logp, "stopped": torch.tensor([1, 0, 2]), "version": 7}
    samples = Samples(**x.tensors(), ended=torch.tensor([True, False, True]), **told)
    small = samples.rows(torch.tensor([1, 0])).trim().to("cpu")
    assert small.sampler_logp is not None
    assert small.stopped is not None
    torch.testing.assert_close(small.sampler_logp, logp[[1, 0], :2], equal_nan=True)
    assert small.stopped.tolist() == [0, 1]
    assert small.version == 7
    assert samples.given().keys() - samples.tensors().keys() == {"version"}
    bare = Samples(**x.tensors(), ended=torch.tensor([True, False, True]))
    assert set(bare.tensors()) == {"tokens", "prompt_mask", "mask", "ended"}
    assert bare.version == 0


def test_widen_undoes_trim():
    x = collate(PROMPTS, RESPONSES, pad=0)
    wide = x.widen(9)
    assert wide.mask.shape == (3, 9)
    assert lists(wide) == (PROMPTS, RESPONSES)
    for name, tensor in wide.trim().tensors().items():
        assert torch.equal(tensor, x.tensors()[name]), name


def test_pairs_stack_chosen_above_rejected():
    pair = PairBatch(chosen=collate(PROMPTS, RESPONSES, pad=0), rejected=collate(PROMPTS, [[1], [2], [3]], pad=0))
    assert len(pair) == 3
    assert lists(pair.stacked()) == (PROMPTS * 2, [*RESPONSES, [1], [2], [3]])


def test_carriers_are_frozen():
    x = collate(PROMPTS, RESPONSES, pad=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        x.tokens = x.tokens + 1
    with pytest.raises(TypeError):
        PairBatch(x, x)  # no meaning by position


def test_carriers_check_their_shapes():
    """By the import hook of the tests: a field that does not fit the others cannot be built."""
    x = collate(PROMPTS, RESPONSES, pad=0)
    with pytest.raises(Exception, match="ended"):
        Samples(**x.tensors(), ended=torch.tensor([True, False]))


@pytest.mark.parametrize("max_tokens", [1, 10, 37, 64, 100_000])
@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_keep_the_budget_and_every_row(max_tokens, seed):
    lengths = torch.randint(0, 40, (57,), generator=torch.Generator().manual_seed(seed))
    cuts = micro_batches(lengths, max_tokens)
    assert sorted(torch.cat(cuts).tolist()) == list(range(57))
    for rows in cuts:
        assert len(rows) == 1 or len(rows) * int(lengths[rows].max()) <= max_tokens
    in_order = lengths[torch.cat(cuts)]
    assert (in_order[:-1] >= in_order[1:]).all()


def test_long_and_short_rows_do_not_share_a_micro_batch():
    """Little of a cut is padding once it is worth a pass of its own; what is shorter stays together."""
    lengths = torch.randint(30, 160, (64,), generator=torch.Generator().manual_seed(0))
    cuts = micro_batches(lengths, 16384)
    padded = torch.tensor([len(rows) * int(lengths[rows].max()) for rows in cuts])
    exist = torch.tensor([int(lengths[rows].sum()) for rows in cuts])
    assert ((exist >= 0.9 * padded) | (padded <= 512)).all()
    assert len(cuts) < 16
    assert [len(rows) for rows in micro_batches(torch.arange(1, 17), 16384)] == [16]


def test_micro_batches_are_few():
    """Rows of 10 tokens under a budget of 40: four in each."""
    assert [len(rows) for rows in micro_batches(torch.full((10,), 10), 40)] == [4, 4, 2]


@pytest.mark.parametrize("at_least", [1, 3, 6, 10])
def test_micro_batches_can_be_asked_for_more_cuts(at_least):
    lengths = torch.arange(1, 11)
    cuts = micro_batches(lengths, 30, at_least)
    assert len(cuts) == max(at_least, len(micro_batches(lengths, 30)))
    assert all(len(rows) > 0 for rows in cuts)
    assert sorted(torch.cat(cuts).tolist()) == list(range(10))


def test_more_cuts_than_rows_is_an_error():
    with pytest.raises(ValueError, match="3 rows cannot be cut into 4 micro-batches"):
        micro_batches(torch.tensor([1, 2, 3]), 100, 4)

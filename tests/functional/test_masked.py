import numpy as np
import pytest
import torch

from rto.functional.masked import last_kept, masked_mean, masked_sum, masked_var, whiten


@pytest.fixture
def padded():
    """Numbers with NaN and infinities wherever the mask is False, and the kept ones as a numpy array."""
    torch.manual_seed(0)
    mask = torch.rand(5, 7) < 0.6
    mask[2] = False
    x = torch.randn(5, 7, dtype=torch.float64) * 3 + 2
    kept = x[mask].numpy().copy()
    x[~mask] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=x.dtype).repeat(20)[: (~mask).sum()]
    return x, mask, kept


@pytest.mark.parametrize(("ours", "theirs"), [(masked_sum, np.sum), (masked_mean, np.mean), (masked_var, np.var)])
def test_statistics_are_those_of_the_kept_entries(padded, ours, theirs):
    x, mask, kept = padded
    assert ours(x, mask).item() == pytest.approx(theirs(kept), rel=1e-12)


def test_sum_along_an_axis(padded):
    x, mask, _ = padded
    rows = [x[i][mask[i]].sum().item() for i in range(len(x))]
    assert masked_sum(x, mask, dim=-1).tolist() == pytest.approx(rows, rel=1e-12)
    assert rows[2] == 0


def test_what_is_masked_out_gets_no_gradient_and_spoils_none(padded):
    x, mask, kept = padded
    x.requires_grad_()
    masked_mean(x, mask).backward()
    torch.testing.assert_close(x.grad, mask.double() / len(kept))


def test_nothing_kept_is_zero_not_nan():
    x, mask = torch.full((2, 3), torch.nan), torch.zeros(2, 3, dtype=torch.bool)
    assert masked_mean(x, mask) == 0
    assert whiten(x, mask).tolist() == [[0.0] * 3] * 2


def test_whitened_entries_have_mean_zero_and_unit_variance(padded):
    x, mask, kept = padded
    white = whiten(x, mask)
    assert (white[~mask] == 0).all()
    np.testing.assert_allclose(white[mask], (kept - kept.mean()) / kept.std(), rtol=1e-7)


def test_rewards_keep_their_mean(padded):
    x, mask, kept = padded
    scaled = whiten(x, mask, center=False)
    assert (scaled[~mask] == 0).all()
    assert scaled[mask].mean().item() == pytest.approx(kept.mean(), rel=1e-10)
    assert scaled[mask].std(correction=0).item() == pytest.approx(1.0, rel=1e-7)
    np.testing.assert_allclose(scaled[mask], whiten(x, mask)[mask] + kept.mean(), rtol=1e-10)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("cut", [1, 3, 4])
def test_two_processes_whiten_as_one(padded, on_ranks, center, cut):
    """Also when one of them (rows 2: and beyond) keeps another number of entries."""
    x, mask, _ = padded
    shards = [(x[:cut], mask[:cut]), (x[cut:], mask[cut:])]
    parts = on_ranks(lambda shard, reduce: whiten(*shard, center=center, all_reduce=reduce), shards)
    torch.testing.assert_close(torch.cat(parts), whiten(x, mask, center=center), rtol=1e-12, atol=1e-12)


def test_a_process_that_keeps_nothing_changes_nothing(padded, on_ranks):
    x, mask, kept = padded
    shards = [(x, mask), (x[2:3], mask[2:3])]
    assert not shards[1][1].any()
    for statistic, theirs in ((masked_mean, np.mean), (masked_var, np.var)):
        for value in on_ranks(lambda s, reduce, f=statistic: f(*s, all_reduce=reduce), shards):
            assert value.item() == pytest.approx(theirs(kept), rel=1e-12)


def test_variance_of_large_numbers_is_not_lost_in_rounding():
    """A one-pass E[x²] − E[x]² in fp32 is off by orders of magnitude here."""
    x = torch.tensor([[10_000.0, 10_001.0, 10_002.0, 9_999.0]])
    assert masked_var(x, torch.ones_like(x, dtype=torch.bool)).item() == pytest.approx(1.25, rel=1e-5)


def test_last_kept_is_the_last_true_of_each_row():
    torch.manual_seed(1)
    mask = torch.cat([torch.rand(50, 6) < 0.5, torch.zeros(1, 6).bool(), torch.ones(1, 6).bool()])
    for row, last in zip(mask.tolist(), last_kept(mask).tolist()):
        places = [t for t, kept in enumerate(row) if kept]
        assert [t for t, is_last in enumerate(last) if is_last] == places[-1:]

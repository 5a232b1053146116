"""Condition: row bookkeeping."""

import pytest
import torch

from tdm_r1.models.conditioning import Condition


def make(b, t, pooled=True):
    return Condition(
        torch.randn(b, t, 3), torch.arange(1, b + 1), torch.randn(b, 2) if pooled else None
    )


def test_repeat_keeps_copies_of_a_row_together():
    cond = make(2, 4)
    repeated = cond.repeat(3)
    assert len(repeated) == 6
    assert repeated.lengths_B.tolist() == [1, 1, 1, 2, 2, 2]
    assert torch.equal(repeated.tokens_BTE[2], cond.tokens_BTE[0])
    assert torch.equal(repeated.pooled_BE[3], cond.pooled_BE[1])


@pytest.mark.parametrize("index", [[2, 0], torch.tensor([2, 0]), slice(None, None, 2)])
def test_rows(index):
    picked = make(3, 4).rows(index)
    assert sorted(picked.lengths_B.tolist()) == [1, 3]


def test_cat_pads_with_zeros():
    a, b = make(1, 2, pooled=False), make(2, 5, pooled=False)
    joined = Condition.cat([a, b])
    assert joined.tokens_BTE.shape == (3, 5, 3) and joined.pooled_BE is None
    assert not joined.tokens_BTE[0, 2:].any()
    assert torch.equal(joined.tokens_BTE[1:], b.tokens_BTE)
    with pytest.raises(ValueError, match="pooled"):
        Condition.cat([a, make(1, 2)])


def test_to_casts_features_only():
    cond = make(2, 4).to(dtype=torch.bfloat16)
    assert cond.tokens_BTE.dtype == cond.pooled_BE.dtype == torch.bfloat16
    assert cond.lengths_B.dtype == torch.int64

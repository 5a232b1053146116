"""ZImageTransformer against diffusers' ZImageTransformer2DModel on random weights."""

import pytest
import torch
from diffusers import ZImageTransformer2DModel

from tdm_r1.errors import ConfigError
from tdm_r1.models.conditioning import Condition
from tdm_r1.models.zimage import ZImageConfig, ZImageTransformer
from tests.models.common import randomise, relative_error

TINY = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 4,
    "dim": 64,
    "n_layers": 3,
    "n_refiner_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 4,
    "cap_feat_dim": 24,
    "axes_dims": [4, 6, 6],
    "axes_lens": [128, 32, 32],
}
CASES = {
    "equal captions": ({}, (8, 8), [7, 7]),
    "batch 1": ({}, (8, 8), [7]),
    "no pads at all": ({}, (16, 8), [32]),
    "odd tokens, wide": ({}, (6, 10), [5, 5, 5]),
    "odd tokens, tall": ({}, (14, 2), [1]),
    "one image token": ({}, (2, 2), [33]),
    "unequal, same padded length": ({}, (6, 6), [3, 31, 12]),
    "unequal, ragged": ({}, (6, 10), [3, 40, 64]),
    "ragged, many pads": ({}, (14, 10), [65, 2]),
    "no qk norm": ({"qk_norm": False}, (8, 6), [9, 33, 1]),
    "wider than the time embedding": (
        {"dim": 320, "n_layers": 1, "n_refiner_layers": 1, "axes_dims": [16, 32, 32]},
        (6, 6),
        [9, 40],
    ),
    "other eps, theta, scale": (
        {"norm_eps": 1e-3, "rope_theta": 100.0, "t_scale": 500.0},
        (10, 6),
        [9, 33],
    ),
}


def build_pair(**changes):
    values = {**TINY, **changes}
    theirs = randomise(ZImageTransformer2DModel(**values)).eval()
    ours = ZImageTransformer(ZImageConfig.from_dict(values))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def make_batch(size, lengths, seed=1):
    """Return latents, times and captions whose padding rows are poisoned with NaN."""
    g = torch.Generator().manual_seed(seed)
    b = len(lengths)
    x = torch.randn(b, TINY["in_channels"], *size, generator=g)
    t = 1000 * torch.rand(b, generator=g)
    tokens = torch.randn(b, max(lengths) + 3, TINY["cap_feat_dim"], generator=g)
    lengths_B = torch.tensor(lengths)
    tokens[torch.arange(tokens.shape[1]) >= lengths_B[:, None]] = float("nan")
    return x, t, Condition(tokens, lengths_B)


def run_theirs(model, x, t, cond):
    """Return v = eps - x0 the way the diffusers pipeline derives it."""
    images = list(x.unsqueeze(2))
    captions = [row[:n] for row, n in zip(cond.tokens_BTE, cond.lengths_B.tolist(), strict=True)]
    out = model(images, (1000 - t) / 1000, captions, return_dict=False)[0]
    return -torch.stack(out).squeeze(2)


@pytest.mark.parametrize("changes, size, lengths", CASES.values(), ids=CASES.keys())
def test_matches_diffusers(changes, size, lengths):
    ours, theirs = build_pair(**changes)
    x, t, cond = make_batch(size, lengths)
    with torch.no_grad():
        expected = run_theirs(theirs, x, t, cond)
        assert relative_error(ours.velocity(x, t, cond), expected) <= 1e-5
        ours.freeze()
        assert relative_error(ours.velocity(x, t, cond), expected) <= 1e-5


def test_parameter_names_and_order_match():
    theirs = ZImageTransformer2DModel(**TINY)
    ours = ZImageTransformer(ZImageConfig.from_dict(TINY))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert set(ours.state_dict()) == set(theirs.state_dict())


def test_gradients_match_diffusers_and_ignore_poisoned_padding():
    ours, theirs = build_pair()
    x, t, cond = make_batch((6, 8), [5, 40])
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    (ours.velocity(x, t, cond) * g).sum().backward()
    (run_theirs(theirs, x, t, cond) * g).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, expected[name].grad) <= 1e-4, name


def test_modulation_of_all_steps_equals_per_step():
    ours, _ = build_pair()
    _, _, cond = make_batch((6, 8), [5, 40, 7])
    context = ours.context(cond, 6, 8)
    t_KB = torch.tensor([[1000.0, 900.0, 750.0, 500.0]]).T
    for _ in range(2):
        with torch.no_grad():
            table = ours.modulation(context, t_KB)
            per_row = ours.modulation(context, t_KB.expand(4, 3))
            steps = torch.stack([ours.modulation(context, t_1B[None])[0] for t_1B in t_KB])
        assert table.dtype == torch.float32
        torch.testing.assert_close(table, steps)
        torch.testing.assert_close(table.expand_as(per_row), per_row)
        ours.freeze()


def test_one_context_row_serves_a_group():
    ours, _ = build_pair()
    x, t, cond = make_batch((6, 8), [5, 40, 7])
    one = cond.rows([1])
    context = ours.context(one, 6, 8)
    with torch.no_grad():
        out = ours(x, context, ours.modulation(context, t[None, :1])[0])
        shared = ours.to_velocity(x, out)
        expected = ours.velocity(x, t[:1].expand(3), one.repeat(3))
    torch.testing.assert_close(shared, expected)


def test_a_row_does_not_depend_on_the_batch():
    ours, _ = build_pair()
    x, t, cond = make_batch((6, 8), [5, 40, 7])
    with torch.no_grad():
        together = ours.velocity(x, t, cond)
        for row in range(3):
            alone = ours.velocity(x[row, None], t[row, None], cond.rows([row]))
            torch.testing.assert_close(together[row, None], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_half_precision_stays_near_fp32(autocast):
    ours, theirs = build_pair()
    x, t, cond = make_batch((6, 8), [5, 40])
    with torch.no_grad():
        expected = run_theirs(theirs, x, t, cond)
        if autocast:
            with torch.autocast("cpu", torch.bfloat16):
                actual = ours.velocity(x, t, cond)
                theirs_half = run_theirs(theirs, x, t, cond)
        else:
            actual = ours.to(torch.bfloat16).velocity(x, t, cond)
            half = cond.to(dtype=torch.bfloat16)
            theirs_half = run_theirs(theirs.to(torch.bfloat16), x.bfloat16(), t, half)
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) <= 2 * relative_error(theirs_half.float(), expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"all_patch_size": [2, 4], "all_f_patch_size": [1, 1]}, "one spatial patch size"),
        ({"n_kv_heads": 2}, "n_kv_heads=2"),
        ({"siglip_feat_dim": 8}, "Omni"),
        ({"axes_dims": [4, 4, 4]}, "axes_dims"),
        ({"n_layer": 3}, "Did you mean 'n_layers'"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ZImageConfig.from_dict({**TINY, **changes})


def test_bad_inputs_are_refused():
    ours, _ = build_pair()
    _, _, cond = make_batch((8, 8), [3])
    with pytest.raises(ConfigError, match="height=7 must be a positive multiple of 2"):
        ours.context(cond, 7, 8)
    with pytest.raises(ConfigError, match="width=66 exceeds this model's maximum 64"):
        ours.context(cond, 8, 66)
    with pytest.raises(ConfigError, match="caption lengths"):
        ours.context(Condition(cond.tokens_BTE, torch.tensor([0])), 8, 8)
    with pytest.raises(ConfigError, match="text features are 9 wide, this model takes 24"):
        ours.context(Condition(cond.tokens_BTE[..., :9], cond.lengths_B), 8, 8)
    long = Condition(torch.zeros(1, 200, 24), torch.tensor([97]))
    with pytest.raises(ConfigError, match="caption of 97 tokens exceeds this model's maximum 96"):
        ours.context(long, 8, 8)


def test_forward_compiles_without_graph_breaks():
    ours, _ = build_pair(n_layers=2)
    x, t, cond = make_batch((6, 8), [5, 40])
    context = ours.context(cond, 6, 8)
    mod = ours.modulation(context, t[None])[0]
    explanation = torch._dynamo.explain(ours)(x, context, mod)
    assert explanation.graph_break_count == 0, explanation.break_reasons

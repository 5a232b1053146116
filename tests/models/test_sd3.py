"""SD3Transformer against diffusers' SD3Transformer2DModel on random weights."""

import copy
from dataclasses import asdict

import pytest
import torch
from diffusers import SD3Transformer2DModel

from tdm_r1.errors import ConfigError
from tdm_r1.models.conditioning import Condition
from tdm_r1.models.sd3 import SD3Config, SD3Transformer
from tests.models.common import randomise, relative_error

TINY = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 20,
    "out_channels": 4,
    "pos_embed_max_size": 12,
    "dual_attention_layers": (0, 1),
    "qk_norm": "rms_norm",
}
CASES = {
    "sd3.5": ({}, (2, 8, 8, 7)),
    "batch 1": ({}, (1, 8, 8, 7)),
    "batch 3, wide, odd tokens": ({}, (3, 6, 10, 5)),
    "tall, odd tokens": ({}, (2, 14, 2, 1)),
    "one image token": ({}, (1, 2, 2, 9)),
    "no dual layers": ({"dual_attention_layers": ()}, (3, 10, 6, 7)),
    "dual in the last block": ({"dual_attention_layers": (0, 2)}, (1, 8, 6, 3)),
    "sd3: no qk norm, no dual": ({"dual_attention_layers": (), "qk_norm": None}, (3, 6, 6, 7)),
    "dual without qk norm": ({"qk_norm": None}, (1, 6, 10, 11)),
    "one block": ({"num_layers": 1, "dual_attention_layers": ()}, (2, 8, 8, 4)),
}


def build_pair(**changes):
    values = {**TINY, **changes}
    theirs = randomise(SD3Transformer2DModel(**values)).eval()
    ours = SD3Transformer(SD3Config(**values))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def make_batch(b, height, width, num_tokens, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, TINY["in_channels"], height, width, generator=g)
    t = 1000 * torch.rand(b, generator=g)
    cond = Condition(
        torch.randn(b, num_tokens, TINY["joint_attention_dim"], generator=g),
        torch.full((b,), num_tokens),
        torch.randn(b, TINY["pooled_projection_dim"], generator=g),
    )
    return x, t, cond


def run_theirs(model, x, t, cond):
    return model(x, cond.tokens_BTE, cond.pooled_BE, t, return_dict=False)[0]


@pytest.mark.parametrize("changes, shape", CASES.values(), ids=CASES.keys())
def test_matches_diffusers(changes, shape):
    ours, theirs = build_pair(**changes)
    x, t, cond = make_batch(*shape)
    with torch.no_grad():
        expected = run_theirs(theirs, x, t, cond)
        assert relative_error(ours.velocity(x, t, cond), expected) <= 1e-5
        ours.freeze()
        assert relative_error(ours.velocity(x, t, cond), expected) <= 1e-5


def test_parameter_names_order_and_position_table_match():
    theirs = SD3Transformer2DModel(**TINY)
    ours = SD3Transformer(SD3Config(**TINY))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert torch.equal(ours.pos_embed.pos_embed, theirs.pos_embed.pos_embed)


def test_gradients_match_diffusers():
    ours, theirs = build_pair()
    x, t, cond = make_batch(2, 6, 8, 5)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    (ours.velocity(x, t, cond) * g).sum().backward()
    (run_theirs(theirs, x, t, cond) * g).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is None:
            # The last block's text output is never read: its query projection is not run at all.
            assert name.startswith("transformer_blocks.2.attn.") and "add" in name
            assert not expected[name].grad.any()
        else:
            assert relative_error(parameter.grad, expected[name].grad) <= 1e-4, name


def test_gradient_of_a_frozen_model_does_not_take_the_packed_path():
    ours, _ = build_pair()
    x, t, cond = make_batch(1, 6, 8, 5)
    ours.freeze()
    weight = ours.transformer_blocks[0].attn.to_q.weight.requires_grad_()
    ours.velocity(x, t, cond).sum().backward()
    assert weight.grad.abs().max() > 0


def test_modulation_of_all_steps_equals_per_step():
    ours, _ = build_pair()
    _, _, cond = make_batch(3, 6, 8, 5)
    context = ours.context(cond, 6, 8)
    t_KB = torch.tensor([[999.0, 899.0, 749.0, 499.0]]).T
    for _ in range(2):
        with torch.no_grad():
            table = ours.modulation(context, t_KB)
            per_row = ours.modulation(context, t_KB.expand(4, 3))
            steps = torch.stack([ours.modulation(context, t_1B[None])[0] for t_1B in t_KB])
        assert table.dtype == torch.float32
        torch.testing.assert_close(table, steps)
        torch.testing.assert_close(table, per_row)
        ours.freeze()


def test_one_context_row_serves_a_group():
    ours, _ = build_pair()
    x, t, cond = make_batch(3, 6, 8, 5)
    one = cond.rows([1])
    context = ours.context(one, 6, 8)
    with torch.no_grad():
        out = ours(x, context, ours.modulation(context, t[None, :1])[0])
        shared = ours.to_velocity(x, out)
        expected = ours.velocity(x, t[:1].expand(3), one.repeat(3))
    torch.testing.assert_close(shared, expected)


def test_packed_weights_follow_updates_casts_and_copies():
    ours, _ = build_pair()
    x, t, cond = make_batch(1, 6, 8, 5)
    other = {name: value * 1.2 for name, value in ours.state_dict().items()}
    fresh = SD3Transformer(SD3Config(**TINY))
    fresh.load_state_dict(other)
    with torch.no_grad():
        ours.freeze().load_state_dict(other)
        expected = fresh.velocity(x, t, cond)
        torch.testing.assert_close(ours.velocity(x, t, cond), expected)
        clone = copy.deepcopy(ours)
        clone.transformer_blocks[0].attn.to_q.weight.zero_()
        assert relative_error(clone.velocity(x, t, cond), expected) > 1e-3
        torch.testing.assert_close(ours.velocity(x, t, cond), expected)
        ours.to(torch.float64).to(torch.float32)
        assert ours.frozen and ours.packed
        torch.testing.assert_close(ours.velocity(x, t, cond), expected)
        ours.unfreeze()
        assert not ours.packed
        torch.testing.assert_close(ours.velocity(x, t, cond), expected)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_half_precision_stays_near_fp32(autocast):
    ours, theirs = build_pair()
    x, t, cond = make_batch(2, 8, 8, 7)
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
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
        ({"caption_projection_dim": 32}, "caption_projection_dim=32"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size"),
        ({"out_channels": 8}, "out_channels=8"),
        ({"num_layer": 3}, "Did you mean 'num_layers'"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SD3Config.from_dict({**TINY, **changes})


def test_config_of_a_diffusers_model_is_understood():
    config = SD3Config.from_dict(dict(SD3Transformer2DModel(**TINY).config))
    assert asdict(config) == {**TINY}


def test_bad_inputs_are_refused():
    ours, _ = build_pair()
    _, _, cond = make_batch(1, 8, 8, 3)
    with pytest.raises(ConfigError, match="height=7 must be a positive multiple of 2"):
        ours.context(cond, 7, 8)
    with pytest.raises(ConfigError, match="width=26 exceeds this model's maximum 24"):
        ours.context(cond, 8, 26)
    with pytest.raises(ConfigError, match="pooled"):
        ours.context(Condition(cond.tokens_BTE, cond.lengths_B), 8, 8)
    with pytest.raises(ConfigError, match="text features are 9 wide, this model takes 24"):
        ours.context(Condition(cond.tokens_BTE[..., :9], cond.lengths_B, cond.pooled_BE), 8, 8)
    with pytest.raises(ConfigError, match="backend='nope'"):
        SD3Transformer(SD3Config(**TINY), backend="nope")


def test_compiles_without_graph_breaks():
    ours, _ = build_pair(num_layers=2)
    x, t, cond = make_batch(2, 6, 8, 5)
    explanation = torch._dynamo.explain(ours.velocity)(x, t, cond)
    assert explanation.graph_break_count == 0, explanation.break_reasons

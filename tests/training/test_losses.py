"""tdm_r1.training.losses against closed forms, loops, finite differences and autograd."""

import math

import pytest
import torch

from tdm_r1 import flow
from tdm_r1.training import losses

P, G = 3, 4
SHAPE = (P * G, 2, 3, 5)  # B C h w


def randn(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or SHAPE, generator=generator, dtype=torch.float64)


def gradient(loss, tensor):
    return torch.autograd.grad(loss, tensor, retain_graph=True)[0]


def mean_rows(x):
    return x.flatten(1).mean(1)


def test_flow_matching_is_zero_at_the_true_velocity_and_follows_its_closed_form():
    x0, eps, v = randn(0), randn(1), randn(2).requires_grad_()
    assert losses.flow_matching_loss(eps - x0, x0, eps)[0] == 0
    loss, metrics = losses.flow_matching_loss(v, x0, eps)
    torch.testing.assert_close(loss, ((v - (eps - x0)) ** 2).mean())
    torch.testing.assert_close(gradient(loss, v), 2 * (v - eps + x0) / v.numel())
    assert metrics["sft_loss"] == loss


def test_fake_loss_follows_its_closed_form_and_moves_only_the_fake_score():
    v, x_s, x0_hat, base = (randn(i).requires_grad_() for i in range(4))
    s = torch.rand(P * G, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    loss, metrics = losses.fake_loss(v, x_s, x0_hat, s, base, drift_weight=0.02)
    target = (x_s - x0_hat) / s.view(-1, 1, 1, 1)
    torch.testing.assert_close(loss, ((v - target) ** 2).mean() + 0.02 * ((v - base) ** 2).mean())
    expected = (2 * (v - target) + 0.04 * (v - base)) / v.numel()
    torch.testing.assert_close(gradient(loss, v), expected)
    assert not any(torch.autograd.grad(loss, (x_s, x0_hat, base), allow_unused=True))
    torch.testing.assert_close(metrics["fake_score_error"], ((v - target) ** 2).mean())
    torch.testing.assert_close(metrics["fake_drift"], ((v - base) ** 2).mean())


def test_fake_score_of_a_single_point_is_learned_exactly():
    """Wherever x_s came from, the target is the velocity towards x0_hat."""
    x0_hat, x_next, eps, s = randn(0), randn(1), randn(2), 0.8
    x_s = flow.renoise(x_next, 0.5, s, eps)
    v = flow.v_from_x0(x_s, x0_hat, s)
    assert losses.fake_loss(v, x_s, x0_hat, s, v)[0] == 0


def test_advantages_have_group_means_and_the_std_of_everything():
    reward = randn(0, P, G)
    advantage, num_flat = losses.advantages(reward)
    std = math.sqrt(((reward - reward.mean()) ** 2).mean())
    for p in range(P):
        for g in range(G):
            mean = sum(reward[p]) / G
            assert advantage[p, g].item() == pytest.approx(
                (reward[p, g] - mean).item() / (std + 1e-4), rel=1e-6
            )
    assert num_flat == 0 and advantage.dtype == torch.float32


def test_groups_without_spread_are_counted_and_get_exactly_zero():
    # Thirds and tenths: their mean does not round back to themselves.
    reward = torch.tensor([[0.1] * 3, [1 / 3] * 3, [0.0, 0.5, 1.0]])
    advantage, num_flat = losses.advantages(reward)
    assert num_flat == 2
    assert (advantage[:2] == 0).all() and advantage[2, 0] < 0 < advantage[2, 2]
    advantage, num_flat = losses.advantages(torch.full((2, 3), 0.7))
    assert num_flat == 2 and (advantage == 0).all()
    assert losses.advantages(torch.tensor([[0.2], [0.9]]))[1] == 2  # groups of one


def test_advantages_are_clipped():
    reward = torch.zeros(1, 100)
    reward[0, 0] = 1.0
    assert losses.advantages(reward)[0].max() == 5
    assert losses.advantages(-reward)[0].min() == -5
    assert losses.advantages(reward, clip=2.0)[0].max() == 2


def test_advantages_ignore_what_shifts_or_scales_every_reward():
    reward = randn(0, P, G)
    advantage = losses.advantages(reward)[0]
    torch.testing.assert_close(losses.advantages(reward + 7)[0], advantage)
    torch.testing.assert_close(losses.advantages(1000 * reward)[0], advantage, rtol=2e-4, atol=0)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (4, 0), (1, 2, 3)])
def test_rewards_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"non-empty \[P, G\]"):
        losses.advantages(torch.zeros(shape))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_located(value):
    reward = torch.zeros(P, G)
    reward[2, 1] = value
    with pytest.raises(ValueError, match="sample 1 of prompt 2 is (nan|inf)"):
        losses.advantages(reward)


def surrogate_inputs(spread=1.0):
    v_star, v_base = randn(1), randn(2)
    v_sur = (v_base + spread * randn(0)).requires_grad_()
    return {
        "v_sur_BChw": v_sur,
        "v_star_BChw": v_star,
        "v_base_BChw": v_base,
        "v_ref_BChw": v_base + 0.1 * randn(3),
        "v_lag_BChw": v_sur.detach() + 0.01 * randn(4),
        "advantage_B": losses.advantages(randn(5, P, G))[0].flatten().double(),
    }


OPEN = {
    "num_groups": P,
    "j": 3,
    "num_steps": 4,
    "beta": 10.0,
    "lag_clip": None,
    "drift_limit": math.inf,
}


def test_surrogate_gradient_is_that_of_the_group_bradley_terry_likelihood():
    """beta times the gradient is that of mean_g -log sigma(R(G+) - R(G-)), R(G) = sum |A| r."""
    inputs = surrogate_inputs()
    v_sur, a = inputs["v_sur_BChw"], inputs["advantage_B"].view(P, G)
    loss, _ = losses.surrogate_loss(**inputs, **OPEN, drift_weight=0.0)

    d = mean_rows((inputs["v_star_BChw"] - v_sur) ** 2).view(P, G)
    d_ref = mean_rows((inputs["v_star_BChw"] - inputs["v_ref_BChw"]) ** 2).view(P, G)
    nll = 0.0
    for p in range(P):
        r = -10.0 / G * (d[p] - d_ref[p])
        good, bad = a[p] > 0, a[p] < 0
        margin = (a[p][good] * r[good]).sum() - (-a[p][bad] * r[bad]).sum()
        nll = nll - torch.nn.functional.logsigmoid(margin) / P
    torch.testing.assert_close(10.0 * gradient(loss, v_sur), gradient(nll, v_sur))


@pytest.mark.parametrize("j", [0, 1, 3])
def test_surrogate_loss_follows_its_closed_form(j):
    inputs = surrogate_inputs()
    loss, metrics = losses.surrogate_loss(**inputs, **{**OPEN, "j": j}, drift_weight=0.5)
    v_sur, a = inputs["v_sur_BChw"], inputs["advantage_B"]
    d = mean_rows((v_sur - inputs["v_star_BChw"]) ** 2)
    d_ref = mean_rows((inputs["v_ref_BChw"] - inputs["v_star_BChw"]) ** 2)
    expected, logits = 0.0, []
    for g in range(P):
        rows = range(g * G, (g + 1) * G)
        logits.append(10.0 / G * sum(a[i] * (d[i] - d_ref[i]) for i in rows))
        w = 1 / (1 + torch.exp(-logits[-1]))
        expected = expected + sum(w * a[i] * d[i] for i in rows) / (P * G)
    expected = (j + 1) / 4 * (expected + 0.5 * ((v_sur - inputs["v_base_BChw"]) ** 2).mean())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["surrogate_margin"], -sum(logits).detach() / P)


def test_surrogate_step_raises_good_samples_and_lowers_bad_ones():
    inputs = surrogate_inputs()
    v_sur, a = inputs["v_sur_BChw"], inputs["advantage_B"]
    loss, _ = losses.surrogate_loss(**inputs, **OPEN, drift_weight=0.0)
    moved = (v_sur - 0.1 * gradient(loss, v_sur)).detach()
    before, after = (mean_rows((v - inputs["v_star_BChw"]) ** 2) for v in (v_sur.detach(), moved))
    assert ((after < before) == (a > 0)).all()


def test_surrogate_has_no_gradient_but_through_itself():
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in surrogate_inputs().items()}
    loss, _ = losses.surrogate_loss(**inputs, **{**OPEN, "lag_clip": 1e-3, "drift_limit": 0.05})
    others = [tensor for name, tensor in inputs.items() if name != "v_sur_BChw"]
    assert not any(torch.autograd.grad(loss, others, allow_unused=True))


def test_groups_do_not_see_each_other():
    """A group's gradient is that of the group alone, but for the mean over rows."""
    inputs = surrogate_inputs()
    whole = gradient(
        losses.surrogate_loss(**inputs, **OPEN, drift_weight=0.0)[0], inputs["v_sur_BChw"]
    )
    for g in range(P):
        rows = slice(g * G, (g + 1) * G)
        alone = {name: tensor[rows] for name, tensor in inputs.items()}
        alone["v_sur_BChw"] = alone["v_sur_BChw"].detach().requires_grad_()
        loss, _ = losses.surrogate_loss(**alone, **{**OPEN, "num_groups": 1}, drift_weight=0.0)
        torch.testing.assert_close(gradient(loss, alone["v_sur_BChw"]) / P, whole[rows])


def test_equal_rewards_leave_only_the_drift_term():
    inputs = surrogate_inputs() | {"advantage_B": torch.zeros(P * G)}
    loss, metrics = losses.surrogate_loss(**inputs, **OPEN, drift_weight=0.0)
    assert loss == 0 and metrics["surrogate_group_weight"] == 0.5
    assert not gradient(loss, inputs["v_sur_BChw"]).any()


def constant(value, rows=4):
    return torch.full((rows, 1, 2, 2), float(value), dtype=torch.float64)


def gate_inputs(distances, lag=None, base=1.0):
    """v* = 0, so that a row's d is the square of its v_sur; ref = base."""
    v_sur = constant(1) * torch.tensor(distances, dtype=torch.float64).sqrt().view(-1, 1, 1, 1)
    v_lag = constant(1) * torch.tensor(lag or distances).double().sqrt().view(-1, 1, 1, 1)
    return {
        "v_sur_BChw": v_sur.requires_grad_(),
        "v_star_BChw": constant(0),
        "v_base_BChw": constant(base),
        "v_ref_BChw": constant(base),
        "v_lag_BChw": v_lag,
        "advantage_B": torch.tensor([1.0, 1.0, -1.0, -1.0]),
    }


def rows_with_gradient(inputs, **options):
    loss, metrics = losses.surrogate_loss(
        **inputs, **{**OPEN, "num_groups": 1, "drift_weight": 0.0, **options}
    )
    return gradient(loss, inputs["v_sur_BChw"]).flatten(1).any(1).tolist(), loss, metrics


def test_lag_clip_stops_what_already_moved_enough_since_the_lag_copy():
    """Rows 0 (good, improved) and 3 (bad, worsened) have had their step: exp(.2) > 1.1."""
    inputs = gate_inputs([1.0, 1.0, 1.0, 1.0], lag=[1.2, 0.8, 1.2, 0.8])
    moving, gated, metrics = rows_with_gradient(inputs, lag_clip=0.1)
    assert moving == [False, True, True, False]
    assert metrics["surrogate_stopped_by_lag"] == 0.5
    assert metrics["surrogate_stopped_by_drift"] == 0
    everyone, open_, _ = rows_with_gradient(inputs, lag_clip=None)
    assert everyone == [True] * 4
    assert gated == open_  # the value, and with it the logit's weight, is kept


def test_lag_clip_leaves_what_moved_less_than_its_range():
    inputs = gate_inputs([1.0, 1.0, 1.0, 1.0], lag=[1.05, 0.8, 1.2, 0.95])
    assert rows_with_gradient(inputs, lag_clip=0.1)[0] == [True] * 4


def test_drift_gate_stops_what_is_already_on_the_right_side_of_the_base():
    inputs = gate_inputs([0.5, 1.5, 0.5, 1.5])  # base: d = 1
    drift = ((inputs["v_sur_BChw"] - 1) ** 2).mean().item()
    moving, _, metrics = rows_with_gradient(inputs, drift_limit=0.9 * drift)
    assert moving == [False, True, True, False]
    assert metrics["surrogate_stopped_by_drift"] == 0.5
    assert metrics["surrogate_drift"].item() == pytest.approx(drift)
    assert rows_with_gradient(inputs, drift_limit=1.1 * drift)[0] == [True] * 4


def test_drift_gate_compares_with_the_base_even_when_the_reference_moves():
    inputs = gate_inputs([0.5, 1.5, 0.5, 1.5]) | {"v_ref_BChw": constant(0.1)}
    assert rows_with_gradient(inputs, drift_limit=0.0)[0] == [False, True, True, False]


def test_stopped_samples_still_feel_the_drift_term():
    inputs = gate_inputs([0.5, 0.5, 1.5, 1.5])
    moving, _, _ = rows_with_gradient(inputs, drift_limit=0.0, drift_weight=0.1)
    assert moving == [True] * 4


def test_surrogate_loss_survives_extreme_logits():
    inputs = surrogate_inputs()
    for beta in (1e4, -1e4):
        loss, _ = losses.surrogate_loss(**inputs, **{**OPEN, "beta": beta})
        assert loss.isfinite() and gradient(loss, inputs["v_sur_BChw"]).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 5}, "12 rows are not num_groups = 5 whole groups"),
        ({"num_groups": 0}, "not num_groups = 0"),
        ({"j": 4}, r"j = 4 must be in 0\.\.3"),
        ({"j": -1}, "j = -1"),
        ({"advantage_B": torch.zeros(P * G, 1)}, r"advantages must be \[12\], got \[12, 1\]"),
        ({"advantage_B": torch.zeros(P)}, r"advantages must be \[12\]"),
        ({"v_ref_BChw": torch.zeros(1, 2, 3, 5)}, "shapes differ.*v_ref"),
        ({"lag_clip": 1e-3, "v_lag_BChw": None}, "lag_clip = 0.001 needs v_lag"),
        ({"lag_clip": 1e-3, "v_lag_BChw": torch.zeros(1, 2, 3, 5)}, "shapes differ.*v_lag"),
    ],
)
def test_surrogate_refuses_what_would_broadcast_or_split_a_group(change, message):
    with pytest.raises(ValueError, match=message):
        losses.surrogate_loss(**{**surrogate_inputs(), **OPEN, **change})


def test_sft_and_fake_refuse_shapes_that_would_broadcast():
    x, one = randn(0), randn(0, 1, 2, 3, 5)
    for call in (
        lambda: losses.flow_matching_loss(x, x, one),
        lambda: losses.fake_loss(x, x, one, 0.5, x),
    ):
        with pytest.raises(ValueError, match="shapes differ"):
            call()


def test_narrow_answers_are_squared_in_fp32():
    v, x0, eps = (randn(i).bfloat16() for i in range(3))
    loss, _ = losses.flow_matching_loss(v, x0.float(), eps.float())
    assert loss.dtype == torch.float32


def test_metrics_are_detached_scalars():
    results = [
        losses.surrogate_loss(**surrogate_inputs(), **OPEN),
        losses.fake_loss(randn(0).requires_grad_(), randn(1), randn(2), 0.5, randn(3)),
    ]
    for loss, metrics in results:
        assert loss.requires_grad and loss.ndim == 0
        assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())

"""The generator's losses against closed forms, finite differences and autograd."""

import pytest
import torch

from tdm_r1 import flow
from tdm_r1.training import losses

SHAPE = (6, 2, 3, 5)  # B C h w
NUM_ROWS, NUM_ELEMENTS = SHAPE[0], 2 * 3 * 5


def randn(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def gradient(loss, tensor):
    return torch.autograd.grad(loss, tensor, retain_graph=True)[0]


def mean_rows(x):
    return x.flatten(1).mean(1)


QUERIES = ("base_c_x0", "base_u_x0", "fake_x0", "sur_c_x0", "sur_u_x0", "base_c_x0_at_r")


def generator_inputs():
    inputs = {f"{name}_BChw": randn(i + 1) for i, name in enumerate(QUERIES)}
    return {"x0_hat_BChw": randn(0).requires_grad_(), **inputs}


def terms(inputs, rl_cfg=2.5, cfg=3.5, weight_cfg=4.5):
    """(D_cfg, D_kl, D_rl, w, w') by the formulas of losses.py."""
    x0_hat = inputs["x0_hat_BChw"].detach()
    base_c, base_u, fake, sur_c, sur_u, base_r = (inputs[f"{name}_BChw"] for name in QUERIES)
    sur = sur_u + rl_cfg * (sur_c - sur_u)
    teacher = base_u + weight_cfg * (base_c - base_u)
    w, w_rl = (mean_rows((x0_hat - x).abs()) for x in (teacher, sur))
    return cfg * (base_c - base_u), base_c - fake, sur - base_r, w, w_rl


def weighted(direction, w):
    return (mean_rows(direction**2) / w).mean()


def rows(w):
    return w.view(-1, 1, 1, 1)


@pytest.mark.parametrize(("tdm_weight", "rl_weight"), [(0.3, 0.7), (0.5, 1.5)])
def test_generator_loss_and_gradient_are_the_weighted_score_differences(tdm_weight, rl_weight):
    inputs = generator_inputs()
    loss, metrics = losses.generator_loss(
        **inputs, k=1, trunc_steps=2, rl_cfg=2.5, tdm_weight=tdm_weight, rl_weight=rl_weight
    )
    d_cfg, d_kl, d_rl, w, w_rl = terms(inputs)
    expected = tdm_weight * weighted(d_cfg, w) + weighted(d_kl, w)
    expected = expected + rl_weight * weighted(d_rl, w_rl)
    torch.testing.assert_close(loss, expected)
    pull = (tdm_weight * d_cfg + d_kl) / rows(w) + rl_weight * d_rl / rows(w_rl)
    torch.testing.assert_close(
        gradient(loss, inputs["x0_hat_BChw"]), -2 * pull / NUM_ELEMENTS / NUM_ROWS
    )
    torch.testing.assert_close(metrics["generator_rl"], (d_rl**2).mean())
    torch.testing.assert_close(metrics["generator_kl"], (d_kl**2).mean())
    torch.testing.assert_close(metrics["generator_cfg"], (d_cfg**2).mean())


def test_from_trunc_steps_on_the_reward_is_dropped_and_its_queries_are_not_needed():
    inputs = generator_inputs()
    d_cfg, d_kl, _, w, _ = terms(inputs)
    for name in QUERIES[3:]:
        inputs[f"{name}_BChw"] = None
    for k in (2, 3):
        loss, metrics = losses.generator_loss(**inputs, k=k, trunc_steps=2, rl_cfg=2.5)
        torch.testing.assert_close(loss, 0.3 * (weighted(d_cfg, w) + weighted(d_kl, w)))
        torch.testing.assert_close(
            gradient(loss, inputs["x0_hat_BChw"]),
            -2 * 0.3 * (d_cfg + d_kl) / rows(w) / NUM_ELEMENTS / NUM_ROWS,
        )
        assert "generator_rl" not in metrics


def test_tdm_loss_is_distillation_without_weights_or_reward():
    inputs = generator_inputs()
    d_cfg, d_kl, _, w, _ = terms(inputs, cfg=2.0, weight_cfg=3.0)
    loss, metrics = losses.tdm_loss(*list(inputs.values())[:4], cfg=2.0, weight_cfg=3.0)
    torch.testing.assert_close(loss, weighted(d_cfg, w) + weighted(d_kl, w))
    assert metrics["generator_loss"] == loss
    torch.testing.assert_close(
        gradient(loss, inputs["x0_hat_BChw"]),
        -2 * (d_cfg + d_kl) / rows(w) / NUM_ELEMENTS / NUM_ROWS,
    )


def test_default_guidance_is_the_published_one():
    inputs = generator_inputs()
    d_cfg, d_kl, d_rl, w, w_rl = terms(inputs, rl_cfg=4.5)
    loss, _ = losses.generator_loss(**inputs, k=0, trunc_steps=4, rl_cfg=4.5)
    expected = 0.3 * weighted(d_cfg, w) + weighted(d_kl, w) + 0.7 * weighted(d_rl, w_rl)
    torch.testing.assert_close(loss, expected)


def test_generator_gradient_reaches_the_velocity_through_x0_hat_only():
    """d x0_hat / d v = -sigma; finite differences of the objective with its targets frozen."""
    inputs, x_k, sigma = generator_inputs(), randn(20), 0.75
    v = randn(21).requires_grad_()
    inputs["x0_hat_BChw"] = flow.x0_from_v(x_k, v, sigma)
    loss, _ = losses.generator_loss(**inputs, k=0, trunc_steps=4, rl_cfg=2.5)
    grad = gradient(loss, v)
    d_cfg, d_kl, d_rl, w, w_rl = terms(inputs)
    targets = [inputs["x0_hat_BChw"].detach() + d for d in (d_cfg, d_kl, d_rl)]

    def objective(v):
        x0_hat = x_k - sigma * v
        errors = [mean_rows((target - x0_hat) ** 2) for target in targets]
        return (0.3 * errors[0] / w + errors[1] / w + 0.7 * errors[2] / w_rl).mean()

    direction, h = randn(22), 1e-6
    with torch.no_grad():
        slope = (objective(v + h * direction) - objective(v - h * direction)) / (2 * h)
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-7, atol=1e-9)


def test_queries_receive_no_gradient():
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in generator_inputs().items()}
    loss, _ = losses.generator_loss(**inputs, k=0, trunc_steps=4, rl_cfg=2.5)
    others = [tensor for name, tensor in inputs.items() if name != "x0_hat_BChw"]
    assert not any(torch.autograd.grad(loss, others, allow_unused=True))


def test_weights_are_clamped_from_below():
    """Where the teacher agrees with x0_hat w would be 0; the clamp keeps the step finite."""
    x0_hat = randn(0).requires_grad_()
    same, fake = x0_hat.detach(), randn(1)
    args = (x0_hat, same, same, fake, same, same, fake)
    for loss, _ in (
        losses.generator_loss(*args, k=0, trunc_steps=4, rl_cfg=2.5, min_weight=0.01),
        losses.tdm_loss(*args[:4], min_weight=0.01),
    ):
        grad = gradient(loss, x0_hat)
        assert loss.isfinite() and grad.isfinite().all()
    torch.testing.assert_close(
        grad, -2 * (same - fake) / 0.01 / NUM_ELEMENTS / NUM_ROWS, rtol=1e-9, atol=0
    )


def test_a_perfect_generator_has_no_loss():
    x0 = randn(0).requires_grad_()
    same = x0.detach()
    loss, _ = losses.generator_loss(
        x0, same, same, same, same, same, same, k=0, trunc_steps=4, rl_cfg=4.5
    )
    assert loss == 0 and not gradient(loss, x0).any()


def test_a_small_direction_is_not_rounded_away_in_fp32():
    x0_hat = torch.full((1, 1, 1, 1), 1000.0, requires_grad=True)
    base, fake = torch.full((1, 1, 1, 1), 1e-5), torch.zeros(1, 1, 1, 1)
    loss, _ = losses.tdm_loss(x0_hat, base, base, fake)
    assert gradient(loss, x0_hat).item() == pytest.approx(-2 * 1e-5 / 1000, rel=1e-5)


@pytest.mark.parametrize("missing", QUERIES[3:])
def test_a_reward_step_without_its_queries_is_refused(missing):
    inputs = generator_inputs() | {f"{missing}_BChw": None}
    with pytest.raises(ValueError, match="k = 1 < trunc_steps = 2 needs sur_c, sur_u, base_c"):
        losses.generator_loss(**inputs, k=1, trunc_steps=2, rl_cfg=2.5)


@pytest.mark.parametrize("name", QUERIES)
def test_generator_refuses_queries_that_would_broadcast(name):
    inputs = generator_inputs()
    inputs[f"{name}_BChw"] = inputs[f"{name}_BChw"][:1]
    with pytest.raises(ValueError, match="shapes differ"):
        losses.generator_loss(**inputs, k=0, trunc_steps=4, rl_cfg=2.5)
    if name in QUERIES[:3]:
        with pytest.raises(ValueError, match="shapes differ"):
            losses.tdm_loss(*list(inputs.values())[:4])


def test_generator_metrics_are_detached_scalars():
    loss, metrics = losses.generator_loss(**generator_inputs(), k=0, trunc_steps=4, rl_cfg=2.5)
    assert loss.requires_grad and loss.ndim == 0
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


def test_weights_have_a_floor_where_generator_and_teacher_agree():
    x0, fake = randn(0).requires_grad_(), randn(1)
    same = x0.detach()
    velocities = (x0, same, same, fake, same, same, same)
    for loss, _ in (
        losses.tdm_loss(x0, same, same, fake),
        losses.generator_loss(*velocities, k=0, trunc_steps=4, rl_cfg=2.5),
    ):
        expected = -2 * (same - fake) / 1e-3 / NUM_ELEMENTS / NUM_ROWS
        torch.testing.assert_close(gradient(loss, x0), expected)


def test_the_curves_show_the_weights_that_were_used():
    inputs = generator_inputs()
    metrics = losses.generator_loss(**inputs, k=0, trunc_steps=4, rl_cfg=2.5)[1]
    *_, w_B, w_rl_B = terms(inputs)
    torch.testing.assert_close(metrics["generator_weight"], w_B.mean())
    torch.testing.assert_close(metrics["generator_rl_weight"], w_rl_B.mean())

"""tdm_r1.flow against closed forms, finite differences and the diffusers schedulers."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from tdm_r1 import flow
from tdm_r1.errors import ConfigError

SHAPE = (3, 4, 5, 2)  # B C h w
LEVELS = [(0.0, 0.3), (0.5, 0.75), (0.9, 0.95), (0.2, 1.0)]  # (s_b, s)


def randn(seed, *shape, dtype=torch.float64):
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("s", [0.25, torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)])
def test_x0_eps_and_v_are_three_views_of_one_point(s):
    x0, eps = randn(0), randn(1)
    s_rows = s.view(-1, 1, 1, 1) if isinstance(s, torch.Tensor) else s
    x, v = (1 - s_rows) * x0 + s_rows * eps, eps - x0
    torch.testing.assert_close(flow.x0_from_v(x, v, s), x0)
    torch.testing.assert_close(flow.eps_from_v(x, v, s), eps)
    torch.testing.assert_close(flow.v_from_x0(x, x0, s), v)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_shift_keeps_the_ends_and_has_an_inverse(shift):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    s = flow.shift_sigma(u, shift)
    assert s[0] == 0 and s[-1] == 1 and (s.diff() > 0).all()
    torch.testing.assert_close(flow.unshift_sigma(s, shift), u)
    assert flow.shift_sigma(0.5, 3.0) == 0.75 and flow.unshift_sigma(0.75, 3.0) == 0.5


@pytest.mark.parametrize(("s_b", "s"), LEVELS)
def test_renoise_keeps_the_marginal_of_the_flow(s_b, s):
    """The mean weight of x0 is 1 - s and the noise variance s^2, whichever level it starts from."""
    a = flow.renoise(torch.ones(1, dtype=torch.float64), s_b, s, torch.zeros(1))
    b = flow.renoise(torch.zeros(1), s_b, s, torch.ones(1, dtype=torch.float64))
    assert a.item() * (1 - s_b) == pytest.approx(1 - s, abs=1e-12)
    assert (a.item() * s_b) ** 2 + b.item() ** 2 == pytest.approx(s**2)


def test_renoise_to_its_own_level_changes_nothing():
    x, eps = randn(0), randn(1)
    torch.testing.assert_close(flow.renoise(x, 0.5, 0.5, eps), x)


def test_renoise_is_accurate_just_above_its_own_level_in_fp32():
    s_b, s = torch.tensor([0.7]), torch.tensor([0.7001])
    b = flow.renoise(torch.zeros(1, 1), s_b, s, torch.ones(1, 1)).item()
    exact = flow.renoise(
        torch.zeros(1, 1).double(), s_b.double(), s.double(), torch.ones(1, 1).double()
    )
    assert b == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize(("s_b", "s"), LEVELS[:3])
def test_renoise_velocity_is_the_derivative_of_renoise(s_b, s):
    x_b, eps, h = randn(0), randn(1), 1e-6
    ahead, behind = (flow.renoise(x_b, s_b, s + d, eps) for d in (h, -h))
    exact = flow.renoise_velocity(x_b, s_b, s, eps)
    torch.testing.assert_close(exact, (ahead - behind) / (2 * h), rtol=1e-7, atol=1e-7)


def test_renoise_velocity_agrees_with_autograd_in_s_per_row():
    x_b, eps, s_b = randn(0), randn(1), torch.tensor([0.0, 0.4, 0.8], dtype=torch.float64)
    s = torch.tensor([0.5, 0.6, 0.9], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(flow.renoise(x_b, s_b, s, eps).sum(), s)
    expected = flow.renoise_velocity(x_b, s_b, s, eps).flatten(1).sum(1)
    torch.testing.assert_close(grad, expected)


def test_renoise_velocity_from_clean_data_is_eps_minus_x0():
    x0, eps = randn(0), randn(1)
    torch.testing.assert_close(flow.renoise_velocity(x0, 0.0, 0.3, eps), eps - x0)


@pytest.mark.parametrize(("s_b", "s"), LEVELS)
def test_renoise_velocity_has_the_mean_of_eps_minus_x0_given_x_s(s_b, s):
    """x_b = (1-s_b) x0 + s_b e0; with n the noise in x_s, E[e0] = a s_b/s n and E[eps] = b/s n."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    a, b = flow.renoise(one, s_b, s, zero), flow.renoise(zero, s_b, s, one)
    from_x0 = flow.renoise_velocity((1 - s_b) * one, s_b, s, zero)
    from_noise = flow.renoise_velocity(s_b * (a * s_b / s), s_b, s, b / s)
    assert from_x0.item() == pytest.approx(-1)
    assert from_noise.item() == pytest.approx(1)


@pytest.mark.parametrize(("lower", "shift"), [(0.0, 3.0), (0.5, 3.0), (0.9, 3.0), (0.3, 1.0)])
def test_levels_are_uniform_above_the_margin_before_the_shift(lower, shift):
    s = flow.sigma_above(lower, shift, uniform(20000))
    u = flow.unshift_sigma(s.double(), shift)
    u_low = flow.unshift_sigma(lower, shift) + 0.02
    assert s.dtype == torch.float32 and s.shape == (20000,)
    assert u.min() >= u_low - 1e-6 and u.max() <= 1 + 1e-6
    deciles = torch.quantile((u - u_low) / (1 - u_low), torch.linspace(0.1, 0.9, 9).double())
    assert (deciles - torch.linspace(0.1, 0.9, 9)).abs().max() < 0.02


def test_levels_of_two_intervals_are_those_above_the_lower_one():
    below = flow.sigma_above(0.3, 3.0, uniform(20000), upper=0.6)
    u = flow.unshift_sigma(below.double(), 3.0)
    low, high = (flow.lowest_u(s, 3.0) for s in (0.3, 0.6))
    assert u.min() >= low - 1e-6 and u.max() <= high + 1e-6
    deciles = torch.quantile((u - low) / (high - low), torch.linspace(0.1, 0.9, 9).double())
    assert (deciles - torch.linspace(0.1, 0.9, 9)).abs().max() < 0.02
    with pytest.raises(ValueError, match=r"lower = 1\.0 leaves no level"):
        flow.sigma_above(0.3, 3.0, uniform(1), upper=1.0)


def test_levels_take_any_shape_and_margin():
    s = flow.sigma_above(0.5, 3.0, uniform(2, 3), margin=0.1)
    assert s.shape == (2, 3)
    ends = flow.sigma_above(0.5, 3.0, torch.tensor([0.0, 1.0]), margin=0.1)
    assert flow.unshift_sigma(ends[0], 3.0) == pytest.approx(flow.unshift_sigma(0.5, 3.0) + 0.1)
    assert ends[1] == 1


@pytest.mark.parametrize("solver", flow.SOLVERS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 4, 20, 50])
def test_every_boundary_of_every_grid_can_be_renoised(solver, steps, shift):
    x = randn(0, 1, 2, dtype=torch.float32)
    for boundary in flow.schedule(solver, steps, shift).sigmas[1:]:
        s = flow.sigma_above(boundary, shift, torch.tensor([0.0, 0.5, 1.0]))
        assert (boundary < s).all() and (s <= 1).all()
        assert flow.renoise_velocity(x, boundary, s, x).isfinite().all()


@pytest.mark.parametrize("lower", [-0.1, 1.0, 0.999])
def test_a_lower_level_without_room_above_it_is_refused(lower):
    with pytest.raises(ValueError, match=r"lower = .* leaves no level"):
        flow.sigma_above(lower, 3.0, uniform(1))


def run_ours(schedule, x, velocities):
    states, m = [], None
    for k in range(schedule.num_steps):
        x, m = schedule.step(k, x, velocities[k], m)
        states.append(x)
    return states


def run_diffusers(scheduler, x, velocities):
    states = []
    for t, v in zip(scheduler.timesteps, velocities, strict=True):
        x = scheduler.step(v, t, x, return_dict=False)[0]
        states.append(x)
    return states


def dpm_scheduler(steps, shift):
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    return scheduler


def euler_scheduler(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    return scheduler


SCHEDULERS = {"euler": euler_scheduler, "dpm2m": dpm_scheduler}


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_grids_are_those_of_diffusers_for_every_number_of_steps(solver, shift):
    for steps in range(1, flow.MAX_STEPS + 1):
        ours, theirs = flow.schedule(solver, steps, shift), SCHEDULERS[solver](steps, shift)
        assert ours.num_steps == steps and len(ours.sigmas) == steps + 1 and ours.sigmas[-1] == 0
        # Theirs are computed in fp32, ours rounded to it once: 2 ulp.
        assert ours.sigmas == pytest.approx(theirs.sigmas.tolist(), abs=2 * 2**-23)
        if solver == "dpm2m":
            assert list(ours.timesteps) == theirs.timesteps.tolist()  # truncation leaves no room
        else:
            assert ours.timesteps == pytest.approx(theirs.timesteps.tolist(), rel=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 14, 15, 28, 50])
@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_trajectories_are_those_of_diffusers(solver, steps, shift):
    x = randn(0, dtype=torch.float32)
    velocities = [randn(k + 1, dtype=torch.float32) for k in range(steps)]
    ours = run_ours(flow.schedule(solver, steps, shift), x, velocities)
    theirs = run_diffusers(SCHEDULERS[solver](steps, shift), x, velocities)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() / b.norm() < 1e-6


def test_the_published_four_step_grids():
    euler = flow.schedule("euler", 4, 3.0)
    assert euler.sigmas == pytest.approx((1, 0.9, 0.75, 0.5, 0))
    assert euler.timesteps == (1000.0, 900.0, 750.0, 500.0)
    dpm = flow.schedule("dpm2m", 4, 6.0)
    assert dpm.sigmas == pytest.approx((0.999833167, 0.947168827, 0.856897771, 0.666370213, 0))
    assert dpm.timesteps == (999.0, 947.0, 856.0, 666.0)
    expected = [0.947327, 0.052673, 0, 0.904694, 0.104297, -0.008991]
    expected += [0.777654, 0.333653, -0.111308, 0, 1, 0]
    assert [c for row in dpm.coefficients for c in row] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_the_exact_velocity_of_one_point_is_integrated_exactly(solver):
    """For data that is one point, v = (x - x0)/s, and any number of steps lands on x0."""
    x0, x = randn(0), randn(1)
    schedule, m = flow.schedule(solver, 5, 3.0), None
    for k in range(5):
        x, m = schedule.step(k, x, flow.v_from_x0(x, x0, schedule.sigmas[k]), m)
    torch.testing.assert_close(x, x0)


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_a_step_names_what_it_went_towards_and_how_its_prediction_moves_that(solver):
    schedule, m_prev = flow.schedule(solver, 5, 3.0), None
    for k in range(5):
        x, v = randn(k), randn(k + 9).requires_grad_()
        x_next, m = schedule.step(k, x, v, m_prev)
        towards = schedule.towards(k, x, x_next)
        second_order = solver == "dpm2m" and 0 < k < 4
        assert second_order or torch.allclose(towards, m)
        on_the_line = towards + schedule.sigmas[k + 1] / schedule.sigmas[k] * (x - towards)
        torch.testing.assert_close(on_the_line, x_next)
        (slope,) = torch.autograd.grad(towards.sum(), v)
        expected = -schedule.sigmas[k] * schedule.gain(k)
        torch.testing.assert_close(slope, torch.full_like(slope, expected))
        assert (schedule.gain(k) > 1) == second_order
        m_prev = m.detach()


def test_the_last_dpm_step_returns_the_prediction_bit_for_bit():
    schedule, x, v = flow.schedule("dpm2m", 4, 3.0), randn(0).float(), randn(1).float()
    x_next, m = schedule.step(3, x, v, randn(2).float())
    assert torch.equal(x_next, m)
    assert torch.equal(m, x - schedule.sigmas[3] * v)


def test_steps_run_in_fp32_and_let_gradients_through():
    for solver in flow.SOLVERS:
        x = randn(0).bfloat16()
        v = randn(1).bfloat16().requires_grad_()
        x_next, _ = flow.schedule(solver, 4, 3.0).step(0, x, v)
        assert x_next.dtype == torch.float32
        x_next.sum().backward()
        assert v.grad is not None and v.grad.abs().min() > 0


def test_a_second_order_step_without_its_memory_is_refused():
    x = randn(0)
    with pytest.raises(ValueError, match="m_prev, from step 0"):
        flow.schedule("dpm2m", 4, 3.0).step(1, x, x)


def test_a_step_outside_the_schedule_is_an_assertion():
    x = randn(0)
    for k in (-1, 4):
        with pytest.raises(AssertionError):
            flow.schedule("euler", 4, 3.0).step(k, x, x)


def test_an_unknown_solver_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'dpm2' .*euler, dpm2m.* Did you mean 'dpm2m'\?"):
        flow.schedule("dpm2", 4, 3.0)


@pytest.mark.parametrize("steps", [0, -1, 51, 2.0, True, None])
def test_steps_outside_the_range_are_refused(steps):
    with pytest.raises(ConfigError, match="steps = .* from 1 to 50"):
        flow.schedule("euler", steps, 3.0)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_a_shift_that_is_no_positive_number_is_refused(shift):
    with pytest.raises(ConfigError, match="shift = "):
        flow.schedule("euler", 4, shift)

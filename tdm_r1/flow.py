"""Flow matching, as pure maths: one equation per function, no model and no state.

Shapes: B rows, C channels, h w latent height and width, K sampling steps.
Noise levels: s = sigma in [0, 1], 1 is pure noise and 0 is data; u is sigma before the shift.

    x_s = (1 - s) x0 + s eps        v = eps - x0        x0 = x_s - s v        eps = x_s + (1 - s) v

A noise level is a float or a tensor with one value per row; `[B]` is spread over the trailing
dimensions of the latents. Nothing here changes a dtype except `Schedule.step`, which says so.
Sources: TDM (arXiv 2503.06674), TDM-R1 (arXiv 2603.07700), DPM-Solver++ (arXiv 2211.01095).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from tdm_kernels.reference import advance
from torch import Tensor

from tdm_r1.errors import ConfigError, closest

SOLVERS = ("euler", "dpm2m")
MAX_STEPS = 50
TIME_SCALE = 1000.0  # the models read t = 1000 * sigma
Level = float | Tensor
SameLevel = TypeVar("SameLevel", float, Tensor)


def shift_sigma(u: SameLevel, shift: float) -> SameLevel:
    """s = shift u / (1 + (shift - 1) u).  Any shape, [0, 1] to [0, 1]. Source: SD3, 2403.03206."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(s: SameLevel, shift: float) -> SameLevel:
    """u = s / (shift - (shift - 1) s), the inverse of `shift_sigma`.  Any shape."""
    return s / (shift - (shift - 1) * s)


def x0_from_v(x_BChw: Tensor, v_BChw: Tensor, s: Level) -> Tensor:
    """x0 = x - s v.  `s` float or [B]; returns [B, C, h, w]."""
    return x_BChw - _rows(s, x_BChw) * v_BChw


def eps_from_v(x_BChw: Tensor, v_BChw: Tensor, s: Level) -> Tensor:
    """eps = x + (1 - s) v.  `s` float or [B]; returns [B, C, h, w]."""
    return x_BChw + (1 - _rows(s, x_BChw)) * v_BChw


def v_from_x0(x_BChw: Tensor, x0_BChw: Tensor, s: Level) -> Tensor:
    """v = (x - x0) / s.  `s` float or [B], above 0; returns [B, C, h, w]."""
    return (x_BChw - x0_BChw) / _rows(s, x_BChw)


def renoise(x_b_BChw: Tensor, s_b: Level, s: Level, eps_BChw: Tensor) -> Tensor:
    """Carry a state of noise level `s_b` up to `s` with fresh noise; marginals stay the flow's.

        x_s = a x_b + b eps        a = (1 - s) / (1 - s_b)        b^2 = s^2 - (s_b a)^2

    x_b, eps: [B, C, h, w]; s_b, s: float or [B] with 0 <= s_b <= s <= 1 and s_b < 1.
    Source: TDM, written for the linear flow.
    """
    a, b = _renoise_coefficients(_rows(s_b, x_b_BChw), _rows(s, x_b_BChw))
    return a * x_b_BChw + b * eps_BChw


def renoise_velocity(x_b_BChw: Tensor, s_b: Level, s: Level, eps_BChw: Tensor) -> Tensor:
    """Velocity v* = d x_s / d s of the path `renoise` at fixed x_b and eps.

        v* = -x_b / (1 - s_b) + (eps / b) (s + s_b^2 a / (1 - s_b))

    Given x_s its mean is that of eps - x0, so it is a regression target for v; at s_b = 0 it IS
    eps - x_b. Arguments as in `renoise`, with s strictly above s_b (b > 0). Source: the authors'
    released TDM-R1 script.
    """
    s_b, s = _rows(s_b, x_b_BChw), _rows(s, x_b_BChw)
    a, b = _renoise_coefficients(s_b, s)
    return -x_b_BChw / (1 - s_b) + (eps_BChw / b) * (s + s_b**2 * a / (1 - s_b))


def lowest_u(lower: float, shift: float, margin: float = 0.02) -> float:
    """Return the lowest u of `sigma_above`, for the level `lower`: u(lower) + margin.

    Raises:
        ValueError: lower is outside [0, 1), or the margin leaves nothing to draw from.
    """
    u_lower = unshift_sigma(lower, shift) + margin
    # 1e-6: sigma_1 of a 50-step grid is one default margin below 1, give or take its fp32 rounding.
    if not 0 <= lower < 1 or u_lower > 1 + 1e-6:
        raise ValueError(
            f"lower = {lower} leaves no level above it (margin {margin}, shift {shift})"
        )
    return min(u_lower, 1.0)


def sigma_above(
    lower: float,
    shift: float,
    uniform: Tensor,
    margin: float = 0.02,
    upper: float | None = None,
) -> Tensor:
    """Levels above `lower` from numbers uniform in [0, 1), fp32, of any shape.

    u from u(lower) + margin to 1, then s = shift_sigma(u). With `upper`, only those that would not
    be drawn above it: u in [u(lower), u(upper)] + margin. Uniform in u, so that the shift alone
    decides where levels crowd; the margin keeps b of `renoise` away from 0. Source: the authors'
    script.

    Raises:
        ValueError: lower or upper is outside [0, 1), or the margin leaves nothing to draw from.
    """
    u_lower = lowest_u(lower, shift, margin)
    u_upper = 1.0 if upper is None else lowest_u(upper, shift, margin)
    return shift_sigma(u_lower + (u_upper - u_lower) * uniform, shift)


@dataclass(frozen=True)
class Schedule:
    """A K-step deterministic sampler with every coefficient a Python constant.

    sigmas: K+1 noise levels, falling, the last one 0. timesteps: K model inputs, 0..1000.
    coefficients: K triples (a, b, c) of the update, with m = x - sigma v the x0 prediction
        x' = a x + b m + c m_prev               c = 0 throughout for euler
    """

    solver: str
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    coefficients: tuple[tuple[float, float, float], ...]

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def constants(self, k: int) -> dict[str, float]:
        """Return sigma, c_x, c_m and c_prev of step k, as `Ops.solver_step` takes them."""
        assert 0 <= k < self.num_steps, (k, self.num_steps)
        c_x, c_m, c_prev = self.coefficients[k]
        return {"sigma": self.sigmas[k], "c_x": c_x, "c_m": c_m, "c_prev": c_prev}

    def step(
        self, k: int, x_BChw: Tensor, v_BChw: Tensor, m_prev_BChw: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Advance from sigmas[k] to sigmas[k + 1], given the velocity.

        x, v: [B, C, h, w], computed in fp32 (fp64 stays); m_prev: what the previous step returned.
        Returns (x_next, m).

        Raises:
            ValueError: this step is second order and m_prev is missing.
        """
        constants = self.constants(k)
        if not constants["c_prev"]:
            m_prev_BChw = None
        elif m_prev_BChw is None:
            raise ValueError(f"step {k} of dpm2m is second order: pass m_prev, from step {k - 1}")
        return advance(_at_least_fp32(x_BChw), _at_least_fp32(v_BChw), m_prev_BChw, **constants)

    def towards(self, k: int, x_BChw: Tensor, x_next_BChw: Tensor) -> Tensor:
        """Return the clean latents M that step k went towards: x' = r x + (1 - r) M, r = s'/s.

        M = m for euler and (1 + q) m - q m_prev for dpm2m: what stands for x0 in x'.
        """
        r = self.sigmas[k + 1] / self.sigmas[k]
        return (x_next_BChw - r * x_BChw) / (1 - r)

    def gain(self, k: int) -> float:
        """Return dM/dm of `towards` and the step's own prediction m: 1 for euler, 1 + q."""
        return self.coefficients[k][1] / (1 - self.sigmas[k + 1] / self.sigmas[k])


def schedule(solver: str, steps: int, shift: float) -> Schedule:
    """Build the sampling grid of `solver`.

    euler: u = 1, 1 - 1/n, ..., 1/n; t = 1000 sigma. Source: the Z-Image pipeline of diffusers.
    dpm2m: u from .999 in equal steps of .999/n; t truncated to an integer, NOT 1000 sigma.
           Source: DPMSolverMultistepScheduler with use_flow_sigmas, as the TDM release samples.

    Raises:
        ConfigError: unknown solver, steps outside 1..50, shift not positive and finite.
    """
    if solver not in SOLVERS:
        hint = closest(solver, SOLVERS)
        raise ConfigError(f"solver = {solver!r} is unknown; allowed: {', '.join(SOLVERS)}.{hint}")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise ConfigError(f"steps = {steps!r} must be a whole number from 1 to {MAX_STEPS}")
    if not (shift > 0 and math.isfinite(shift)):
        raise ConfigError(f"shift = {shift!r} must be a positive number")
    if solver == "euler":
        exact = [shift_sigma(1 - k / steps, shift) for k in range(steps)]
        sigmas = _as_fp32([*exact, 0.0])
        timesteps = tuple(_as_fp32([TIME_SCALE * s for s in exact]))
        return Schedule(solver, tuple(sigmas), timesteps, _euler_coefficients(sigmas))
    # Rounded as the scheduler's linspace is: truncation can show the last bit of u in t.
    rise = (1 / TIME_SCALE - 1) / steps
    u = [1.0 - (1.0 + k * rise if k < steps else 1 / TIME_SCALE) for k in range(steps, 0, -1)]
    exact = [shift_sigma(u_k, shift) for u_k in u]
    sigmas = _as_fp32([*exact, 0.0])
    timesteps = tuple(float(int(TIME_SCALE * s)) for s in exact)
    return Schedule(solver, tuple(sigmas), timesteps, _dpm2m_coefficients(sigmas))


def _euler_coefficients(sigmas: list[float]) -> tuple[tuple[float, float, float], ...]:
    """x' = x + (s' - s) v = r x + (1 - r) m, r = s'/s."""
    return tuple((b / a, 1 - b / a, 0.0) for a, b in itertools.pairwise(sigmas))


def _dpm2m_coefficients(sigmas: list[float]) -> tuple[tuple[float, float, float], ...]:
    """x' = r x + (1 - r) [(1 + q) m - q m_prev], r = s'/s; q = 0 on the first and the last step."""
    lam = [math.log((1 - s) / s) for s in sigmas[:-1]]  # half the log signal-to-noise ratio
    rows = []
    for k in range(len(lam)):
        r = sigmas[k + 1] / sigmas[k]
        second_order = 0 < k < len(lam) - 1
        q = (lam[k + 1] - lam[k]) / (2 * (lam[k] - lam[k - 1])) if second_order else 0.0
        rows.append((r, (1 - r) * (1 + q), -(1 - r) * q))
    return tuple(rows)


def _renoise_coefficients(s_b: Level, s: Level) -> tuple[Level, Level]:
    """(a, b) of `renoise`; b^2 = (s - s_b a)(s + s_b a), which does not cancel near s = s_b."""
    a = (1 - s) / (1 - s_b)
    b_squared = (s - s_b) / (1 - s_b) * (s + s_b * a)
    return a, b_squared**0.5


def _rows(s: Level, x: Tensor) -> Level:
    """[B] to [B, 1, ..., 1], so that it multiplies rows of x; floats and other ranks pass."""
    if isinstance(s, Tensor) and s.ndim == 1:
        return s.reshape(-1, *(1,) * (x.ndim - 1))
    return s


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _as_fp32(values: list[float]) -> list[float]:
    """Round to fp32 and back: the schedulers keep their grids in fp32, and so do we."""
    return torch.tensor(values, dtype=torch.float32).tolist()

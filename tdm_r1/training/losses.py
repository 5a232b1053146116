"""The losses of flow-matching pre-training, TDM and TDM-R1, as pure functions of tensors.

No model is called here: the caller queries the roles and passes their answers. A loss returns
`(loss, metrics)`: a 0-d tensor and a dict of detached 0-d tensors, so that nothing waits for a
device.

Shapes: P prompts (groups), G samples per group, B = P*G rows with the samples of one group
CONTIGUOUS; C channels, h w latent height and width; K sampling steps.
Noise levels, velocities and re-noising are those of `tdm_r1.flow`; sg(.) is detach().
Model answers are fp32 [B, C, h, w]; narrower ones are widened before errors are squared.
Sources: TDM (arXiv 2503.06674), TDM-R1 (arXiv 2603.07700), DGPO (arXiv 2510.08425).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_r1.flow import Level, v_from_x0

Metrics = dict[str, Tensor]


def flow_matching_loss(v_BChw: Tensor, x0_BChw: Tensor, eps_BChw: Tensor) -> tuple[Tensor, Metrics]:
    """Supervised flow matching:  L = mean (v - (eps - x0))^2.

    v (with gradient) is the model at x_s = (1 - s) x0 + s eps; all [B, C, h, w].

    Raises:
        ValueError: the three shapes differ.
    """
    _same_shape(v=v_BChw, x0=x0_BChw, eps=eps_BChw)
    loss = _squared_error(v_BChw, eps_BChw - x0_BChw).mean()
    return loss, {"sft_loss": loss.detach()}


def fake_loss(
    v_fake_BChw: Tensor,
    x_s_BChw: Tensor,
    x0_hat_BChw: Tensor,
    s: Level,
    v_base_BChw: Tensor,
    *,
    drift_weight: float = 0.02,
) -> tuple[Tensor, Metrics]:
    """Denoising score matching on the generator's own samples, held near the base.

        L_fake = mean (v_fake - (x_s - x0_hat)/s)^2 + drift_weight * mean (v_fake - v_base)^2

    v_fake (with gradient) and v_base are queried at x_s = renoise(x_{k+1}, s); all [B, C, h, w];
    s: float or [B]. Source: TDM; the drift term is the authors' released TDM-R1 script's.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(v_fake=v_fake_BChw, x_s=x_s_BChw, x0_hat=x0_hat_BChw, v_base=v_base_BChw)
    target_BChw = v_from_x0(x_s_BChw, x0_hat_BChw, s).detach()
    score = _squared_error(v_fake_BChw, target_BChw).mean()
    drift = _squared_error(v_fake_BChw, v_base_BChw.detach()).mean()
    loss = score + drift_weight * drift
    return loss, {
        "fake_loss": loss.detach(),
        "fake_score_error": score.detach(),
        "fake_drift": drift.detach(),
    }


def advantages(reward_PG: Tensor, *, clip: float = 5.0) -> tuple[Tensor, int]:
    """Rewards of ONE WHOLE iteration to advantages, and the number of groups that carry no signal.

        A = clip((r - mean of its group) / (std over ALL rewards + 1e-4), -clip, clip)

    reward_PG: [P, G], every rank's rewards together, or the std differs between ranks. The std
    is the population's. Returns (A_PG fp32, number of groups whose rewards are all equal); the A
    of such a group is exactly 0. Source: TDM-R1, the authors' released script.

    Raises:
        ValueError: not two-dimensional, empty, or a reward is not finite.
    """
    if reward_PG.ndim != 2 or reward_PG.numel() == 0:
        raise ValueError(f"rewards must be a non-empty [P, G], got {list(reward_PG.shape)}")
    r_PG = reward_PG.double()
    if not torch.isfinite(r_PG).all():
        prompt, sample = (~torch.isfinite(r_PG)).nonzero()[0].tolist()
        value = r_PG[prompt, sample].item()
        raise ValueError(f"reward of sample {sample} of prompt {prompt} is {value}, not finite")
    a_PG = (r_PG - r_PG.mean(dim=1, keepdim=True)) / (r_PG.std(unbiased=False) + 1e-4)
    # Exactly 0, not the rounding residue of the mean.
    flat_P = r_PG.amax(dim=1) == r_PG.amin(dim=1)
    a_PG = a_PG.masked_fill(flat_P[:, None], 0.0)
    return a_PG.clamp(-clip, clip).float(), int(flat_P.sum())


def surrogate_loss(
    v_sur_BChw: Tensor,
    v_star_BChw: Tensor,
    v_base_BChw: Tensor,
    v_ref_BChw: Tensor,
    v_lag_BChw: Tensor | None,
    advantage_B: Tensor,
    *,
    num_groups: int,
    j: int,
    num_steps: int,
    beta: float,
    lag_clip: float | None,
    drift_weight: float = 0.001,
    drift_limit: float = 0.05,
) -> tuple[Tensor, Metrics]:
    """Group Bradley-Terry on trajectory states: a log-ratio to a reference becomes the reward.

        d_i     = mean_elements (v* - v_sur)^2          d_ref, d_base, d_lag alike
        logit_g = beta/G sum_{i in g} A_i (d_i - d_ref_i)        w_g = sigmoid(logit_g), detached
        L_sur   = (j+1)/K * [ mean_i w_g(i) A_i d_i + drift_weight * mean (v_sur - v_base)^2 ]

    Times beta, the first term has the gradient of mean_g -log sigma(R(G+) - R(G-)), where
    R(G) = -beta/G sum_{i in G} |A_i| (d_i - d_ref_i), G+ and G- the samples of A > 0 and A < 0.
    Two gates stop a sample: it keeps its weight in the logit and loses its gradient.
        lag:   A > 0 and ratio > 1 + lag_clip, or A < 0 and ratio < 1 - lag_clip;
               ratio = exp(d_lag - d)
        drift: A > 0 and d < d_base, or A < 0 and d > d_base;
               only while mean (v_sur - v_base)^2 > drift_limit

    v_*: [B, C, h, w] at x_s = renoise(x_{j+1}, s), s and eps shared within a group; only v_sur
    keeps a gradient. v_star: `flow.renoise_velocity`; v_ref: the reference of the logit, v_base
    itself when it is frozen; v_lag: the lag copy, None when lag_clip is None. advantage_B: [B].
    j: boundary index, 0..K-1. Source: DGPO's group objective on the trajectory states of TDM-R1;
    the gates and the step weight are the authors' released script's.

    Raises:
        ValueError: shapes differ, the rows are not num_groups whole groups with one advantage
            each, j is out of range, or lag_clip comes without v_lag.
    """
    _same_shape(v_sur=v_sur_BChw, v_star=v_star_BChw, v_base=v_base_BChw, v_ref=v_ref_BChw)
    group_size = _group_size(v_sur_BChw, advantage_B, num_groups)
    if not 0 <= j < num_steps:
        raise ValueError(f"j = {j} must be in 0..{num_steps - 1}")
    a_B = advantage_B.detach().to(v_sur_BChw.device)
    d_B = _row_error(v_sur_BChw, v_star_BChw)
    with torch.no_grad():
        d_ref_B = _row_error(v_ref_BChw, v_star_BChw)
        logit_P = (
            beta / group_size * (a_B * (d_B - d_ref_B)).view(num_groups, group_size).sum(dim=1)
        )
        w_B = logit_P.sigmoid().repeat_interleave(group_size)
    drift = _squared_error(v_sur_BChw, v_base_BChw.detach()).mean()

    by_lag_B = _stopped_by_lag(d_B.detach(), v_lag_BChw, v_star_BChw, a_B, lag_clip)
    by_drift_B = _stopped_by_drift(d_B.detach(), v_base_BChw, v_star_BChw, a_B, drift > drift_limit)
    open_d_B = torch.where(by_lag_B | by_drift_B, d_B.detach(), d_B)
    loss = (j + 1) / num_steps * ((w_B * a_B * open_d_B).mean() + drift_weight * drift)
    return loss, {
        "surrogate_loss": loss.detach(),
        "surrogate_error": d_B.detach().mean(),
        "surrogate_drift": drift.detach(),
        # -logit = R(G+) - R(G-): positive once good samples outrank bad ones within a group.
        "surrogate_margin": -logit_P.mean(),
        "surrogate_group_weight": w_B.mean(),
        "surrogate_stopped_by_lag": by_lag_B.float().mean(),
        "surrogate_stopped_by_drift": by_drift_B.float().mean(),
    }


def tdm_loss(
    x0_hat_BChw: Tensor,
    base_c_x0_BChw: Tensor,
    base_u_x0_BChw: Tensor,
    fake_x0_BChw: Tensor,
    *,
    cfg: float = 3.5,
    weight_cfg: float = 4.5,
    min_weight: float = 1e-3,
) -> tuple[Tensor, Metrics]:
    """Generator loss of TDM distillation alone, no reward:  L = (|CFG|^2 + |KL|^2) / w.

    Arguments, terms and errors as in `generator_loss`. Source: TDM, with guidance and KL apart.
    """
    guidance_B, kl_B, w_B = _distillation_terms(
        x0_hat_BChw, base_c_x0_BChw, base_u_x0_BChw, fake_x0_BChw, cfg, weight_cfg, min_weight
    )
    loss = ((guidance_B + kl_B) / w_B).mean()
    return loss, _generator_metrics(loss, guidance_B, kl_B, w_B)


def generator_loss(
    x0_hat_BChw: Tensor,
    base_c_x0_BChw: Tensor,
    base_u_x0_BChw: Tensor,
    fake_x0_BChw: Tensor,
    sur_c_x0_BChw: Tensor | None,
    sur_u_x0_BChw: Tensor | None,
    base_c_x0_at_r_BChw: Tensor | None,
    *,
    k: int,
    trunc_steps: int,
    rl_cfg: float,
    tdm_weight: float = 0.3,
    rl_weight: float = 0.7,
    cfg: float = 3.5,
    weight_cfg: float = 4.5,
    min_weight: float = 1e-3,
) -> tuple[Tensor, Metrics]:
    """Generator loss of TDM-R1 at step k: reverse KL, guidance as a reward, surrogate reward.

        KL  = base_c - fake_c                    at x_s
        CFG = cfg (base_c - base_u)              at x_s
        RL  = sur_u + rl_cfg (sur_c - sur_u) - base_c        at x_r
        L   = tdm_weight |CFG|^2/w + |KL|^2/w + rl_weight |RL|^2/w'     for k < trunc_steps
        L   = tdm_weight (|CFG|^2 + |KL|^2)/w                           from trunc_steps on
        w  = mean_elements |x0_hat - base_u - weight_cfg (base_c - base_u)|
        w' = mean_elements |x0_hat - sur_u - rl_cfg (sur_c - sur_u)|
    |D|^2 = mean_elements (sg(x0_hat + D) - x0_hat)^2 per row, whose gradient in x0_hat is
    -2 D/(C h w). w and w' are per row, detached, and never below min_weight, so that a row the
    teacher already agrees with cannot explode; L is the mean over rows.

    x0_hat = x_k - sigma_k v_theta carries the only gradient; the queries are x0 predictions, all
    [B, C, h, w]. sur_c, sur_u and base_c_at_r may be None from trunc_steps on: they are not read.
    Source: TDM-R1; the split weights are the authors' released script's, where rl_weight is
    1 - tdm_weight.

    Raises:
        ValueError: shapes differ, or k < trunc_steps and a query at x_r is missing.
    """
    guidance_B, kl_B, w_B = _distillation_terms(
        x0_hat_BChw, base_c_x0_BChw, base_u_x0_BChw, fake_x0_BChw, cfg, weight_cfg, min_weight
    )
    if k >= trunc_steps:
        loss = tdm_weight * ((guidance_B + kl_B) / w_B).mean()
        return loss, _generator_metrics(loss, guidance_B, kl_B, w_B)

    if sur_c_x0_BChw is None or sur_u_x0_BChw is None or base_c_x0_at_r_BChw is None:
        raise ValueError(f"k = {k} < trunc_steps = {trunc_steps} needs sur_c, sur_u, base_c at x_r")
    _same_shape(
        x0_hat=x0_hat_BChw,
        sur_c=sur_c_x0_BChw,
        sur_u=sur_u_x0_BChw,
        base_c_at_r=base_c_x0_at_r_BChw,
    )
    sur_cfg_BChw = _guided(sur_c_x0_BChw, sur_u_x0_BChw, rl_cfg)
    rl_B = _pull(x0_hat_BChw, sur_cfg_BChw - base_c_x0_at_r_BChw)
    w_rl_B = _distance(x0_hat_BChw, sur_cfg_BChw, min_weight)
    per_row_B = (tdm_weight * guidance_B + kl_B) / w_B + rl_weight * rl_B / w_rl_B
    loss = per_row_B.mean()
    metrics = _generator_metrics(loss, guidance_B, kl_B, w_B)
    return loss, {
        **metrics,
        "generator_rl": rl_B.detach().mean(),
        "generator_rl_weight": w_rl_B.mean(),
    }


def _distillation_terms(
    x0_hat: Tensor,
    base_c: Tensor,
    base_u: Tensor,
    fake: Tensor,
    cfg: float,
    weight_cfg: float,
    min_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(|CFG|^2 [B], |KL|^2 [B], w [B]) of `generator_loss`."""
    _same_shape(x0_hat=x0_hat, base_c=base_c, base_u=base_u, fake=fake)
    guidance_B = _pull(x0_hat, cfg * (base_c - base_u))
    kl_B = _pull(x0_hat, base_c - fake)
    return guidance_B, kl_B, _distance(x0_hat, _guided(base_c, base_u, weight_cfg), min_weight)


def _generator_metrics(loss: Tensor, guidance_B: Tensor, kl_B: Tensor, w_B: Tensor) -> Metrics:
    return {
        "generator_loss": loss.detach(),
        "generator_cfg": guidance_B.detach().mean(),
        "generator_kl": kl_B.detach().mean(),
        "generator_weight": w_B.mean(),
    }


def _stopped_by_lag(
    d_B: Tensor,
    v_lag_BChw: Tensor | None,
    v_star_BChw: Tensor,
    a_B: Tensor,
    lag_clip: float | None,
) -> Tensor:
    """ratio = exp(d_lag - d): True where A > 0 and ratio > 1 + c, or A < 0 and ratio < 1 - c."""
    if lag_clip is None:
        return torch.zeros_like(d_B, dtype=torch.bool)
    if v_lag_BChw is None:
        raise ValueError(f"lag_clip = {lag_clip} needs v_lag")
    _same_shape(v_lag=v_lag_BChw, v_star=v_star_BChw)
    ratio_B = torch.exp(_row_error(v_lag_BChw.detach(), v_star_BChw) - d_B)
    return ((a_B > 0) & (ratio_B > 1 + lag_clip)) | ((a_B < 0) & (ratio_B < 1 - lag_clip))


def _stopped_by_drift(
    d_B: Tensor, v_base_BChw: Tensor, v_star_BChw: Tensor, a_B: Tensor, drifted: Tensor
) -> Tensor:
    """Once drifted: True where A > 0 is already better than the base, or A < 0 already worse."""
    d_base_B = _row_error(v_base_BChw.detach(), v_star_BChw)
    return drifted & (((a_B > 0) & (d_B < d_base_B)) | ((a_B < 0) & (d_B > d_base_B)))


def _pull(x0_hat_BChw: Tensor, direction_BChw: Tensor) -> Tensor:
    """|D|^2 = mean_elements (sg(x0_hat + D) - x0_hat)^2, [B]."""
    # x0_hat cancels before D is added, so that a small D is not rounded away.
    gap_BChw = direction_BChw.detach() + (x0_hat_BChw.detach() - x0_hat_BChw)
    return gap_BChw.square().flatten(1).mean(dim=1)


def _guided(c_BChw: Tensor, u_BChw: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance u + scale (c - u)."""
    return u_BChw + scale * (c_BChw - u_BChw)


def _distance(x0_hat_BChw: Tensor, target_BChw: Tensor, minimum: float) -> Tensor:
    """max(mean_elements |x0_hat - target|, minimum), detached, [B]."""
    gap_BChw = x0_hat_BChw.detach() - target_BChw.detach()
    return gap_BChw.abs().flatten(1).mean(dim=1).clamp(min=minimum)


def _row_error(v_BChw: Tensor, target_BChw: Tensor) -> Tensor:
    """mean_elements (target - v)^2, [B]; the target carries no gradient."""
    return _squared_error(v_BChw, target_BChw.detach()).flatten(1).mean(dim=1)


def _squared_error(x: Tensor, y: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return (x.to(dtype) - y.to(dtype)).square()


def _group_size(rows: Tensor, advantage_B: Tensor, num_groups: int) -> int:
    """G, after checking that B rows are num_groups whole groups with one advantage each."""
    num_rows = rows.shape[0]
    if num_groups < 1 or num_rows % num_groups:
        raise ValueError(f"{num_rows} rows are not num_groups = {num_groups} whole groups")
    # [B, 1] would broadcast to [B, B], and the loss would still look like a number.
    if advantage_B.shape != (num_rows,):
        raise ValueError(f"advantages must be [{num_rows}], got {list(advantage_B.shape)}")
    return num_rows // num_groups


def _same_shape(**tensors: Tensor) -> None:
    """Raise a ValueError naming every shape unless all agree; broadcasting would hide it."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if len({tuple(shape) for shape in shapes.values()}) != 1:
        raise ValueError(f"shapes differ: {shapes}")

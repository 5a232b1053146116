"""Muon beside AdamW: which parameter meets which, each as torch alone does it, and its state."""

import pytest
import torch

from tdm_r1.config import Optimizer
from tdm_r1.errors import LoadError
from tdm_r1.models.loading import load_transformer
from tdm_r1.training import optimizer as module
from tdm_r1.training.trainer import Trainer
from tests.training.common import recipe

CONFIG = Optimizer(name="muon", lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)


def parameters(seed=0):
    shapes = {"blocks.0.attn.to_q.weight": (6, 4), "blocks.0.norm1.linear.weight": (8, 4)}
    shapes |= {"blocks.0.attn.to_q.bias": (6,), "proj_out.weight": (3, 4)}
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in shapes.items()
    }


def step(optimizer, params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def test_each_part_is_torchs_own():
    ours, alone = parameters(), parameters()
    optimizer = module.build(ours, CONFIG)
    matrix = "blocks.0.attn.to_q.weight"
    muon = torch.optim.Muon(
        [alone[matrix]], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    others = [p for name, p in alone.items() if name != matrix]
    adamw = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for seed in range(3):
        step(optimizer, ours, seed)
        step(muon, alone, seed)
        adamw.step()
    for name in ours:
        assert torch.equal(ours[name], alone[name]), name


def test_the_rate_of_a_group_reaches_both_parts():
    params = parameters()
    optimizer = module.build(params, CONFIG)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = {name: p.detach().clone() for name, p in params.items()}
    step(optimizer, params, 0)
    assert all(torch.equal(params[name], before[name]) for name in params)


@pytest.mark.parametrize("family", ["sd3", "zimage"])
def test_muon_takes_the_matrices_of_every_block_and_nothing_else(family, request):
    params = dict(load_transformer(request.getfixturevalue(f"{family}_dir")).named_parameters())
    optimizer = module.build(params, CONFIG)
    chosen = {id(p) for p in optimizer.parts[0].param_groups[0]["params"]}
    names = {name for name, p in params.items() if id(p) in chosen}
    assert all(params[name].ndim == 2 for name in names)
    for part in ("norm", "embed", "adaLN", "proj_out", "final_layer", "context_embedder"):
        assert not [name for name in names if part in name.rsplit(".", 2)[-2]], part
    left = [n for n, p in params.items() if n not in names and p.ndim == 2 and ".to_" in n]
    assert not left
    assert [name for name in names if "feed_forward" in name or ".ff" in name]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_survives_a_round_trip(name):
    config = Optimizer(name=name, lr=0.01)
    params, other = parameters(), parameters()
    first, second = module.build(params, config), module.build(other, config)
    step(first, params, 0)
    tensors, steps = module.state_tensors(first)
    module.load_state(second, {key: t.clone() for key, t in tensors.items()}, steps)
    for key in params:
        other[key].data.copy_(params[key].data)
    step(first, params, 1)
    step(second, other, 1)
    assert all(torch.equal(params[key], other[key]) for key in params)
    with pytest.raises(ValueError, match="has 3 tensors, this one 4"):
        module.load_state(second, {}, [1, 1, 1])


def test_a_moment_of_another_shape_is_refused():
    config, params = Optimizer(name="adamw"), parameters()
    optimizer = module.build(params, config)
    step(optimizer, params, 0)
    tensors, steps = module.state_tensors(optimizer)
    tensors["00001.exp_avg_sq"] = tensors["00001.exp_avg_sq"][:, :1]
    with pytest.raises(LoadError, match=r"slot 00001.exp_avg_sq is \[8, 1\], not \[8, 4\]"):
        module.load_state(module.build(parameters(), config), tensors, steps)


def test_sft_with_muon_resumes_bitwise(tmp_path, sd3_dir):
    def run(folder, iterations, resume=False):
        values = {"method": "sft", "roles": {"kind": "full"}, "checkpoint_every": 1}
        optimizers = {"generator": {"name": "muon", "lr": 1e-3}}
        trainer = Trainer(
            recipe(folder, sd3_dir, iterations=iterations, optimizers=optimizers, **values),
            resume=resume,
        )
        trainer.run()
        return trainer.roles["generator"].sha256()

    whole = run(tmp_path / "a", 3)
    run(tmp_path / "b", 2)
    assert run(tmp_path / "b", 3, resume=True) == whole


def test_adapters_are_matrices_and_nothing_else():
    ours = {"blocks.0.attn.to_q.lora_A.weight": torch.nn.Parameter(torch.ones(2, 4))}
    alone = torch.nn.Parameter(torch.ones(2, 4))
    optimizer = module.build(ours, CONFIG)
    muon = torch.optim.Muon([alone], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    step(optimizer, ours, 0)
    step(muon, {"": alone}, 0)
    assert torch.equal(*ours.values(), alone)

"""Shared by the LoRA tests: a model of each side, and adapters that look trained."""

import torch

from tdm_r1.models import lora
from tests.models import test_sd3, test_zimage


def build(family="sd3"):
    """Return both models of one family, and a function of each that runs it on fixed inputs."""
    if family == "sd3":
        ours, theirs = test_sd3.build_pair()
        batch = test_sd3.make_batch(2, 6, 8, 5)
        return ours, theirs, lambda m: m.velocity(*batch), lambda m: test_sd3.run_theirs(m, *batch)
    ours, theirs = test_zimage.build_pair()
    batch = test_zimage.make_batch((6, 8), [5, 40])
    return ours, theirs, lambda m: m.velocity(*batch), lambda m: test_zimage.run_theirs(m, *batch)


def inject_trained(model, family="sd3", names=("policy",), rank=4, alpha=6.0, seed=3):
    """Inject adapters and move B away from zero, as training would."""
    lora.inject(model, names, rank=rank, alpha=alpha, targets=lora.TARGETS[family])
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            for parameter in lora.adapter_parameters(model, name).values():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))

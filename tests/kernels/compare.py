"""How every fast backend is held to the reference: no worse than twice its error against fp64."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch
from tdm_kernels import reference
from tdm_kernels.testing import allowed_error, in_double


def randn(*shape, seed, dtype=torch.float32, device="cpu"):
    """Standard normal values that do not depend on the device."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype)


def assert_as_good(found, like, exact):
    """Error against fp64 at most twice the reference's in the same dtype, plus 2 ulp."""
    assert found.shape == exact.shape and found.dtype == like.dtype
    assert found.isfinite().all()
    error = (found.double() - exact).abs().max()
    allowed = allowed_error(like, exact)
    assert error <= allowed, (error, allowed)


def compare(module: ModuleType | SimpleNamespace, op, inputs, options, grad=True):
    """Values and gradients: `module` and reference in the inputs' dtypes, and the truth in fp64."""
    results = [run(fast, op, inputs, options, grad) for fast in (module, reference)]
    with in_double():
        inputs = [None if t is None else t.double() for t in inputs]
        options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        results.append(run(reference, op, inputs, options, grad))
    for triple in zip(*results, strict=True):
        assert_as_good(*triple)


def run(module, op, inputs, options, grad=True):
    """Outputs of an op, then the gradients of every tensor given to it but the rotary table."""
    if not grad:
        with torch.no_grad():
            outputs = getattr(module, op)(*inputs, **options)
        return outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    options = {
        k: v.detach().requires_grad_() if k.startswith(("weight", "branch")) else v
        for k, v in options.items()
    }
    outputs = getattr(module, op)(*leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [
        t for t in (*leaves, *options.values()) if isinstance(t, torch.Tensor) and t.requires_grad
    ]
    seeds = [
        randn(*o.shape, seed=100 + i, dtype=o.dtype, device=o.device) for i, o in enumerate(outputs)
    ]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, wanted, seeds)]

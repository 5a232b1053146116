"""The published checkpoints: bare lists of tensors, named by PEFT's order and nothing else."""

import pytest
import torch

from tdm_r1.errors import LoadError
from tdm_r1.models import lora, lora_list
from tests.models.common import relative_error
from tests.models.lora_pairs import build


def peft_list(family, theirs, path, rank=4):
    """Save an adapter as the published script does; `theirs` is left with it active."""
    from peft import LoraConfig

    targets = [target.split(".", 1)[1] for target in lora.TARGETS["zimage"]]
    if family == "sd3":  # in the order of the published configuration, not of the model
        targets = [f"attn.{x}" for x in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")]
        targets += [f"attn.{x}" for x in ("to_k", "to_out.0", "to_q", "to_v")]
    theirs.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    g = torch.Generator().manual_seed(3)
    values = []
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))
                values.append(parameter.detach().clone())
    torch.save({"decay": 0.9, "ema_parameters": values}, path)
    return values


@pytest.mark.parametrize("family", ["sd3", "zimage"])
@torch.no_grad()
def test_a_list_in_pefts_order_has_its_effect(family, tmp_path):
    ours, theirs, velocity, their_velocity = build(family)
    plain = velocity(ours)
    peft_list(family, theirs, tmp_path / "x.ckpt")
    lora.merge_lora(ours, lora_list.load_lora(tmp_path / "x.ckpt", ours))
    expected = their_velocity(theirs)
    assert relative_error(velocity(ours), expected) <= 1e-5 < 1e-2 < relative_error(plain, expected)


@pytest.mark.parametrize(("count", "values", "linear"), [
    (272, 33_423_360, "noise_refiner.0.attention.to_q"),
    (382, 18_776_064, "transformer_blocks.0.attn.to_q"),
])  # fmt: skip
def test_published_lists_need_no_model(count, values, linear, tmp_path):
    with torch.device("meta"):
        model = lora_list.PUBLISHED[count]()
    linears = lora.find_targets(model, lora.TARGETS[model.family])
    shapes = []
    for module in linears.values():
        shapes += [(32, module.in_features), (module.out_features, 32)]
    # Views of one number: files of the published size are not what is tested here.
    tensors = [torch.zeros(1).expand(shape) for shape in shapes]
    torch.save({"ema_parameters": tensors}, tmp_path / "x.ckpt")
    read = lora_list.load_lora(tmp_path / "x.ckpt")
    assert len(tensors) == count and sum(t.numel() for t in tensors) == values
    assert next(iter(read)) == linear and {entry.scale for entry in read.values()} == {2.0}
    tensors[8], tensors[9] = tensors[9], tensors[8]
    torch.save({"ema_parameters": tensors}, tmp_path / "x.ckpt")
    name = list(linears)[4].replace(".", r"\.")
    with pytest.raises(LoadError, match=rf"tensor 8 is .*; {name}\.lora_A is \[32"):
        lora_list.load_lora(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2, 2)], "has no list 'ema_parameters'"),
        ({"model": 1}, "it holds model"),
        ({"ema_parameters": {"a": torch.zeros(2, 2)}}, "has no list"),
        ({"ema_parameters": []}, "the list is empty"),
        ({"ema_parameters": [torch.zeros(2, 2), torch.zeros(2)]}, "entry 1 is no matrix"),
        ({"ema_parameters": [torch.zeros(2, 2)] * 6}, "holds 6 tensors; this sd3 model needs 46"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    ours, *_ = build()
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(LoadError, match=message):
        lora_list.load_lora(tmp_path / "x.ckpt", ours)


def test_missing_damaged_and_hostile_files_are_named(tmp_path):
    file = tmp_path / "x.ckpt"
    with pytest.raises(LoadError, match="x.ckpt"):
        lora_list.load_lora(file)
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(LoadError, match="cannot read LoRA checkpoint .*x.ckpt"):
        lora_list.load_lora(file)
    torch.save({"ema_parameters": [Hostile()]}, file)
    with pytest.raises(LoadError, match="x.ckpt"):
        lora_list.load_lora(file)
    assert not Hostile.ran


class Hostile:
    """Runs code when a pickle of it is opened without care."""

    ran = False

    def __reduce__(self):
        return (_run, ())


def _run():
    Hostile.ran = True


def test_an_unpublished_length_asks_for_the_model(tmp_path):
    torch.save({"ema_parameters": [torch.zeros(2, 2)] * 6}, tmp_path / "x.ckpt")
    with pytest.raises(LoadError, match="6 tensors; the published checkpoints hold 272 or 382"):
        lora_list.load_lora(tmp_path / "x.ckpt")

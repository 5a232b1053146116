"""Directories in diffusers format: round trips and readable failures."""

import json

import pytest
import safetensors.torch
import torch
from diffusers import SD3Transformer2DModel, ZImageTransformer2DModel

from tdm_r1.errors import ConfigError, LoadError
from tdm_r1.models import lora
from tdm_r1.models.loading import WEIGHTS_NAME, load_transformer, save_transformer
from tests.models import test_sd3, test_zimage
from tests.models.common import relative_error

CASES = {
    "sd3": (test_sd3, SD3Transformer2DModel, test_sd3.make_batch(2, 6, 8, 5)),
    "zimage": (test_zimage, ZImageTransformer2DModel, test_zimage.make_batch((6, 8), [5, 40])),
}


@pytest.fixture
def folder(tmp_path):
    """A saved SD3 transformer, inside the `transformer` folder of a model directory."""
    _, theirs = test_sd3.build_pair()
    theirs.save_pretrained(tmp_path / "transformer")
    return tmp_path / "transformer"


def edit_weights(folder, edit):
    tensors = safetensors.torch.load_file(folder / WEIGHTS_NAME)
    tensors = {name: value.clone() for name, value in tensors.items()}
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS_NAME)


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("shard", ["10GB", "50KB"], ids=["one file", "sharded"])
@torch.no_grad()
def test_loads_what_diffusers_saved(family, shard, tmp_path):
    module, _, batch = CASES[family]
    _, theirs = module.build_pair()
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size=shard)
    assert (tmp_path / "transformer" / f"{WEIGHTS_NAME}.index.json").exists() == (shard == "50KB")
    for path in (tmp_path, tmp_path / "transformer"):
        ours = load_transformer(path)
        assert ours.family == family and ours.dtype == torch.float32
        expected = module.run_theirs(theirs, *batch)
        assert relative_error(ours.velocity(*batch), expected) <= 1e-5


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_diffusers_loads_what_we_saved(family, tmp_path):
    module, kind, batch = CASES[family]
    ours, _ = module.build_pair()
    expected = ours.velocity(*batch)
    save_transformer(ours.freeze(), tmp_path)
    theirs = kind.from_pretrained(tmp_path)
    assert relative_error(module.run_theirs(theirs, *batch), expected) <= 1e-5
    again = load_transformer(tmp_path)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


def test_dtype_of_the_file_is_kept_unless_asked(tmp_path):
    ours, _ = test_sd3.build_pair()
    save_transformer(ours, tmp_path, dtype=torch.bfloat16)
    assert ours.dtype == torch.float32
    assert load_transformer(tmp_path).dtype == torch.bfloat16
    model = load_transformer(tmp_path, dtype=torch.float32)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@torch.no_grad()
def test_a_loaded_model_can_be_changed_without_touching_its_file(folder):
    before = (folder / WEIGHTS_NAME).read_bytes()
    model = load_transformer(folder)
    tensors = {"transformer_blocks.0.attn.to_q": (torch.ones(1, 64), torch.ones(64, 1), 1.0)}
    lora.merge_lora(model, tensors)
    assert (folder / WEIGHTS_NAME).read_bytes() == before


def test_misfits_are_all_listed(folder):
    def edit(tensors):
        del tensors["proj_out.bias"], tensors["norm_out.linear.weight"]
        tensors["surplus.weight"] = torch.zeros(2)
        tensors["proj_out.weight"] = torch.zeros(3, 64)

    edit_weights(folder, edit)
    with pytest.raises(LoadError) as error:
        load_transformer(folder.parent)
    message = str(error.value)
    assert "missing: norm_out.linear.weight, proj_out.bias" in message
    assert "not part of this model: surplus.weight" in message
    assert "proj_out.weight (3, 64) instead of (16, 64)" in message


def test_damaged_weights_are_named(folder):
    file = folder / WEIGHTS_NAME
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:5], b""):
        file.write_bytes(damaged)
        with pytest.raises(LoadError, match=f"{WEIGHTS_NAME} is damaged"):
            load_transformer(folder)
    file.unlink()
    with pytest.raises(LoadError, match=f"{WEIGHTS_NAME} does not exist"):
        load_transformer(folder)


def test_a_missing_shard_is_named(folder):
    (folder / WEIGHTS_NAME).unlink()
    index = {"weight_map": {"proj_out.bias": "shard-00001.safetensors"}}
    (folder / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match="shard-00001.safetensors does not exist"):
        load_transformer(folder)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot read .*config.json"),
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ('{"_class_name": "FluxTransformer2DModel"}', "FluxTransformer2DModel.*supported"),
        ('{"_class_name": "SD3Transformer2DModel", "num_layerz": 2}', "Did you mean 'num_layers'"),
    ],
)
def test_bad_configs_are_named(folder, text, message):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(LoadError, match=message):
        load_transformer(folder)


def test_a_model_with_adapters_is_not_saved(tmp_path):
    ours, _ = test_sd3.build_pair()
    lora.inject(ours, ["a"], rank=2, alpha=2, targets=["attn.to_q"])
    with pytest.raises(ConfigError, match="merge the adapters"):
        save_transformer(ours, tmp_path)

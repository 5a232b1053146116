"""Naming colours: the vote of pixels on known pictures, and CLIP against its own forward."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tdm_r1 import shapes
from tdm_r1.errors import ConfigError
from tdm_r1.geneval import COLOURS
from tdm_r1.rewards.colours import ClipColours, crop, hsv_vote
from tdm_r1.rewards.detectors import Detected, ShapesDetector
from tests import tiny

# The named colours of CSS, and of Pillow.
CSS = {
    "red": ["red", "crimson", "firebrick", "#c00000"],
    "orange": ["orange", "darkorange"],
    "yellow": ["yellow", "gold", "khaki"],
    "green": ["green", "lime", "forestgreen", "olivedrab", "palegreen"],
    "blue": ["blue", "navy", "royalblue", "skyblue", "deepskyblue"],
    "purple": ["purple", "darkviolet", "indigo", "mediumpurple"],
    "pink": ["pink", "hotpink", "deeppink", "lightpink"],
    "brown": ["saddlebrown", "#6b4423", "#5c3317"],
    "black": ["black", "#202020", "#0a0a14"],
    "white": ["white", "whitesmoke", "ivory", "#dddddd"],
}


@pytest.mark.parametrize("name", COLOURS)
def test_named_colours_are_called_by_their_names(name):
    assert set(CSS) == set(COLOURS)
    for colour in CSS[name]:
        image = Image.new("RGB", (8, 8), colour)
        assert hsv_vote(image, [Detected("x", 1.0, (1, 1, 7, 7))]) == [name], colour


def test_the_worlds_shapes_have_their_colours():
    rng = np.random.default_rng(0)
    for caption in [*shapes.captions("colours"), *shapes.captions("attribution")[::4]]:
        image = Image.fromarray(shapes.render(caption, rng))
        (found,) = ShapesDetector()([image], 0.5)
        expected = {t.shape: t.colour for t in shapes.parse(caption).things}
        named = hsv_vote(image, found)
        assert {d.label: c for d, c in zip(found, named, strict=True)} == expected


def test_the_mask_decides_where_there_is_one():
    rgb = np.full((10, 10, 3), 255, np.uint8)
    rgb[:, :3] = (255, 0, 0)
    mask_HW = np.zeros((10, 10), bool)
    mask_HW[:, :2] = True
    image = Image.fromarray(rgb)
    plain, masked = (Detected("x", 1.0, (0, 0, 10, 10), m) for m in (None, mask_HW))
    assert hsv_vote(image, [plain, masked]) == ["white", "red"]
    assert hsv_vote(image, []) == []


def test_grey_objects_and_boxes_at_the_edge_get_an_answer():
    grey = [Image.new("RGB", (6, 6), (v, v, v)) for v in (100, 140)]
    assert [hsv_vote(g, [Detected("x", 1.0, (0, 0, 6, 6))])[0] for g in grey] == ["black", "white"]
    for box in ((-3, -3, 0.2, 0.2), (5.9, 5.9, 9, 9), (2, 2, 2, 2)):
        assert hsv_vote(Image.new("RGB", (6, 6), "red"), [Detected("x", 1.0, box)]) == ["red"]
        assert min(crop(Image.new("RGB", (6, 6)), Detected("x", 1.0, box)).size) >= 1


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory):
    import json

    from transformers import CLIPConfig, CLIPModel

    root = tmp_path_factory.mktemp("models") / "clip"
    tokenizer = tiny.clip_tokenizer(max_length=32)
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "hidden_size": 16,
            "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    tiny.randomise(model, 0).save_pretrained(root)
    tokenizer.save_pretrained(root)
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16},
                 "crop_size": {"height": 16, "width": 16}}  # fmt: skip
    (root / "preprocessor_config.json").write_text(json.dumps(processor))
    return root


@torch.no_grad()
def test_clip_answers_as_its_own_forward_does(clip_dir):
    from transformers import CLIPModel, CLIPProcessor

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    mask_HW = np.zeros((40, 60), bool)
    mask_HW[5:20, 30:50] = True
    found = [
        Detected("cat", 0.9, (3.0, 4.0, 30.5, 33.0)),
        Detected("cat", 0.8, (30.0, 5.0, 50.0, 20.0), mask_HW),
    ]
    blank = np.full((40, 60, 3), 0x99, np.uint8)
    blank[5:20, 30:50] = np.asarray(image)[5:20, 30:50]
    crops = [image.crop((3, 4, 31, 33)), Image.fromarray(blank).crop((30, 5, 50, 20))]
    model, processor = CLIPModel.from_pretrained(clip_dir), CLIPProcessor.from_pretrained(clip_dir)
    similarity = torch.zeros(2, len(COLOURS))
    for index, colour in enumerate(COLOURS):
        things = (f"{colour} cat", f"{colour}-colored cat", f"{colour} object")
        texts = [f"a photo of a {thing}" for thing in things]
        inputs = processor(text=texts, images=crops, return_tensors="pt", padding=True)
        outputs = model(**inputs)
        text = outputs.text_embeds.mean(dim=0)
        similarity[:, index] = outputs.image_embeds @ (text / text.norm())
    colours = ClipColours(str(clip_dir), "cpu")
    mine = colours.image_features(crops) @ colours.text_features("cat").T
    torch.testing.assert_close(mine, similarity, atol=1e-5, rtol=0)
    assert colours(image, found) == [COLOURS[i] for i in similarity.argmax(dim=1)]
    assert colours(image, []) == []


def test_another_model_is_no_clip(tmp_path):
    from transformers import ViTConfig

    ViTConfig(hidden_size=8).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is a vit model; allowed: clip"):
        ClipColours(str(tmp_path))


def test_corners_of_a_box_have_no_vote():
    image = Image.new("RGB", (100, 100), "green")
    ImageDraw.Draw(image).chord((0, 0, 99, 99), 84, 276, fill="red")  # more than half of the disc
    assert 0.4 < (np.asarray(image)[..., 0] > 128).mean() < 0.5
    assert hsv_vote(image, [Detected("x", 1.0, (0, 0, 100, 100))]) == ["red"]

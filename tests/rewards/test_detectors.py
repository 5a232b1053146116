"""Detectors: tiny random checkpoints of the real classes, against their own post-processing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tdm_r1 import shapes
from tdm_r1.errors import ConfigError
from tdm_r1.rewards import load_reward, score
from tdm_r1.rewards.detectors import ModelDetector, ShapesDetector, load_detector
from tests import tiny

NAMES = {0: "person", 1: "remote", 2: "bus"}
SIZES = [(48, 64), (64, 64), (33, 20)]  # (height, width)


def pictures(count=3):
    rng = np.random.default_rng(0)
    sizes = [SIZES[i % len(SIZES)] for i in range(count)]
    return [Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sizes]


def save(model, root, **processor):
    tiny.randomise(model, 3).save_pretrained(root)
    (root / "preprocessor_config.json").write_text(json.dumps(processor))
    return root


@pytest.fixture(scope="module")
def boxes_dir(tmp_path_factory):
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8, 16, 16],
        encoder_ffn_dim=16, encoder_attention_heads=2, decoder_in_channels=[16, 16, 16], d_model=16,
        num_queries=8, decoder_layers=1, decoder_ffn_dim=16, decoder_attention_heads=2,
        num_denoising=0, id2label=NAMES,
    )  # fmt: skip
    return save(
        RTDetrForObjectDetection(config),
        tmp_path_factory.mktemp("models") / "rt-detr",
        image_processor_type="RTDetrImageProcessor",
        size={"height": 64, "width": 64},
    )


@pytest.fixture(scope="module")
def masks_dir(tmp_path_factory):
    pytest.importorskip("scipy", reason="transformers' Mask2Former needs scipy: the geneval extra")
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
        window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        dim_feedforward=16, num_queries=6, id2label=NAMES,
    )  # fmt: skip
    return save(
        Mask2FormerForUniversalSegmentation(config),
        tmp_path_factory.mktemp("models") / "mask2former",
        image_processor_type="Mask2FormerImageProcessor",
        size={"shortest_edge": 64, "longest_edge": 64},
    )


@torch.no_grad()
def test_boxes_are_the_models_own(boxes_dir):
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    images = pictures()
    detector = ModelDetector(str(boxes_dir), "cpu")
    assert detector.labels == ("person", "tv remote", "bus")
    found = detector(images, 0.3)
    processor = AutoImageProcessor.from_pretrained(boxes_dir)
    outputs = AutoModelForObjectDetection.from_pretrained(boxes_dir)(
        **processor(images=images, return_tensors="pt")
    )
    # The formula of RT-DETR: every (query, class) pair is a candidate, the best 8 of them are kept.
    for objects, logits, boxes, (height, width) in zip(
        found, outputs.logits, outputs.pred_boxes, SIZES, strict=True
    ):
        scores, order = logits.sigmoid().flatten().topk(8)
        order = order[scores > 0.3]
        assert len(objects) == len(order) > 0
        for item, index, value in zip(objects, order.tolist(), scores.tolist(), strict=False):
            x, y, w, h = boxes[index // 3].tolist()
            assert item.label == detector.labels[index % 3] and item.mask_HW is None
            assert item.score == pytest.approx(value, abs=1e-5)
            expected = [(x - w / 2) * width, (y - h / 2) * height]
            assert item.box[:2] == pytest.approx(expected, abs=1e-2)
            assert item.box[2] - item.box[0] == pytest.approx(w * width, abs=1e-2)


def test_masks_are_the_models_own(masks_dir):
    from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

    images = pictures(2)
    detector = ModelDetector(str(masks_dir), "cpu")
    found = detector(images, 0.1)
    processor = AutoImageProcessor.from_pretrained(masks_dir)
    with torch.no_grad():
        outputs = AutoModelForUniversalSegmentation.from_pretrained(masks_dir)(
            **processor(images=images, return_tensors="pt")
        )
    results = processor.post_process_instance_segmentation(
        outputs, threshold=0.1, target_sizes=SIZES[:2], return_binary_maps=True
    )
    for objects, result, size in zip(found, results, SIZES, strict=False):
        expected = sorted((s["score"] for s in result["segments_info"]), reverse=True)
        assert [item.score for item in objects] == expected and expected
        for item in objects:
            assert item.mask_HW.dtype == bool and item.mask_HW.shape == size
            x0, y0, x1, y1 = (int(v) for v in item.box)
            inside = item.mask_HW[y0:y1, x0:x1]
            assert inside.sum() == item.mask_HW.sum()  # and no row or column to spare:
            assert inside[0].any() and inside[-1].any()
            assert inside[:, 0].any() and inside[:, -1].any()


@pytest.mark.parametrize("kind", ["boxes_dir", "masks_dir"])
def test_batches_thresholds_and_nothing_found(kind, request):
    detector = ModelDetector(str(request.getfixturevalue(kind)), "cpu")
    images = pictures(10)  # more than one batch of the detector's
    found = detector(images, 0.05)
    assert len(found) == 10
    scores = [[item.score for item in objects] for objects in found]
    assert all(s == sorted(s, reverse=True) for s in scores)
    assert detector(images[:1], 1.0) == [[]] and detector([], 0.3) == []


def test_a_directory_is_a_reward(boxes_dir):
    spec = f"geneval(detector={boxes_dir}, device=cpu)"
    prompts = ["a photo of a person", "a photo of two buses", "a photo of a tv remote above a bus"]
    values_B = score(load_reward(spec), pictures(), prompts)
    assert ((0 <= values_B) & (values_B <= 1)).all()
    assert load_detector(str(boxes_dir), "cpu") is load_detector(str(boxes_dir), "cpu")
    with pytest.raises(ConfigError, match="unknown class 'cat'"):
        score(load_reward(spec), pictures(1), ["a photo of a cat"])


def test_the_worlds_checker_is_a_detector():
    image = Image.fromarray(shapes.render("two red circles", np.random.default_rng(0)))
    (found,) = ShapesDetector()([image.convert("RGBA")], 0.3)
    assert [(item.label, item.score) for item in found] == [("circle", 1.0)] * 2
    assert load_detector("shapes").labels == shapes.SHAPES


def test_what_is_no_detector_is_refused(tmp_path):
    from transformers import RTDetrConfig, ViTConfig

    with pytest.raises(ConfigError, match="cannot load the detector"):
        ModelDetector(str(tmp_path))
    ViTConfig(hidden_size=8, architectures=["ViTForImageClassification"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is a ViTForImageClassification; allowed"):
        ModelDetector(str(tmp_path))
    RTDetrConfig(architectures=["RTDetrForObjectDetection"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot load the detector"):
        ModelDetector(str(tmp_path))  # neither processor nor weights

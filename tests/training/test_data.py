"""Image folders for `sft`: pictures as they are meant to be seen, and errors that name the line."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tdm_r1.errors import ConfigError
from tdm_r1.training.data import _read_folder

PIPELINE = SimpleNamespace(size_unit=16)


def write_folder(folder, *pictures, captions=None):
    rows = []
    for number, picture in enumerate(pictures):
        name = f"{number}.png"
        picture.save(folder / name, exif=picture.getexif())
        text = captions[number] if captions else f"caption {number}"
        rows.append(json.dumps({"file_name": name, "text": text}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_bytes("\n".join(rows).encode())
    return folder


def test_transparency_is_white_and_exif_turns(tmp_path):
    clear = Image.new("RGBA", (32, 16), (0, 0, 255, 0))  # blue that nobody sees
    half = Image.new("RGBA", (32, 16), (200, 0, 0, 51))
    grey = Image.new("L", (32, 16), 7)
    turned = Image.new("RGB", (16, 32))
    turned.paste((9, 9, 9), (0, 0, 16, 16))  # above: to the right, once turned clockwise
    turned.getexif()[0x0112] = 6
    found, texts = _read_folder(
        write_folder(tmp_path, clear, half, grey, turned, captions=["é", "b", "c", "d"]), PIPELINE
    )
    assert texts == ["é", "b", "c", "d"]
    assert all(picture.shape == (16, 32, 3) for picture in found)
    assert (found[0] == 255).all() and (found[2] == 7).all()
    assert np.abs(found[1][0, 0].astype(int) - [244, 204, 204]).max() <= 1  # 0.2 of red on white
    assert (found[3][:, 16:] == 9).all() and (found[3][:, :16] == 0).all()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (b"{", "metadata.jsonl:1 is not JSON"),
        (
            b'{"file_name": "0.png", "text": "a"}\n{"file_name": "0.png"}',
            ":2 lacks file_name or te",
        ),
        (b'{"file_name": "0.png", "text": 5}', ":1: text is 5; allowed: a string"),
        (b'\n{"file_name": "9.png", "text": "a"}', ":2: cannot read 9.png"),
        (b"\n", "metadata.jsonl lists no pictures"),
        (b'{"file_name": "0.png", "text": "\xff"}', "data.source: .*metadata.jsonl:1 is not UTF-8"),
        (
            b'{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text": "a"}',
            ":2: 1.png is 16 x 48, those before are 32 x 16: pictures must share one size",
        ),
        (b'{"file_name": "2.png", "text": "a"}', "pictures are 20 x 16; allowed: multiples of 16"),
    ],
)
def test_errors_name_the_line(metadata, message, tmp_path):
    sizes = (32, 16), (16, 48), (20, 16)
    folder = write_folder(tmp_path, *(Image.new("RGB", size) for size in sizes))
    (folder / "metadata.jsonl").write_bytes(metadata)
    with pytest.raises(ConfigError, match=message):
        _read_folder(folder, PIPELINE)

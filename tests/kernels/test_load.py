"""A native library that is missing, damaged or old is reported, and "auto" goes on without it."""

import ctypes

import pytest
from tdm_kernels import native, reference, registry
from tdm_kernels.__main__ import main


@pytest.fixture(autouse=True)
def fresh():
    native.load.cache_clear()
    yield
    native.load.cache_clear()


def refuse(message):
    """Every native op names the reason; the others serve."""
    reasons = registry.explain("cpu")
    native_ops = [op for op in reasons if "native" in reasons[op]]
    assert len(native_ops) >= 9
    assert all(message in reasons[op]["native"] for op in native_ops), reasons
    assert registry.select("auto", "cpu").norm_modulate is reference.norm_modulate
    with pytest.raises(ValueError, match=rf"cannot run .*norm_modulate.*{message}"):
        registry.select("native", "cpu")


def test_missing(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "absent.so")
    refuse("is not built: run `make native`")
    assert not caplog.records


@pytest.mark.parametrize("content", [b"", b"no library at all", b"\x7fELF" + bytes(200)])
def test_damaged(content, monkeypatch, tmp_path, caplog, capsys):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "damaged.so")
    native.LIBRARY.write_bytes(content)
    with pytest.raises(OSError) as cause:
        ctypes.CDLL(str(native.LIBRARY))
    refuse(f"does not load: {cause.value}")
    assert main(["--device", "cpu"]) == 0
    assert f"native: does not load: {cause.value}" in capsys.readouterr().out
    (record,) = caplog.records
    assert record.levelname == "WARNING" and str(cause.value) in record.message


@pytest.mark.skipif(not native.LIBRARY.is_file(), reason="the native library is not built")
def test_older_than_its_callers(monkeypatch, caplog):
    monkeypatch.setattr(native, "_NEWEST_OP", "an_op_of_tomorrow")
    refuse("was built from older sources: run `make native`")
    assert [record.levelname for record in caplog.records] == ["WARNING"]

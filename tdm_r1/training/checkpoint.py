"""Checkpoints, whole or absent: a directory of safetensors, with JSON for the rest.

    run_dir/checkpoint-000120/state.json             sizes and SHA-256 of the files, and the state
    run_dir/checkpoint-000120/<group>.safetensors    one file per group of named tensors

A checkpoint is written beside its place and renamed into it, so a crash at any moment leaves the
previous one. This module knows no model and no optimizer: the caller names its tensors. Only one
process may write to a run directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tdm_r1.errors import LoadError, SaveError
from tdm_r1.files import save_tensors, sha256

FORMAT = 1
STATE_FILE = "state.json"
PathLike = str | os.PathLike[str]
_NAME = re.compile(r"checkpoint-(\d+)(\.old)?")
_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def checkpoint_path(run_dir: PathLike, step: int) -> Path:
    """Where the checkpoint of `step` lives: run_dir/checkpoint-000120."""
    return Path(run_dir) / f"checkpoint-{step:06d}"


def save_checkpoint(
    path: PathLike,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep_last: int | None = None,
    keep: PathLike | None = None,
) -> Path:
    """Write `path` atomically: all of it is there, or the run directory is as it was.

    tensors: group -> name -> tensor of any device, dtype and strides; views of one buffer are
        stored apart.
    state: anything JSON holds; floats come back exactly, tuples as lists, keys as strings.
    keep_last: afterwards delete the checkpoints of the lowest steps until N are left, never the
        one just written.
    keep: a checkpoint that stays even if it is older than those: the best one so far.

    Raises:
        ValueError: a group name is no plain file name, or keep_last < 1.
        TypeError: `state` holds something JSON does not.
        SaveError: the disk is full or not writable; no partial checkpoint stays, and those before
            it are untouched.
    """
    path = Path(path)
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"keep_last = {keep_last} must be at least 1")
    for group in tensors:
        if not _GROUP.fullmatch(group):
            raise ValueError(f"group name {group!r} must be made of letters, digits, '_', '-', '.'")
    json.dumps(state)  # fail before anything touches the disk
    staging = path.parent / f".tmp-{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(".tmp-checkpoint-*"):
            shutil.rmtree(stale, ignore_errors=True)
        _write(staging, tensors, state)
        _publish(staging, path)
    except (OSError, SafetensorError) as error:  # safetensors has a class of its own for both
        shutil.rmtree(staging, ignore_errors=True)  # first: it may hold the last free bytes
        left = latest_checkpoint(path.parent)
        raise SaveError(
            f"checkpoint {path} could not be written: {error}; "
            + (f"{left.name} is whole" if left else "there is no earlier one")
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if keep_last is not None:
        _prune(path, keep_last, keep)
    return path


def load_checkpoint(
    path: PathLike, *, device: str = "cpu"
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read back (tensors, state) of `save_checkpoint`; tensors are verified and bitwise equal.

    Raises:
        LoadError: not a checkpoint directory, of another format, or a file of it is missing,
            truncated or altered. Names the file.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    tensors = {}
    for group, facts in manifest["groups"].items():
        file = path / f"{group}.safetensors"
        if not file.is_file():
            raise LoadError(f"checkpoint file {file} is missing")
        if file.stat().st_size != facts["bytes"]:
            size = file.stat().st_size
            raise LoadError(f"checkpoint file {file} has {size} bytes instead of {facts['bytes']}")
        if sha256(file) != facts["sha256"]:
            raise LoadError(f"checkpoint file {file} is damaged: its SHA-256 does not match")
        try:
            tensors[group] = load_file(file, device=device)
        except (SafetensorError, OSError) as error:
            raise LoadError(f"checkpoint file {file} cannot be read: {error}") from error
    return tensors, manifest["state"]


def latest_checkpoint(run_dir: PathLike) -> Path | None:
    """The whole checkpoint of the highest step in `run_dir`, or None; broken ones are skipped.

    Whole: a readable state.json, and every file at its recorded size. `load_checkpoint` verifies
    the bytes.
    """
    return next((found for found in reversed(_checkpoints(run_dir)) if _is_whole(found)), None)


def _write(
    staging: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    """Fill `staging` and push it to the disk, so that the rename cannot overtake the data."""
    staging.mkdir()
    groups = {}
    for group, named in tensors.items():
        file = staging / f"{group}.safetensors"
        save_tensors(_owned(named), file)
        _fsync(file)
        groups[group] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    manifest = {"format": FORMAT, "groups": groups, "state": state}
    (staging / STATE_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _fsync(staging / STATE_FILE)
    _fsync(staging)


def _publish(staging: Path, path: Path) -> None:
    """Rename `staging` to `path`."""
    # A directory cannot replace a full one, so an old version steps aside first; if the process
    # dies between the two renames, `latest_checkpoint` still finds it under its `.old` name.
    aside = path.with_name(path.name + ".old")
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
    os.rename(staging, path)
    _fsync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _prune(written: Path, keep_last: int, keep: PathLike | None) -> None:
    """Delete the checkpoints of the lowest steps; `written` stays even if others are higher."""
    others = [found for found in _checkpoints(written.parent) if found != written]
    for found in others[: max(0, len(others) + 1 - keep_last)]:
        if keep is None or found != Path(keep):
            shutil.rmtree(found)


def _checkpoints(run_dir: PathLike) -> list[Path]:
    """Directories named like checkpoints, lowest step first, `.old` before what replaced it."""
    found = []
    for entry in Path(run_dir).glob("checkpoint-*"):
        match = _NAME.fullmatch(entry.name)
        if match and entry.is_dir():
            found.append((int(match[1]), match[2] is None, entry))
    return [entry for _, _, entry in sorted(found)]


def _is_whole(path: Path) -> bool:
    try:
        groups = _read_manifest(path)["groups"]
        sizes = {group: (path / f"{group}.safetensors").stat().st_size for group in groups}
    except (LoadError, OSError):
        return False
    return all(sizes[group] == facts["bytes"] for group, facts in groups.items())


def _read_manifest(path: Path) -> dict[str, Any]:
    """state.json, checked for its form."""
    file = path / STATE_FILE
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadError(f"{path} is not a checkpoint: it has no {STATE_FILE}") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"checkpoint file {file} cannot be read: {error}") from error
    form = manifest.get("format") if isinstance(manifest, dict) else None
    if form != FORMAT:
        raise LoadError(f"checkpoint file {file} has format {form!r}; this version reads {FORMAT}")
    groups = manifest.get("groups")
    if (
        not isinstance(groups, dict)
        or "state" not in manifest
        or not all(
            isinstance(facts, dict) and {"bytes", "sha256"} <= set(facts)
            for facts in groups.values()
        )
    ):
        raise LoadError(f"checkpoint file {file} lacks its list of files or its state")
    return manifest


def _owned(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU tensors of which no two share storage: safetensors refuses tied weights and views."""
    owned, seen = {}, set()
    for name, tensor in named.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        owned[name] = tensor
    return owned


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

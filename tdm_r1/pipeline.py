"""A model by name -> its parts: transformer, text encoder, VAE, and how it likes to be sampled.

A name is a shipped tiny model, a local directory in diffusers' format, or a Hugging Face Hub id.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tdm_r1.errors import LoadError, closest
from tdm_r1.flow import Schedule
from tdm_r1.models.layers import Transformer
from tdm_r1.models.loading import load_transformer, read_json
from tdm_r1.models.lora import merge_lora
from tdm_r1.models.lora_files import WEIGHTS_NAME, find_lora_file
from tdm_r1.models.lora_list import load_lora
from tdm_r1.text import TextEncoder, load_text_encoder
from tdm_r1.vae import VAE, load_vae

ASSETS = Path(__file__).parent / "assets"
SHIPPED = ("tiny-sd3", "tiny-zimage", "tiny-sd3-base", "tiny-zimage-base")
FAMILIES = {"StableDiffusion3Pipeline": "sd3", "ZImagePipeline": "zimage"}
SOLVERS = {"FlowMatchEulerDiscreteScheduler": "euler", "DPMSolverMultistepScheduler": "dpm2m"}


@dataclass
class Pipeline:
    """The parts of one text-to-image model on one device.

    `shift` and `default_solver` come from the stored scheduler, `default_size` is in pixels.
    """

    family: str
    transformer: Transformer
    text: TextEncoder
    vae: VAE
    shift: float
    default_solver: str
    default_size: int
    name: str
    path: Path
    lora: Path | None = None  # what was merged into the transformer, or would be
    schedule: Schedule | None = None  # the only one it can follow: an export's; None: any
    text_axis: tuple[int, int] | None = None  # fewest and most tokens of a prompt: an export's

    @property
    def places(self) -> int:
        """A hash of where transformer and VAE, and their weights, lie."""
        read = (*self.transformer.weights, *self.vae.parameters())
        return hash((id(self.transformer), id(self.vae), *(x.data_ptr() for x in read)))

    @property
    def device(self) -> torch.device:
        """The device every part lives on."""
        return self.text.device

    @property
    def size_unit(self) -> int:
        """Heights and widths are multiples of this many pixels."""
        config: Any = self.transformer.config
        return self.vae.scale_factor * config.patch_size


def load_pipeline(
    name_or_dir: str | Path,
    *,
    lora: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    weights: str = "default",
    t5_length: int | None = None,
    merge: bool = True,
) -> Pipeline:
    """Load a model.

    `name_or_dir`: "tiny-sd3" or "tiny-zimage" (shipped, with their 4-step LoRA merged),
    "tiny-sd3-base" or "tiny-zimage-base" (without it), a directory, or a Hub id. A directory's own
    LoRA is never applied unasked: `lora` names the file to merge (any layout of `load_lora`), in
    place of a shipped one.
    `weights="base"` loads a shipped name without its LoRA. `device="auto"` takes CUDA when there is
    one; `dtype="auto"` is bfloat16 there and float32 on a CPU. `t5_length` replaces the padded T5
    length of SD3 (256, or the tokenizer's own limit). `merge=False`, for a trainer, leaves the
    transformer as it is stored, not frozen, and only names the LoRA. Raises LoadError for anything
    that is not a supported, complete model.
    """
    if weights not in ("default", "base"):
        raise LoadError(f"weights is {weights!r}; allowed: 'default', 'base'")
    device, dtype = resolve_device(device), resolve_dtype(dtype, resolve_device(device))
    root, bundled = find_model(name_or_dir)
    family = _family(root)
    solver, shift = sampling(root)
    # A run that starts from the bundled LoRA ends in one that holds it: `lora` replaces it.
    if lora is not None:
        merged: Path | None = find_lora_file(lora)
    else:
        merged = bundled if weights == "default" else None
    if merge:
        transformer = _load_merged(root, merged, backend=backend, device=device, dtype=dtype)
    else:
        transformer = load_transformer(root, backend=backend, device=device, dtype=dtype)
    width = getattr(
        transformer.config, "joint_attention_dim" if family == "sd3" else "cap_feat_dim"
    )
    where: dict = {"device": device, "dtype": dtype}
    vae = load_vae(root, backend=backend, **where)
    return Pipeline(
        family=family,
        transformer=transformer,
        text=load_text_encoder(root, family, width=width, t5_length=t5_length, **where),
        vae=vae,
        shift=shift,
        default_solver=solver,
        default_size=_default_size(transformer.config, family, vae),
        name=str(name_or_dir),
        path=root,
        lora=merged,
    )


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" -> CUDA when there is one, else the CPU. Raises LoadError for an unusable device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise LoadError(
            f"device is {device!r}; allowed: 'auto', 'cpu', 'cuda', 'cuda:N'"
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise LoadError(f"device is {device!r}, but this machine has no usable CUDA device")
    return found


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" -> bfloat16 on CUDA, float32 on a CPU. Raises LoadError for any other dtype."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    # float16 overflows in Z-Image's feed-forward, and T5 is fragile in it
    allowed = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    found = allowed.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in allowed.values():
        raise LoadError(f"dtype is {dtype!r}; allowed: 'auto', 'bfloat16', 'float32'")
    return found


def _load_merged(root: Path, lora: Path | None, *, backend: str, device, dtype) -> Transformer:
    """The transformer with `lora` folded in, rounded once."""
    if lora is None:
        transformer = load_transformer(root, backend=backend, device=device, dtype=dtype)
        return transformer.eval().freeze()
    transformer = load_transformer(root, backend=backend, device=device)
    # no coarser than the file nor than the result: fp16 files are common
    transformer.to(dtype=torch.promote_types(transformer.dtype, dtype))
    merge_lora(transformer, load_lora(lora, transformer))
    return transformer.to(dtype=dtype).eval().freeze()


def find_model(name_or_dir: str | Path) -> tuple[Path, Path | None]:
    """Return the model's directory and the LoRA that belongs to the name, if any.

    A Hub id is fetched first. Raises LoadError for what is neither of the three.
    """
    name = str(name_or_dir)
    if name in SHIPPED:
        root = ASSETS / name.removesuffix("-base")
        lora = root / WEIGHTS_NAME
        if not root.is_dir():
            raise LoadError(f"the shipped model {name!r} is not installed: {root} is missing")
        return root, lora if lora.is_file() and not name.endswith("-base") else None
    path = Path(name_or_dir).expanduser()
    if path.is_dir():
        return path, None
    if path.exists():
        raise LoadError(f"{path} is a file; a model is a directory in diffusers' format")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise LoadError(
            f"no model {name!r}: not a directory, not a Hub id (owner/name), not one of"
            f" {', '.join(SHIPPED)}.{closest(name, SHIPPED)}"
        )
    return _download(name), None


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folders = ("transformer", "vae", "scheduler", "text_encoder*", "tokenizer*")
        kinds = ("json", "txt", "model", "safetensors", "jinja")
        patterns = [f"{folder}/*.{kind}" for folder in folders for kind in kinds]
        return Path(snapshot_download(name, allow_patterns=["model_index.json", *patterns]))
    except Exception as error:  # the Hub client raises its own, httpx's and OSError's classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoadError(
            f"{name!r} is not a local directory and could not be fetched from the Hugging Face Hub:"
            f" {reason}"
        ) from error


def _family(root: Path) -> str:
    if not (root / "model_index.json").is_file():
        for file, instead in (
            ("model/model_index.json", f"{root / 'model'} is one"),
            (WEIGHTS_NAME, f"{root / WEIGHTS_NAME} is a LoRA, for `lora`"),
            ("export.json", "it is an export, which takes backend='onnx' or 'tensorrt-rtx'"),
        ):
            if (root / file).is_file():
                raise LoadError(f"{root} is no model in diffusers' format: {instead}")
    class_name = read_json(root / "model_index.json").get("_class_name")
    if class_name not in FAMILIES:
        raise LoadError(f"{root} holds a {class_name}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[class_name]


def sampling(root: Path) -> tuple[str, float]:
    """(solver, shift) of the stored scheduler."""
    path = root / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    class_name = config.get("_class_name")
    if class_name not in SOLVERS:
        raise LoadError(f"{path} is a {class_name}; supported: {', '.join(SOLVERS)}")
    if config.get("use_dynamic_shifting"):
        raise LoadError(f"{path}: use_dynamic_shifting is true; only a fixed shift is supported")
    solver = SOLVERS[class_name]
    shift = config.get("flow_shift" if solver == "dpm2m" else "shift", 1.0)
    if not isinstance(shift, (int, float)) or shift <= 0:
        raise LoadError(f"{path}: shift is {shift!r}; allowed: a number above 0")
    return solver, float(shift)


def _default_size(config, family: str, vae: VAE) -> int:
    """Pixels: SD3's transformer config says; for Z-Image its VAE's does (1024 in the release)."""
    return vae.sample_size if family == "zimage" else config.sample_size * vae.scale_factor

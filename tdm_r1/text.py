"""Prompts -> Condition, with transformers' encoders; caching, trimming and batching are ours.

Shapes: B prompts, T tokens, E token features (the DiT's text width).

Stable Diffusion 3: two CLIP encoders (penultimate layer, features side by side, zero-padded to E)
followed along T by a T5 encoder; all padded to their maximum and never masked, so T is part of the
model's meaning. Z-Image: Qwen3 on the chat template, output of the last layer but one.
"""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdm_r1.errors import ConfigError, LoadError
from tdm_r1.models.conditioning import Condition
from tdm_r1.models.loading import read_json

logger = logging.getLogger(__name__)

CACHED_PROMPTS = 256  # SD3.5 at T = 333 in bf16: 2.7 MB a prompt
_T5_TOKENS = 256  # diffusers' default `max_sequence_length`
_QWEN_TOKENS = 512
_MAX_TRACED = 2**22  # parameters of an encoder: above, computing takes longer than calling


class TextEncoder:
    """Turn prompts into a `Condition`, remembering the `cache_size` prompts used last.

    `batch_size` prompts go through an encoder at a time, and change each other's last bits. A
    subclass encodes a list of new prompts in one batch: `_encode(prompts)` gives one (tokens_TE,
    pooled_E or None) per prompt.
    """

    family: str
    batch_size = 32  # bounds the memory of one long list

    def __init__(self, *, device: torch.device, cache_size: int = CACHED_PROMPTS) -> None:
        self.device = device
        self.cache_size = cache_size
        self._cache: OrderedDict[str, tuple[Tensor, Tensor | None]] = OrderedDict()

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        """Encode `prompts` on the encoder's device.

        Returns tokens_BTE (zeros beyond each prompt's tokens), lengths_B int64 and, for SD3,
        pooled_BE. Each different prompt is run at most once, and not at all while it is cached.
        Raises ConfigError for an empty list or a prompt that is not a string.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise ConfigError(f"prompts must be a non-empty list of strings, got {prompts!r}")
        with torch.autocast(self.device.type, enabled=False):  # what is cached must not follow it
            found = self._lookup(prompts)
        rows = [found[prompt] for prompt in prompts]
        lengths = [len(tokens) for tokens, _ in rows]
        longest = max(lengths)
        tokens_BTE = torch.stack(
            [
                tokens
                if len(tokens) == longest
                else F.pad(tokens, (0, 0, 0, longest - len(tokens)))
                for tokens, _ in rows
            ]
        )
        pooled = [pooled for _, pooled in rows if pooled is not None]
        lengths_B = torch.tensor(lengths, device=tokens_BTE.device)
        return Condition(tokens_BTE, lengths_B, torch.stack(pooled) if pooled else None)

    def clear_cache(self) -> None:
        """Forget every encoded prompt: needed after an encoder's weights change."""
        self._cache.clear()

    def _lookup(self, prompts: list[str]) -> dict[str, tuple[Tensor, Tensor | None]]:
        found = {prompt: self._cache[prompt] for prompt in prompts if prompt in self._cache}
        missing = list(dict.fromkeys(prompt for prompt in prompts if prompt not in found))
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            found.update(zip(batch, self._encode(batch), strict=True))
        for prompt, row in found.items():
            self._cache[prompt] = row
            self._cache.move_to_end(prompt)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return found

    def _encode(self, prompts: list[str]) -> list[tuple[Tensor, Tensor | None]]:
        raise NotImplementedError


class ClipFeatures(nn.Module):
    """A CLIP text encoder: the penultimate layer of every token, and the projected pooled text."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(ids_BT, output_hidden_states=True)
        return out.hidden_states[-2], out.text_embeds


class T5Features(nn.Module):
    """A T5 encoder's last layer, without its mask, as in diffusers: padding is attended."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.model(ids_BT).last_hidden_state


class QwenFeatures(nn.Module):
    """Qwen3 without its last layer and final norm: the feature is the input of that layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.layers = model.layers[:-1]
        model.norm = nn.Identity()
        self.model = model

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.model(input_ids=ids_BT, use_cache=False).last_hidden_state


class Traced(nn.Module):
    """`features`, whose single prompts are run by TorchScript's interpreter.

    Two thirds of a small encoder's time are Python's, between the operations; a trace of them runs
    without it. It reads the module's own weights, so updates in place are seen. Only for inputs of
    one length: what depends on it is fixed by the trace.
    """

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features
        self._traces: dict[torch.Size, Callable] = {}

    @property
    def model(self) -> Any:
        """The transformers module inside."""
        return self.features.model

    def forward(self, ids_BT: Tensor) -> Any:
        if torch.compiler.is_exporting() or torch.compiler.is_compiling():
            return self.features(ids_BT)
        if len(ids_BT) > 1 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return self.features(ids_BT)
        if ids_BT.shape not in self._traces:
            self._traces[ids_BT.shape] = self._trace(ids_BT)
        return self._traces[ids_BT.shape](ids_BT)

    def _trace(self, ids_BT: Tensor) -> Callable:
        # torch.jit is deprecated, but torch.export's graphs are run by Python again, and compiling
        # takes a compiler and a minute.
        with (
            quiet_transformers(),  # tracing reads every property of its models, some of which warn
            warnings.catch_warnings(),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            return torch.jit.trace(self.features, (ids_BT.clone(),), check_trace=False)


class SD3TextEncoder(TextEncoder):
    """CLIP-L, CLIP-G and T5; `t5` None gives zeros in its place, as in diffusers."""

    family = "sd3"

    def __init__(
        self,
        clips: list[tuple],
        t5: tuple | None,
        *,
        width: int,
        t5_length: int | None = None,
        **kwargs,
    ) -> None:
        """`width` is E; `t5_length` the T of T5.

        `clips` are (tokenizer, `ClipFeatures`) and `t5` is (tokenizer, `T5Features`), or what
        computes the same.
        """
        super().__init__(**kwargs)
        self.clips, self.t5, self.width = clips, t5, width
        self.clip_length = clips[0][0].model_max_length
        longest = _T5_TOKENS if t5 is None else min(_T5_TOKENS, t5[0].model_max_length)
        self.t5_length = longest if t5_length is None else t5_length

    def _encode(self, prompts: list[str]) -> list[tuple[Tensor, Tensor | None]]:
        tokens, pooled = zip(*(self._run_clip(pair, prompts) for pair in self.clips), strict=True)
        clip_BTE = torch.cat(tokens, dim=-1)
        clip_BTE = F.pad(clip_BTE, (0, self.width - clip_BTE.shape[-1]))
        tokens_BTE = torch.cat([clip_BTE, self._run_t5(prompts, clip_BTE)], dim=1)
        pooled_BE = torch.cat(pooled, dim=-1)
        # a view would keep the whole batch alive in the cache
        return [(tokens_BTE[i].clone(), pooled_BE[i].clone()) for i in range(len(prompts))]

    def _run_clip(self, pair: tuple, prompts: list[str]) -> tuple[Tensor, Tensor]:
        tokenizer, features = pair
        return features(self._ids(tokenizer, prompts, self.clip_length))

    def _run_t5(self, prompts: list[str], like_BTE: Tensor) -> Tensor:
        if self.t5 is None:
            return like_BTE.new_zeros(len(prompts), self.t5_length, self.width)
        tokenizer, features = self.t5
        return features(self._ids(tokenizer, prompts, self.t5_length)).to(like_BTE.dtype)

    def _ids(self, tokenizer, prompts: list[str], length: int) -> Tensor:
        if tokenizer is (self.t5 or self.clips[0])[0]:  # what sees most of a prompt
            warn_of_cut(tokenizer, prompts, length)
        ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True).input_ids
        return torch.tensor(ids, device=self.device)


class ZImageTextEncoder(TextEncoder):
    """Qwen3 on the chat template."""

    family = "zimage"

    def __init__(self, tokenizer, features: Callable[[Tensor], Tensor], **kwargs) -> None:
        """`features` is `QwenFeatures`, or what computes the same."""
        super().__init__(**kwargs)
        self.tokenizer, self.features = tokenizer, features
        self.max_length = _QWEN_TOKENS

    def _encode(self, prompts: list[str]) -> list[tuple[Tensor, Tensor | None]]:
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            )
            for prompt in prompts
        ]
        warn_of_cut(self.tokenizer, texts, _QWEN_TOKENS)
        rows = self.tokenizer(texts, truncation=True, max_length=_QWEN_TOKENS).input_ids
        longest = max(map(len, rows))
        # Causal, and padded on the right: no real token sees a pad, so the features need neither
        # 512 tokens nor a mask. Id 0 is as good a pad as any.
        ids = [row + [0] * (longest - len(row)) for row in rows]
        hidden_BTE = self.features(torch.tensor(ids, device=self.device))
        # clones, as above
        return [(hidden_BTE[i, : len(row)].clone(), None) for i, row in enumerate(rows)]


def warn_of_cut(tokenizer, texts: list[str], length: int) -> None:
    """Say which texts have more than `length` tokens, and how many: the rest is not read."""
    for text in texts:
        # No token is empty: so few bytes, a beginning and an end are no more tokens than that.
        if len(text.encode()) < length - 2:
            continue
        if (found := len(tokenizer(text, verbose=False).input_ids)) > length:
            logger.warning("%d of %d tokens are read of the prompt %.60r", length, found, text)


def load_text_encoder(
    root: Path,
    family: str,
    *,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    t5_length: int | None = None,
) -> TextEncoder:
    """Build the text encoder of a diffusers-format directory.

    `width` is the DiT's text width E, `t5_length` (SD3 only) replaces the default T of T5.
    Raises LoadError for a listed component that is missing, unreadable or incomplete, ConfigError
    for a `t5_length` outside 1 to 512.
    """
    if t5_length is not None and not 1 <= t5_length <= 512:
        raise ConfigError(f"t5_length is {t5_length}; allowed: 1 to 512")
    where = {"device": device, "dtype": dtype}
    if family == "zimage":
        tokenizer, model = _load_pair(root, "", "AutoModel", **where)
        return ZImageTextEncoder(tokenizer, QwenFeatures(model), device=device)
    names = read_json(root / "model_index.json")
    clips = []
    for suffix in ("", "_2"):
        tokenizer, model = _load_pair(root, suffix, "CLIPTextModelWithProjection", **where)
        clips.append((tokenizer, _traced(ClipFeatures(model), device)))
    t5 = None
    if any(names.get("text_encoder_3") or ()):
        tokenizer, model = _load_pair(root, "_3", "T5EncoderModel", **where)
        t5 = tokenizer, _traced(T5Features(model), device)
    return SD3TextEncoder(clips, t5, width=width, t5_length=t5_length, device=device)


def _traced(features: nn.Module, device: torch.device) -> nn.Module:
    """Traced where calling costs as much as computing."""
    small = sum(p.numel() for p in features.parameters()) <= _MAX_TRACED
    return Traced(features).eval() if device.type == "cpu" and small else features


def _load_pair(root: Path, suffix: str, class_name: str, *, device, dtype) -> tuple:
    """Load (tokenizer<suffix>, text_encoder<suffix>), strictly."""
    import transformers
    from safetensors import SafetensorError

    tokenizer_dir, model_dir = root / f"tokenizer{suffix}", root / f"text_encoder{suffix}"
    for folder in (tokenizer_dir, model_dir):
        if not folder.is_dir():
            raise LoadError(
                f"{root} lists a component in {folder.name}/, but there is no such folder"
            )
    tokenizer = load_tokenizer(tokenizer_dir)
    try:
        with quiet_transformers():
            model, report = getattr(transformers, class_name).from_pretrained(
                model_dir, dtype=dtype, output_loading_info=True, attn_implementation="sdpa"
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise LoadError(f"cannot load {model_dir}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise LoadError(f"{model_dir} lacks {len(missing)} tensors, among them {missing[:3]}")
    return tokenizer, model.to(device).eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer; LoadError names the folder when it cannot be read."""
    import transformers

    try:
        with quiet_transformers():
            return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise LoadError(f"cannot load {folder}: {error}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off a user's terminal while loading."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

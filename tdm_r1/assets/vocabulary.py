"""Tokenizers of the real classes over a small vocabulary: the world's words, single characters."""

from __future__ import annotations

import string
from collections.abc import Sequence

from .. import shapes

WORDS = tuple(
    dict.fromkeys(
        "a an photo of and sign that says left right above below one two three four five".split()
        + [f"{s}{p}" for s in shapes.SHAPES for p in ("", "s")]
        + list(shapes.COLOURS)
    )
)
CHAT_WORDS = ("user", "assistant")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def clip_tokenizer(max_length: int, words: Sequence[str] = WORDS):
    """CLIPTokenizer: `words` are one token each, the rest is spelt. Lower-cases, as CLIP does."""
    from transformers import CLIPTokenizer

    characters = list(string.ascii_lowercase + string.digits + string.punctuation)
    start = ["<|startoftext|>", *characters, *(c + "</w>" for c in characters)]
    vocab, merges = _merge_words(start, words, "</w>")
    vocab.append("<|endoftext|>")  # the highest id, where CLIP looks for the pooled row
    ids = {token: i for i, token in enumerate(vocab)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=max_length)


def t5_tokenizer(max_length: int, words: Sequence[str] = WORDS):
    """T5Tokenizer (unigram): `words` are one piece each, everything else is spelt. Keeps case."""
    from transformers import T5Tokenizer

    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        '▁"',
        *("▁" + w for w in words),
        *string.printable[:94],
    ]
    scores = [(piece, 0.0 if i < 3 else -1.0 - 0.01 * i) for i, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=max_length)


def qwen_tokenizer(max_length: int = 512, words: Sequence[str] = WORDS):
    """Qwen2Tokenizer (byte-level BPE) with the chat markers and a chat template. Keeps case."""
    from transformers import Qwen2Tokenizer

    characters = [*string.printable[:94], "Ġ", "Ċ"]
    spelt = [*words, *("Ġ" + w for w in words), *CHAT_WORDS]
    vocab, merges = _merge_words(characters, spelt, "")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate([*vocab, *specials])},
        merges=merges,
        model_max_length=max_length,
        additional_special_tokens=specials[1:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _merge_words(
    vocab: list[str], words: Sequence[str], suffix: str
) -> tuple[list[str], list[tuple[str, str]]]:
    """Extend a character vocabulary by BPE merges until every word is one token.

    A word is first spelt with the merges there are; only what is then left apart gets new ones. New
    merges rank last, so they cannot disturb a word that is already whole.
    """
    vocab = list(vocab)
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + suffix]
        for pair in merges:
            pieces = _apply(pieces, pair)
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            merges.append(pair)
            vocab.append(pair[0] + pair[1])
            pieces = _apply(pieces, pair)
    return list(dict.fromkeys(vocab)), merges


def _apply(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out

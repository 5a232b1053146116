"""The text side of a batch, as the transformers take it.

Shapes: B prompts, T text tokens (padded), E text feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Encoded prompts.

    tokens_BTE: text features; rows past a prompt's length are padding and carry no meaning.
    lengths_B:  int64, valid tokens per prompt. SD3 attends to all T tokens and ignores it.
    pooled_BE:  pooled text features (SD3), or None (Z-Image).
    """

    tokens_BTE: Tensor
    lengths_B: Tensor
    pooled_BE: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of prompts B."""
        return self.tokens_BTE.shape[0]

    def repeat(self, n: int) -> Condition:
        """Return each row n times in a row: prompt 0 n times, then prompt 1, and so on.

        A single row is not copied: a group's text of a large model is 40 MB.
        """
        if len(self) == 1:
            return self._map(lambda value: value.expand(n, *value.shape[1:]))
        return self._map(lambda value: value.repeat_interleave(n, dim=0))

    def rows(self, index: slice | Sequence[int] | Tensor) -> Condition:
        """Return the rows that `index` (a slice, a list, an int64 tensor) selects, in its order."""
        if not isinstance(index, (slice, Tensor)):
            index = torch.as_tensor(index, device=self.tokens_BTE.device)
        return self._map(lambda value: value[index])

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Condition:
        """Return a copy on `device`, features cast to `dtype`; lengths stay int64."""

        def cast(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        return self._map(cast)

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Return all rows of several conditions, tokens zero-padded to the longest T.

        Raises ValueError when some carry pooled features and others do not.
        """
        if len({condition.pooled_BE is None for condition in conditions}) != 1:
            raise ValueError(
                "cannot join conditions with and without pooled features, or none at all"
            )
        num_tokens = max(condition.tokens_BTE.shape[1] for condition in conditions)
        tokens = [
            F.pad(condition.tokens_BTE, (0, 0, 0, num_tokens - condition.tokens_BTE.shape[1]))
            for condition in conditions
        ]
        pooled = [c.pooled_BE for c in conditions if c.pooled_BE is not None]
        return Condition(
            torch.cat(tokens),
            torch.cat([condition.lengths_B for condition in conditions]),
            torch.cat(pooled) if pooled else None,
        )

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Condition:
        pooled = None if self.pooled_BE is None else fn(self.pooled_BE)
        return Condition(fn(self.tokens_BTE), fn(self.lengths_B), pooled)

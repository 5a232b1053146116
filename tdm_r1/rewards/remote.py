"""A reward that runs elsewhere, asked over HTTP: another machine, another environment.

The protocol is one request. `POST URL` with `Content-Type: application/json` and the body

    {"images": [PNG in base64, ...], "prompts": [text, ...]}

is answered by status 200 and `{"scores": [number, ...]}`, one finite number per picture, larger is
better. 429 and 5xx mean "try again"; any other status means that the request itself is wrong.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from PIL import Image

from tdm_r1.errors import ConfigError, RewardError

log = logging.getLogger(__name__)


class Unavailable(Exception):
    """No answer, or one that says to try again."""


class Remote:
    """Asks `url`; without an answer again after each of `delays`, in seconds, then RewardError."""

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        delays: Sequence[float],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`timeout`, in seconds, is for connecting and for each wait for more of the answer."""
        self.name = f"remote({url})"
        self.url, self.timeout, self.delays, self.sleep = url, timeout, tuple(delays), sleep

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """B numbers.

        Raises:
            RewardError: the server stayed away through every attempt, refused the request, or
                answered something other than the protocol's JSON; names the url and the cause.
                `rewards.score` checks the number of scores and that they are finite.
        """
        body = {"images": [_png(image) for image in images], "prompts": list(prompts)}
        data = json.dumps(body).encode()
        for attempt, delay in enumerate((*self.delays, None), start=1):
            try:
                return self._scores(self._post(data))
            except Unavailable as error:
                if delay is None:
                    raise RewardError(
                        f"the reward server {self.url} is gone: {attempt} attempts, the last one "
                        f"ended with: {error}"
                    ) from error
                log.warning("reward server %s: %s; again in %g s", self.url, error, delay)
                self.sleep(delay)
        raise AssertionError("the last attempt returns or raises")

    def _post(self, data: bytes) -> bytes:
        request = urllib.request.Request(
            self.url, data, {"Content-Type": "application/json", "Accept": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            said = _beginning(error)
            message = f"HTTP {error.code} {error.reason}" + (f": {said}" if said else "")
            if error.code == 429 or error.code >= 500:
                raise Unavailable(message) from error
            raise RewardError(f"the reward server {self.url} refused: {message}") from error
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
            raise Unavailable(f"{type(error).__name__}: {error}") from error

    def _scores(self, answer: bytes) -> list[float]:
        try:
            scores = json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError) as error:
            raise RewardError(
                f'the reward server {self.url} must answer {{"scores": [...]}}; '
                f"got {answer[:100]!r}"
            ) from error
        return scores


def remote(url: str = "", timeout: str = "60", retries: str = "5", backoff: str = "1") -> Remote:
    """`remote(url=http://host:8000/score)` in a recipe: a `Remote` with growing pauses.

    `timeout` in seconds; `retries` after the first attempt, 2^i * `backoff` seconds before the
    i-th from 0: 1, 2, 4, 8 and 16 by default. Raises ConfigError for what is no URL or no number.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"reward: remote wants url=http://... or https://...; got {url!r}")
    wait, number, first = (
        _number("timeout", timeout, above=0),
        _number("retries", retries, above=-1),
        _number("backoff", backoff, above=-1e-9),
    )
    if number != int(number):
        raise ConfigError(f"reward: remote's retries must be a whole number; got {retries!r}")
    return Remote(url, timeout=wait, delays=[first * 2**i for i in range(int(number))])


def _number(name: str, text: str, *, above: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not above < value < float("inf"):
        raise ConfigError(f"reward: remote's {name} must be a positive number; got {text!r}")
    return value


def _beginning(error: urllib.error.HTTPError) -> str:
    """The first 200 bytes of what a server says with an error; "" where they do not come."""
    try:
        return error.read(200).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        return ""


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()

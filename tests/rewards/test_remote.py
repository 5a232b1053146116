"""The remote reward against a real server that answers, stalls, lies, and goes away."""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from tdm_r1.errors import ConfigError, RewardError
from tdm_r1.rewards import load_reward, score
from tdm_r1.rewards.remote import Remote, remote

PROMPTS = ["two red circles", "ein blaues Quadrat, 50 %"]
IMAGES = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]


class Server:
    """Answers each request by the next of `answers`: (status, body), or a function of the request.

    The last answer is given for good. A body that is a function is called after the head.
    """

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((dict(self.headers), json.loads(raw)))
                answers = outer.answers
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                answer = answer(outer.requests[-1][1]) if callable(answer) else answer
                if answer is None:  # hang up without a word
                    self.close_connection = True
                    return
                status, body = answer
                self.send_response(status)
                self.send_header("Content-Length", str(100 if callable(body) else len(body)))
                self.end_headers()
                if callable(body):
                    body()
                else:
                    self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        self.thread.start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(*answers):
        servers.append(Server(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def scores(*values):
    return 200, json.dumps({"scores": values}).encode()


def brightness(request):
    pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in request["images"]]
    assert all(picture.format == "PNG" for picture in pictures)
    return scores(*(float(np.asarray(picture)[..., 0].mean()) for picture in pictures))


def asked(url, delays=(), timeout=5.0):
    """A reward and the pauses that it makes."""
    pauses = []
    return Remote(url, timeout=timeout, delays=delays, sleep=pauses.append), pauses


def test_pictures_and_prompts_arrive_unchanged(serve):
    server = serve(brightness)
    reward = load_reward(f"2*remote(url={server.url}?model=a,timeout=5)+jpeg")
    alone = load_reward("jpeg")(IMAGES, PROMPTS)
    assert np.allclose(score(reward, IMAGES, PROMPTS), [2 * 255, 0] + alone)
    headers, request = server.requests[0]
    assert headers["Content-Type"] == "application/json"
    assert request["prompts"] == PROMPTS and len(request["images"]) == 2


def test_a_server_that_stumbles_is_asked_again_after_growing_pauses(serve):
    busy = (503, b"loading weights")
    server = serve(busy, None, (429, b""), scores(1, 2))
    reward, pauses = asked(server.url, delays=(1, 2, 4, 8))
    assert score(reward, IMAGES, PROMPTS).tolist() == [1, 2]
    assert pauses == [1, 2, 4] and len(server.requests) == 4


def test_a_server_that_is_gone_is_an_error_after_the_last_attempt(serve):
    server = serve(scores(1, 2))
    reward, pauses = asked(server.url, delays=(0.5, 1.0))
    assert score(reward, IMAGES, PROMPTS).tolist() == [1, 2]
    server.stop()
    with pytest.raises(RewardError, match=rf"{server.url} is gone: 3 attempts.*refused"):
        score(reward, IMAGES, PROMPTS)
    assert pauses == [0.5, 1.0]
    server.stop = lambda: None


def test_a_server_that_stalls_times_out(serve):
    over = threading.Event()
    server = serve(lambda request: (over.wait(5), scores(1, 2))[1], scores(3, 4))
    reward, pauses = asked(server.url, delays=(7,), timeout=0.1)
    start = time.perf_counter()
    assert score(reward, IMAGES, PROMPTS).tolist() == [3, 4]
    assert pauses == [7] and time.perf_counter() - start < 4
    over.set()


@pytest.mark.parametrize(("status", "asked_again"), [(503, True), (400, False)])
def test_an_error_whose_text_does_not_come_is_one_all_the_same(serve, status, asked_again):
    over = threading.Event()
    server = serve((status, lambda: over.wait(5)), scores(3, 4))
    reward, pauses = asked(server.url, delays=(7,), timeout=0.1)
    if asked_again:
        assert score(reward, IMAGES, PROMPTS).tolist() == [3, 4]
    else:
        with pytest.raises(RewardError, match=rf"{server.url} refused: HTTP {status} [\w ]+$"):
            score(reward, IMAGES, PROMPTS)
    assert pauses == [7] * asked_again
    over.set()


def test_a_wrong_request_is_not_repeated(serve):
    server = serve((400, b"no such model"))
    reward, pauses = asked(server.url, delays=(1, 2))
    with pytest.raises(RewardError, match="refused: HTTP 400 .*no such model"):
        score(reward, IMAGES, PROMPTS)
    assert not pauses and len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (scores(1.0), r"must return 2 numbers.*shape \[1\]"),
        ((200, b'{"scores": [1.0, NaN]}'), "returned nan for image 1, prompt 'ein blaues"),
        (scores("good", "bad"), "one number per image"),
        (scores(1.0, None), "one number per image"),
        ((200, b'{"rewards": [1, 2]}'), r'must answer \{"scores".*rewards'),
        ((200, b"[1, 2]"), "must answer"),
        ((200, b"<html>hello</html>"), "must answer.*<html>"),
        ((200, b""), "must answer"),
    ],
)
def test_an_answer_outside_the_protocol_is_an_error_at_once(serve, answer, message):
    server = serve(answer)
    reward, pauses = asked(server.url, delays=(1,))
    with pytest.raises(RewardError, match=message):
        score(reward, IMAGES, PROMPTS)
    assert not pauses


def test_options_have_a_meaning_and_limits():
    assert remote("https://a/b").delays == (1, 2, 4, 8, 16)
    assert remote("http://a", retries="2", backoff="0.5").delays == (0.5, 1.0)
    assert remote("http://a", retries="0").delays == ()
    for options, message in (
        ({"url": "ftp://a"}, "wants url=http"),
        ({"url": "host:80"}, "wants url=http"),
        ({"url": "http://a", "timeout": "0"}, "timeout must be"),
        ({"url": "http://a", "timeout": "soon"}, "timeout must be"),
        ({"url": "http://a", "retries": "1.5"}, "whole number"),
        ({"url": "http://a", "backoff": "-1"}, "backoff must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            remote(**options)
    with pytest.raises(ConfigError, match="remote"):
        load_reward("remote")
    with pytest.raises(ConfigError, match="Did you mean 'retries'"):
        load_reward("remote(url=http://a,retry=3)")

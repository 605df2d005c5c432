"""The scorer's HTTP interface, called as a server calls it, before a model that only counts (real: test_serve.py)."""

import asyncio
import json
import logging
import re

import pytest
from starlette.exceptions import HTTPException
from support.http_calls import api, call

from raycv.errors import UserError
from raycv.inference.questions import Question
from raycv.serving.http_api import Gate, Overloaded, TooManyPairsError

CANARY = "quokkacanary"
TOKEN = "a-token-of-the-tests"


def test_one_pair_is_many_of_one():
    app, scorer = api()
    assert call(app, "POST", "/score", {"post": "w0", "criterion": "C0"})[0] == 200
    pair = {"post": "w0", "criterion": "C0"}
    assert call(app, "POST", "/score", {"pairs": [pair], "log": True, "alone": True})[0] == 200
    assert call(app, "POST", "/score", {**pair, "alone": True})[0] == 200
    asked = [Question("w0", "C0")]
    assert scorer.asked == [(asked, False, False), (asked, True, True), (asked, False, True)]
    assert call(app, "GET", "/health") == (200, {"status": "ok"})
    assert call(app, "GET", "/docs")[0] == 200
    assert {"/score", "/health"} == set(call(app, "GET", "/openapi.json")[1]["paths"])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"pairs": []}, 422),
        ({}, 422),
        ([CANARY], 422),
        (CANARY, 422),
        ({"post": 5}, 422),
        ({"post": [CANARY]}, 422),
        ({"post": None}, 422),
        ({"post": CANARY, CANARY: CANARY}, 422),
        ({"pairs": [{"post": CANARY, "criterion": {CANARY: 1}}]}, 422),
        ({"pairs": {CANARY: CANARY}}, 422),
        ({"pairs": [{"post": CANARY}] * 9}, 422),
        ({"post": CANARY * 100}, 422),
        ({"post": CANARY, "log": CANARY}, 422),
        (b'{"post": "quokkacanary \\ud800"}', 422),
        (b'{"post": "quokkacanary', 422),
        (b'{"post": "quokkacanary \xff"}', 400),
        ({"post": CANARY * 3000}, 413),
    ],
)
def test_a_bad_body_is_refused_without_its_text(body, status, caplog):
    app, scorer = api()
    with caplog.at_level(logging.DEBUG):
        got, answer = call(app, "POST", "/score", body)
    assert got == status, answer
    assert set(answer) == {"error", "kind", "remedies"}
    assert answer["kind"] == "scorer-request"
    assert CANARY not in json.dumps(answer) + caplog.text
    assert scorer.asked == []


def test_what_curl_sends_by_itself_is_told_its_header():
    app, scorer = api()
    form = (b"content-type", b"application/x-www-form-urlencoded")
    status, answer = call(app, "POST", "/score", {"post": "w0"}, [form])
    assert status == 422
    assert "send the header Content-Type: application/json" in answer["remedies"]
    assert call(app, "POST", "/score", b'{"post": w0}')[1]["error"] == (
        "The body cannot be read: it is not JSON from character 9 on"
    )
    assert scorer.asked == []


def test_an_announced_size_is_refused_before_the_body_is_read():
    app, _ = api()
    assert call(app, "POST", "/score", b"", [(b"content-length", b"20001")])[0] == 413


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (UserError("The post is empty.", kind="input-empty", remedies=["give its text"]), 400, "input-empty"),
        (TooManyPairsError("too many", kind="scorer-request"), 413, "scorer-request"),
        (Overloaded(), 503, "scorer-unavailable"),
        (RuntimeError(CANARY), 500, "scorer-failed"),
    ],
)
def test_what_the_model_raises(error, status, kind, caplog):
    app, _ = api(error)
    with caplog.at_level(logging.DEBUG):
        got, answer = call(app, "POST", "/score", {"post": "w0"})
    assert got == status
    assert set(answer) == {"error", "kind", "remedies"}
    assert answer["kind"] == kind
    assert CANARY not in json.dumps(answer) + caplog.text


def test_without_the_token_there_is_only_the_page():
    app, scorer = api(token=TOKEN)
    right, wrong = [(b"authorization", f"Bearer {TOKEN}".encode())], [(b"authorization", b"Bearer \xe9")]
    for headers in ([], wrong):
        assert call(app, "POST", "/score", {"post": "w0"}, headers)[0] == 401
        assert call(app, "GET", "/health", headers=headers)[0] == 401
    assert scorer.asked == []
    assert call(app, "POST", "/score", {"post": "w0"}, right)[0] == 200
    # The name of a scheme has no case (RFC 7235), a token has.
    assert call(app, "GET", "/health", headers=[(b"authorization", f"bearer {TOKEN}".encode())])[0] == 200
    assert call(app, "GET", "/health", headers=[(b"authorization", f"Basic {TOKEN}".encode())])[0] == 401
    assert call(app, "GET", "/docs")[0] == 200
    assert call(app, "POST", "/static/../score", {"post": "w0"})[0] in (404, 405)


def test_a_body_that_does_not_come_is_given_up():
    sent = []

    async def app(scope, receive, send):
        await receive()

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    gate = Gate(app, None, 1000, body_seconds=0.05)
    with pytest.raises(HTTPException, match="did not come within"):
        asyncio.run(gate({"type": "http", "headers": [], "path": "/score"}, receive, send))


def test_the_page_needs_no_web():
    app, _ = api(token=TOKEN)
    page = call(app, "GET", "/docs")[1]
    links = re.findall(r'(?:href|src|url)\s*[=:]\s*["\']([^"\']+)', page)
    assert "/openapi.json" in links
    assert len(links) >= 4
    for link in links:
        assert call(app, "GET", link)[0] == 200, link


def test_there_are_no_files():
    app, _ = api()
    for path in ("/", "/../../etc/passwd", "/score/../../etc/passwd", "/docs/../x", "/static/../../etc/passwd"):
        assert call(app, "GET", path)[0] in (404, 405)

"""The retry policy: three attempts, only for what can pass, no secrets in what it says (FR-011)."""

import logging
import random
import subprocess
import sys
import time

import pytest
from support.refusals import refuses

from raycv.common.retry import ServiceError, call_with_retries, cause_of, is_passing, status_of
from raycv.common.secrets import mask_secrets
from raycv.errors import UserError

QUICK = 0.001


class Answer:
    def __init__(self, status_code: int, headers: dict[str, str] | None = None) -> None:
        self.status_code = status_code
        self.headers = headers or {}


class HttpError(Exception):
    """As requests and httpx have it: the response hangs on the error."""

    def __init__(self, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(f"HTTP {status}")
        self.response = Answer(status, headers)


class MlflowLikeError(Exception):
    def __init__(self, error_code: str) -> None:
        super().__init__(error_code)
        self.error_code = error_code


class Flaky:
    """Fails with the given errors, one a call, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


def call(flaky: Flaky, **options) -> str:
    return call_with_retries(
        "the call", flaky, kind="hub-unreachable", remedies=["plug it in", "wait"], base_seconds=QUICK, **options
    )


def test_a_good_call_is_made_once_and_says_nothing(caplog):
    flaky = Flaky()
    assert call(flaky) == "answer"
    assert flaky.calls == 1
    assert caplog.records == []


def test_two_failures_then_an_answer(caplog):
    flaky = Flaky(ConnectionResetError("gone"), HttpError(503))
    assert call(flaky) == "answer"
    assert flaky.calls == 3
    first, second = caplog.messages
    assert first.startswith("the call: attempt 1 of 3 failed (ConnectionResetError: gone); the next one in ")
    assert second.startswith("the call: attempt 2 of 3 failed (HttpError: HTTP 503); the next one in ")
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_three_failures_end_in_one_clear_error(caplog):
    flaky = Flaky(*[TimeoutError(f"slow {i}") for i in range(9)])
    parts = ("the call", "3 times", "TimeoutError: slow 2", "1. plug it in", "2. wait")
    with refuses("hub-unreachable", *parts, error=ServiceError) as caught:
        call(flaky)
    assert flaky.calls == 3
    assert isinstance(caught.value, UserError)
    assert caught.value.cause is caught.value.__cause__
    assert len(caplog.records) == 3


def test_the_number_of_attempts_can_be_set():
    flaky = Flaky(*[TimeoutError() for _ in range(9)])
    with refuses("hub-unreachable", "the call", "5 times", error=ServiceError):
        call(flaky, attempts=5)
    assert flaky.calls == 5


@pytest.mark.parametrize(
    "error",
    [
        HttpError(401),
        HttpError(403),
        HttpError(404),
        HttpError(400),
        ValueError("no"),
        UserError("no", kind="run-failed"),
        KeyError("k"),
    ],
    ids=repr,
)
def test_what_cannot_pass_leaves_unchanged_at_once(error, caplog):
    flaky = Flaky(error)
    with pytest.raises(type(error)) as caught:
        call(flaky)
    assert caught.value is error
    assert flaky.calls == 1
    assert caplog.records == []


def test_a_user_error_is_never_repeated_whatever_the_predicate_says():
    flaky = Flaky(UserError("no", kind="run-failed"))
    with refuses("run-failed", "no"):
        call(flaky, passing=lambda _: True)
    assert flaky.calls == 1


def test_the_predicate_decides():
    flaky = Flaky(KeyError("busy"))
    assert call(flaky, passing=lambda error: isinstance(error, KeyError)) == "answer"


def test_an_error_that_can_pass_followed_by_one_that_cannot():
    flaky = Flaky(HttpError(502), HttpError(403))
    with pytest.raises(HttpError, match="403"):
        call(flaky)
    assert flaky.calls == 2


def test_ctrl_c_is_not_held_up():
    calls = []

    def interrupted() -> None:
        calls.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_with_retries("x", interrupted, kind="hub-unreachable", remedies=[], base_seconds=QUICK)
    assert len(calls) == 1


def waits_of(monkeypatch, errors: list[Exception], base_seconds: float = 1.0) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    call_with_retries(
        "x", Flaky(*errors), kind="hub-unreachable", remedies=[], attempts=len(errors) + 1, base_seconds=base_seconds
    )
    return waits


def test_waits_double_and_jitter(monkeypatch):
    runs = [waits_of(monkeypatch, [TimeoutError() for _ in range(4)], base_seconds=0.5) for _ in range(20)]
    for waits in runs:
        for wait, least in zip(waits, (0.5, 1, 2, 4), strict=True):
            assert least <= wait <= 1.5 * least
    assert len({waits[0] for waits in runs}) == 20


def test_a_server_that_asks_for_a_longer_wait_gets_it(monkeypatch):
    errors = [HttpError(429, {"Retry-After": "7"}), HttpError(429, {"Retry-After": "99999"}), TimeoutError()]
    first, second, third = waits_of(monkeypatch, errors)
    assert 7 <= first <= 7 * 1.5
    assert 60 <= second <= 60 * 1.5
    assert 4 <= third <= 4 * 1.5


def test_an_odd_retry_after_is_passed_over(monkeypatch):
    (wait,) = waits_of(monkeypatch, [HttpError(503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})])
    assert 1 <= wait <= 1.5


def test_jitter_leaves_the_seeded_random_state_alone():
    random.seed(5)
    before = random.getstate()
    call(Flaky(TimeoutError(), TimeoutError()))
    assert random.getstate() == before


def raised(inner: Exception, outer: Exception) -> Exception:
    """`outer` as it is after `raise outer from inner`."""
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (ConnectionRefusedError(), True),
        (BrokenPipeError(), True),
        (TimeoutError(), True),
        (HttpError(429), True),
        (HttpError(500), True),
        (HttpError(504), True),
        (HttpError(404), False),
        (OSError("disk"), False),
        (MlflowLikeError("TEMPORARILY_UNAVAILABLE"), True),
        (MlflowLikeError("RESOURCE_DOES_NOT_EXIST"), False),
        (MlflowLikeError("INTERNAL_ERROR"), False),
        (raised(ConnectionRefusedError(), MlflowLikeError("INTERNAL_ERROR")), True),
        (raised(TimeoutError(), MlflowLikeError("INVALID_PARAMETER_VALUE")), False),
        (raised(TimeoutError(), OSError("not found in the cache")), True),
        (raised(HttpError(403), ConnectionError()), True),
        (raised(TimeoutError(), HttpError(403)), False),
        (ConnectionError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate"), False),
    ],
    ids=repr,
)
def test_what_can_pass(error, verdict):
    assert is_passing(error) is verdict


def test_errors_of_requests_and_mlflow_are_known():
    import http.client

    import requests
    from huggingface_hub.errors import OfflineModeIsEnabled
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE

    assert is_passing(requests.ConnectionError())
    assert is_passing(requests.ReadTimeout())
    assert is_passing(requests.ConnectTimeout())
    assert is_passing(requests.exceptions.ChunkedEncodingError())
    assert is_passing(http.client.IncompleteRead(b""))
    assert is_passing(MlflowException("database is locked", error_code=TEMPORARILY_UNAVAILABLE))
    assert not is_passing(MlflowException("x", error_code=INVALID_PARAMETER_VALUE))
    assert not is_passing(MlflowException("a fault of its own"))
    assert not is_passing(requests.exceptions.InvalidURL())
    assert not is_passing(OfflineModeIsEnabled("offline"))
    response = requests.Response()
    response.status_code = 503
    assert is_passing(requests.HTTPError(response=response))
    response.status_code = 404
    assert status_of(requests.HTTPError(response=response)) == 404


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://ann:s3cret@host:5000/api", "http://***@host:5000/api"),
        ("postgresql://ann:p@ss@db/x", "postgresql://***@db/x"),
        ("postgresql://ann:p/ss@db/x", "postgresql://***@db/x"),
        ("https://justatoken@host/x", "https://***@host/x"),
        ("see http://a:b@c/d and http://e:f@g", "see http://***@c/d and http://***@g"),
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer ***"),
        ("{'authorization': 'Basic dXNlcg=='}", "{'authorization': 'Basic ***'}"),
        ("token hf_" + "ABCdef1234" * 3 + "abcd was", "token hf_*** was"),
        ("no folder /data/hf_checkpoints/llama", "no folder /data/hf_checkpoints/llama"),
        ("http://ann:my s3cret@host:5000/api", "http://***@host:5000/api"),
        ("https://cdn/x?X-Amz-Signature=0a1b&Expires=9", "https://cdn/x?X-Amz-Signature=***&Expires=9"),
        ("https://cdn/x?a=1&access_token=zz", "https://cdn/x?a=1&access_token=***"),
        ("host=db user=ann password=s3cret port=1", "host=db user=ann password=*** port=1"),
        ("http://127.0.0.1:5000/api/2.0 refused", "http://127.0.0.1:5000/api/2.0 refused"),
        ("sqlite:////data/mlflow.db is locked", "sqlite:////data/mlflow.db is locked"),
        ("no folder http:/ann:s3cret@host", "no folder http:/***@host"),
        ("sqlite:////home/ann@work/mlflow.db is locked", "sqlite:////home/ann@work/mlflow.db is locked"),
        ("mail ann@example.org about org/model@main", "mail ann@example.org about org/model@main"),
    ],
)
def test_secrets_are_masked(text, masked):
    assert mask_secrets(text) == masked


def test_no_secret_reaches_log_or_message(caplog):
    url = "http://ann:s3cret@tracking:5000"
    flaky = Flaky(*[ConnectionError(f"no route to {url}/api") for _ in range(3)])
    with refuses("hub-unreachable", "http://***@tracking:5000/api", error=ServiceError) as caught:
        call_with_retries(f"opening {url}", flaky, kind="hub-unreachable", remedies=["x"], base_seconds=QUICK)
    assert "s3cret" not in str(caught.value) + caplog.text


def test_a_cause_is_one_short_line():
    text = cause_of(ValueError("first\n\nsecond  third " + "x" * 1000))
    assert text.startswith("ValueError: first second third xxx")
    assert len(text) < 330
    assert cause_of(TimeoutError()) == "TimeoutError"


def test_importing_is_cheap():
    heavy = ("mlflow", "requests", "huggingface_hub")
    code = f"import sys, raycv.common.retry; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

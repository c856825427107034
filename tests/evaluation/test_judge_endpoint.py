"""The client against a real HTTP server that answers slowly, wrongly, half, or not at all."""

import json
import logging
import threading
import time
import traceback
from email.utils import formatdate
from pathlib import Path

import pytest
from judge_server import LOGPROBS, Handler, JudgeServer, completion

from rto.evaluation.judging.endpoint import Cache, Endpoint, EndpointError, Failure, Patience, Prices, Reply, _seconds

KEY = "sk-test-0123456789abcdef"
SOON = Patience(base=0.01, timeout=0.3, retries=2)


def talk(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def fine(handler: Handler, body: dict, n: int) -> None:
    handler.say(completion(f"to {body['messages'][0]['content']}"))


FAULTS = {
    "HTTP 500": lambda h: h.say({"error": {"message": "overloaded"}}, 500),
    "HTTP 503": lambda h: h.say(b"<html>busy</html>", 503),
    "HTTP 429": lambda h: h.say({"error": {"message": "rate limit"}}, 429, Retry_After="0"),
    "time-out": lambda h: time.sleep(0.5),
    "time-out, dripping": lambda h: h.drip(1.0),
    "connection": lambda h: h.hang_up(),
    "connection, half": lambda h: h.half(),
    "garbage": lambda h: h.say(b"<html>welcome</html>"),
    "garbage, cut JSON": lambda h: h.say(json.dumps(completion()).encode()[:-20]),
    "garbage, no choices": lambda h: h.say({"choices": []}),
    "garbage, list": lambda h: h.say([1, 2]),
    "garbage, number": lambda h: h.say({"choices": [{"message": {"content": 7}}]}),
    "garbage, logprobs": lambda h: h.say(
        {"choices": [{"message": {"content": "m"}, "logprobs": {"content": [{"top_logprobs": ["m"]}]}}]}
    ),
    "garbage, deep": lambda h: h.say(b"[" * 100_000),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_tried_again(fault: str) -> None:
    """The first request meets the fault, the second an answer; both are counted, the fault by its kind."""

    def behave(handler: Handler, body: dict, n: int) -> None:
        FAULTS[fault](handler) if n == 0 else fine(handler, body, n)

    with JudgeServer(behave) as server:
        endpoint = Endpoint(server.url, "judge", patience=SOON)
        (reply,) = endpoint.ask(talk("you"), {})
    assert isinstance(reply, Reply)
    assert reply.text == "to you"
    assert (endpoint.usage.requests, endpoint.usage.retries, endpoint.usage.failed) == (2, 1, 0)
    assert dict(endpoint.usage.retry_reasons) == {fault.split(",")[0]: 1}


def test_what_fails_again_and_again_is_a_failure_with_its_reason() -> None:
    def behave(handler: Handler, body: dict, n: int) -> None:
        bad = body["messages"][0]["content"] == "bad"
        handler.say({"error": {"message": "no luck"}}, 500) if bad else fine(handler, body, n)

    with JudgeServer(behave) as server:
        endpoint = Endpoint(server.url, "judge", patience=SOON)
        replies = endpoint.ask(talk("a", "bad", "b"), {})
    assert [type(r) for r in replies] == [Reply, Failure, Reply]
    assert replies[1].reason == "HTTP 500: 'no luck'"
    assert [b["messages"][0]["content"] for b in server.bodies].count("bad") == 3
    assert (endpoint.usage.answered, endpoint.usage.failed, endpoint.usage.retries) == (2, 1, 2)


def test_a_request_that_is_at_fault_itself_is_not_sent_again() -> None:
    def behave(handler: Handler, body: dict, n: int) -> None:
        handler.say({"error": {"message": "context length exceeded"}}, 400)

    with JudgeServer(behave) as server:
        (reply,) = Endpoint(server.url, "judge", patience=SOON).ask(talk("long"), {})
    assert reply == Failure(reason="HTTP 400: 'context length exceeded'")
    assert len(server.bodies) == 1


def test_requests_that_are_at_fault_themselves_do_not_end_the_run() -> None:
    """Twelve answers too long for the judge, one after another, say nothing about the thirteenth."""

    def behave(handler: Handler, body: dict, n: int) -> None:
        handler.say({}, 400) if n < 12 else fine(handler, body, n)

    with JudgeServer(behave) as server:
        endpoint = Endpoint(server.url, "judge", patience=SOON, concurrency=1)
        replies = endpoint.ask(talk(*map(str, range(13))), {})
    assert [type(r) for r in replies] == [Failure] * 12 + [Reply]


def test_half_a_surrogate_pair_goes_there_and_back() -> None:
    """In JSON it can be written, in UTF-8 it cannot: it must neither end the run nor come back to end the next one."""
    with JudgeServer(lambda h, b, n: h.say(b'{"choices": [{"message": {"content": "a \\ud800 b"}}]}')) as server:
        endpoint = Endpoint(server.url, "judge", patience=SOON)
        (reply,) = endpoint.ask(talk("half a \ud83d pair"), {})
        endpoint.ask(talk(reply.text), {})
    assert reply.text == "a ? b"
    assert [b["messages"][0]["content"] for b in server.bodies] == ["half a \ud83d pair", "a ? b"]


def test_a_server_that_asks_for_time_is_given_it() -> None:
    def behave(handler: Handler, body: dict, n: int) -> None:
        handler.say({}, 429, Retry_After="1") if n == 0 else fine(handler, body, n)

    with JudgeServer(behave) as server:
        start = time.monotonic()
        (reply,) = Endpoint(server.url, "judge", patience=SOON).ask(talk("you"), {})
        assert time.monotonic() - start >= 1.0
    assert isinstance(reply, Reply)


def test_a_server_that_asks_for_too_much_time_is_not_waited_for() -> None:
    def behave(handler: Handler, body: dict, n: int) -> None:
        handler.say({}, 429, Retry_After="3600")

    with JudgeServer(behave) as server:
        (reply,) = Endpoint(server.url, "judge", patience=SOON).ask(talk("you"), {})
    assert isinstance(reply, Failure)
    assert len(server.bodies) == 1


def test_waits_double_up_to_the_cap_with_jitter_below() -> None:
    patience = Patience(base=1.0, cap=8.0)
    for attempt, most in enumerate([1, 2, 4, 8, 8, 8]):
        waits = [patience.wait(attempt, None) for _ in range(200)]
        assert most / 2 <= min(waits) < 0.6 * most
        assert 0.9 * most < max(waits) <= most
    assert patience.wait(0, 30.0) == 30.0


def test_retry_after_is_a_number_or_a_date() -> None:
    assert _seconds("17") == 17
    assert _seconds(formatdate(time.time() + 90, usegmt=True)) == pytest.approx(90, abs=2)
    assert _seconds(formatdate(time.time() - 90, usegmt=True)) == 0
    for nonsense in (None, "soon", "-5", "nan", "inf", "1e400"):
        assert _seconds(nonsense) is None


@pytest.mark.parametrize(
    ("status", "says"), [(401, "API key"), (403, "API key"), (404, "model's name"), (302, "addr")]
)
def test_what_refuses_everybody_ends_it(status: int, says: str) -> None:
    def behave(handler: Handler, body: dict, n: int) -> None:
        handler.say({"error": {"message": "no"}}, status, Location="http://127.0.0.1:1/")

    with (
        JudgeServer(behave) as server,
        pytest.raises(EndpointError, match=f"HTTP {status}: 'no'.*{says}"),
    ):
        Endpoint(server.url, "judge", patience=SOON, concurrency=1).ask(talk(*"abcdef"), {})
    assert len(server.bodies) <= 2


def test_an_endpoint_that_is_down_is_given_up() -> None:
    patience = Patience(base=0.001, retries=1, give_up_after=3, timeout=0.3)
    with (
        JudgeServer(lambda h, b, n: h.say({}, 500)) as server,
        pytest.raises(EndpointError, match="3 requests in a row"),
    ):
        Endpoint(server.url, "judge", patience=patience, concurrency=1).ask(talk(*map(str, range(50))), {})
    assert 6 <= len(server.bodies) <= 8


def test_requests_run_side_by_side_and_not_more_than_asked() -> None:
    """The server answers nobody before four are there; a client that asks one by one would never end."""
    together = threading.Barrier(4, timeout=5)

    def behave(handler: Handler, body: dict, n: int) -> None:
        together.wait()
        fine(handler, body, n)

    with JudgeServer(behave) as server:
        endpoint = Endpoint(server.url, "judge", patience=Patience(timeout=10, retries=0), concurrency=4)
        replies = endpoint.ask(talk(*map(str, range(12))), {})
    assert [r.text for r in replies] == [f"to {i}" for i in range(12)]
    assert server.most == 4


def test_tokens_and_costs_are_added_up() -> None:
    def behave(handler: Handler, body: dict, n: int) -> None:
        n_tokens = len(body["messages"][0]["content"])
        handler.say(completion("x", usage=None if n_tokens == 3 else (100 * n_tokens, 7)))

    with JudgeServer(behave) as server:
        endpoint = Endpoint(server.url, "judge", patience=SOON, prices=Prices(prompt=10.0, completion=30.0))
        replies = endpoint.ask(talk("a", "bb", "ccc", "bb"), {})
    usage = endpoint.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.uncounted) == (300, 14, 1)
    assert (usage.requests, usage.answered, usage.cached) == (3, 3, 1)  # equal conversations are sent once
    assert "$0.0034" in usage.report(endpoint.prices)  # (300 · 10 + 14 · 30) / 10⁶ = 0.00342
    assert endpoint.cost(replies[0]) == pytest.approx((100 * 10 + 7 * 30) / 1e6, rel=1e-12)
    assert endpoint.cost(replies[2]) is None


# --- the cache


def test_a_rerun_costs_nothing_and_other_content_is_asked_for(tmp_path: Path) -> None:
    with JudgeServer(lambda h, b, n: h.say(completion("m", LOGPROBS))) as server:

        def ask(model: str = "judge", text: str = "a", **parameters: int) -> Endpoint:
            endpoint = Endpoint(server.url, model, cache=Cache(tmp_path / "c.jsonl"), patience=SOON)
            (reply,) = endpoint.ask(talk(text), parameters)
            assert isinstance(reply, Reply)
            assert reply.top_logprobs[0]["logprob"] == LOGPROBS["m"]
            return endpoint

        ask()
        again = ask()
        assert len(server.bodies) == 1
        assert (again.usage.requests, again.usage.cached, again.usage.prompt_tokens) == (0, 1, 0)
        ask(model="other")
        ask(text="b")
        ask(seed=1)
        assert len(server.bodies) == 4
        assert server.bodies[-1] == {"model": "judge", "messages": talk("a")[0], "seed": 1}


def test_an_answer_without_the_log_probabilities_asked_for_is_not_kept(tmp_path: Path) -> None:
    """Or switching them on at the server would never be noticed."""
    switched_on = [False]

    def behave(handler: Handler, body: dict, n: int) -> None:
        handler.say(completion("m", LOGPROBS if switched_on[0] else None))

    with JudgeServer(behave) as server:

        def ask() -> Reply:
            endpoint = Endpoint(server.url, "judge", cache=Cache(tmp_path / "c.jsonl"), patience=SOON)
            return endpoint.ask(talk("a"), {"logprobs": True})[0]

        assert ask().top_logprobs is None
        switched_on[0] = True
        assert ask().top_logprobs[0]["logprob"] == LOGPROBS["m"]
        ask()
        assert len(server.bodies) == 2


def test_what_was_answered_before_the_end_is_kept(tmp_path: Path) -> None:
    """The fifth request ends everything; the next run asks for the rest only."""
    broken = [True]

    def behave(handler: Handler, body: dict, n: int) -> None:
        handler.say({}, 401) if n == 4 and broken[0] else fine(handler, body, n)

    with JudgeServer(behave) as server:

        def ask() -> list:
            endpoint = Endpoint(server.url, "j", cache=Cache(tmp_path / "c"), patience=SOON, concurrency=1)
            return endpoint.ask(talk(*map(str, range(9))), {})

        with pytest.raises(EndpointError, match="401"):
            ask()
        asked, broken[0] = len(server.bodies), False
        assert [r.text for r in ask()] == [f"to {i}" for i in range(9)]
    answered_before = asked - 1
    assert answered_before >= 4
    assert len(server.bodies) - asked == 9 - answered_before


def reply(text: str) -> Reply:
    return Reply(text=text, top_logprobs=None, finish_reason="stop", prompt_tokens=1, completion_tokens=1, seconds=0.5)


def fill(path: Path, who: str, barrier: threading.Barrier) -> None:
    cache = Cache(path)
    barrier.wait()
    for i in range(60):
        cache.put(f"{who}{i}", reply(f"{who} {i} " + "x" * 5000))


def test_several_writers_leave_whole_lines(tmp_path: Path) -> None:
    path, barrier = tmp_path / "cache.jsonl", threading.Barrier(3)
    threads = [threading.Thread(target=fill, args=(path, who, barrier)) for who in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache = Cache(path)
    assert cache.damaged == 0
    assert all(cache.get(f"{who}{i}").text.startswith(f"{who} {i} ") for who in "abc" for i in range(60))


def test_half_a_line_is_passed_over_and_hurts_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache.jsonl"
    writer = Cache(path)
    writer.put("a", reply("first"))
    writer.put("b", reply("second"))
    data = path.read_bytes()
    path.write_bytes(data[:-30] + b"")  # a kill in the middle of the second line
    late, reader = Cache(path), Cache(path)
    assert reader.get("b") is None
    late.put("c", reply("third"))
    assert reader.get("c").text == "third"  # added by another writer, after the half line
    assert reader.get("a") == Cache(path).get("a")
    assert reader.get("a").cached
    assert Cache(path).damaged == 1
    assert "1 lines are damaged" in caplog.text


# --- the key


def test_the_key_reaches_no_file_no_log_and_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    """Even where the server repeats it, in errors and in answers."""
    monkeypatch.setenv("SOME_KEY", KEY + "\n")
    caplog.set_level(logging.DEBUG)  # at which httpcore2 writes down the headers of answers

    def behave(handler: Handler, body: dict, n: int) -> None:
        text = body["messages"][0]["content"]
        if text == "bad":
            handler.say({"error": {"message": f"invalid key {KEY}"}}, 400)
        elif text == "worse":
            handler.say(f"who is {KEY}?".encode())
        elif text == "worst":
            handler.say({"error": {"message": f"Incorrect API key provided: {KEY}"}}, 401)
        elif text == "hidden":
            escaped = "".join(f"\\u{ord(c):04x}" for c in KEY)
            handler.say(json.dumps(completion("see X")).replace("X", escaped).encode())
        else:
            handler.say(completion(f"your key is {KEY}", {"m": -1.0, KEY: -2.0}), 200, X_Echo=KEY)

    with JudgeServer(behave) as server:
        cache = Cache(tmp_path / "cache.jsonl")
        endpoint = Endpoint(server.url, "judge", key_variable="SOME_KEY", cache=cache, patience=SOON)
        replies = endpoint.ask(talk("good", "bad", "worse", "hidden"), {})
        with pytest.raises(EndpointError) as error:
            endpoint.ask(talk("worst"), {})
    assert set(server.keys) == {f"Bearer {KEY}"}  # it did travel
    assert replies[0].text == "your key is [key]"
    assert replies[3].text == "see [key]"
    everything = [str(error.value), "".join(traceback.format_exception(error.value)), repr(endpoint), repr(replies)]
    everything += [caplog.text, *capfd.readouterr(), endpoint.usage.report(None)]
    everything += [p.read_text() for p in tmp_path.rglob("*") if p.is_file()]
    assert "Incorrect API key provided: [key]" in everything[0]
    for text in everything:
        assert KEY not in text
        assert KEY[:12] not in text


@pytest.mark.parametrize(
    ("address", "variable", "value", "says"),
    [
        ("localhost:8000", None, None, "base_url must be like"),
        ("ftp://x/v1", None, None, "base_url must be like"),
        (f"http://me:{KEY}@localhost/v1", None, None, "must hold no user, password"),
        (f"http://localhost/v1?key={KEY}", None, None, "must hold no user, password"),
        ("http://localhost/v1", "SOME_KEY", None, "SOME_KEY is not set"),
        ("http://localhost/v1", "SOME_KEY", " \n", "SOME_KEY is not set"),
        ("http://localhost/v1", KEY, None, r"variable that was named \(not shown here"),
        ("http://localhost/v1", KEY.replace("-", "_"), None, r"variable that was named \(not shown here"),
        ("http://localhost/v1", "SOME_KEY", f"{KEY}\r\nX-Evil: 1", "does not hold an API key"),
        ("http://example.com/v1", "SOME_KEY", KEY, "must not travel in clear text to example.com"),
    ],
)
def test_addresses_and_keys_are_checked_first(
    address: str, variable: str | None, value: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(EndpointError, match=says) as error:
        Endpoint(address, "judge", key_variable=variable)
    assert KEY[3:] not in str(error.value).replace("_", "-")


def test_a_key_for_openai_is_not_sent_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with JudgeServer(fine) as server:
        Endpoint(server.url, "judge", patience=SOON).ask(talk("you"), {})
    assert server.keys == [None]
    assert Endpoint("https://api.openai.com/v1", "judge")._key == KEY

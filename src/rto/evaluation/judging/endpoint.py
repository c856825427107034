"""A client for OpenAI-compatible chat endpoints: concurrent, retrying, counted, cached; its key reaches no file.

The form of requests and answers is OpenAI's ``/v1/chat/completions``, as hosted models, vLLM and llama.cpp serve it.
"""

import email.utils
import fcntl
import hashlib
import json
import logging
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.progress import track

from rto.terminal import Terminal

logger = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
LARGEST_BODY = 16 * 2**20
"""Bytes; a judge's answer is some kilobytes, what is larger is none."""


class EndpointError(ValueError):
    """An endpoint that cannot be used; the message says what it answered and what to do, and never holds the key."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """US dollars for a million tokens, as the endpoint's owner publishes them."""

    prompt: float
    completion: float

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """(n_prompt · price_prompt + n_completion · price_completion) / 10⁶, in US dollars."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True, kw_only=True)
class Patience:
    """When to try again. Wait before attempt k + 1: max(Retry-After, U(½, 1) · min(cap, base · 2^k)) seconds."""

    retries: int = 6
    timeout: float = 120.0
    """Seconds for one attempt, from the first byte sent to the last received."""
    base: float = 1.0
    cap: float = 60.0
    longest_wait: float = 300.0
    """A server that asks for more patience than this has its request given up."""
    give_up_after: int = 10
    """Requests that fail one after another, each after all its retries, before the rest is called off; those that
    are at fault themselves (HTTP 400, 413, 422) are not among them."""

    def wait(self, attempt: int, retry_after: float | None) -> float:
        """Seconds before the next attempt."""
        return max(retry_after or 0.0, random.uniform(0.5, 1.0) * min(self.cap, self.base * 2**attempt))


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model answered."""

    text: str
    top_logprobs: list[dict[str, Any]] | None
    """Candidates for the first token with their log-probabilities, nats; None where the server gives none."""
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float
    cached: bool = False


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A request without an answer."""

    reason: str


@dataclass
class Usage:
    """Counts over all requests of a client."""

    requests: int = 0
    """Sent, retries included."""
    retries: int = 0
    retry_reasons: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    cached: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    """Answers whose tokens the server did not tell."""

    def report(self, prices: Prices | None) -> str:
        """One line for people."""
        tokens = f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens"
        missing = f" (not told for {self.uncounted} answers)" if self.uncounted else ""
        cost = "" if prices is None else f", ${prices.of(self.prompt_tokens, self.completion_tokens):.4f}"
        again = f", {self.retries} retries ({_counts(self.retry_reasons)})" if self.retries else ""
        return (
            f"{self.answered} answered, {self.cached} from the cache, {self.failed} failed; "
            f"{self.requests} requests{again}; {tokens}{missing}{cost}"
        )


class Cache:
    """Answers by content: SHA-256 of model, messages and parameters → answer. One JSON line each, only appended.

    A line is written at once, under a lock, and flushed to disk, so that kills and other writers cost nothing: half
    a line is passed over and counted, and what others have added is found.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.damaged = path, 0
        self._found: dict[str, Reply] = {}
        self._read = 0
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._refresh()
        if self.damaged:
            logger.warning("%s: %d lines are damaged and passed over", path, self.damaged)

    @staticmethod
    def key(model: str, messages: Sequence[Mapping[str, str]], parameters: Mapping[str, Any]) -> str:
        """The digest that an answer is kept under."""
        content = {"model": model, "messages": list(messages), "parameters": dict(parameters)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Reply | None:
        """An answer, also one that another process has added since."""
        with self._lock:
            if key not in self._found:
                self._refresh()
            return self._found.get(key)

    def put(self, key: str, answer: Reply) -> None:
        """Keep an answer."""
        kept = {name: value for name, value in vars(answer).items() if name != "cached"}
        line = json.dumps({"key": key, "answer": kept}).encode() + b"\n"
        with self._lock, self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if (end := file.seek(0, os.SEEK_END)) and os.pread(file.fileno(), 1, end - 1) != b"\n":
                line = b"\n" + line  # ends the half line that a kill left
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self._found[key] = replace(answer, cached=True)

    def _refresh(self) -> None:
        if not self.path.exists() or self.path.stat().st_size <= self._read:
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.split(b"\n"):
            if not line:
                continue
            try:
                row = json.loads(line)
                self._found[row["key"]] = Reply(**row["answer"], cached=True)
            except (ValueError, KeyError, TypeError):
                self.damaged += 1


class Endpoint:
    """One model behind an OpenAI-compatible chat endpoint.

    Args:
        base_url: up to and without ``/chat/completions``, like ``http://localhost:8000/v1``.
        model: the model's name there.
        key_variable: the environment variable that holds the API key; None sends none, except to OpenAI's own
            address, whose key is in ``OPENAI_API_KEY``.
        cache: answers that are known; None asks for each one.
        patience: time-outs and retries.
        concurrency: requests under way at once.
        prices: for the count of costs.

    Raises:
        EndpointError: the address or the key cannot be used; checked before any request.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str | None = None,
        cache: Cache | None = None,
        patience: Patience = Patience(),
        concurrency: int = 8,
        prices: Prices | None = None,
    ) -> None:
        if concurrency < 1:
            raise EndpointError(f"concurrency must be at least 1, got {concurrency}")
        self.url = _address(base_url)
        self.model, self.cache, self.patience, self.prices = model, cache, patience, prices
        self.concurrency = concurrency
        self.usage = Usage()
        self._key = _read_key(key_variable or ("OPENAI_API_KEY" if base_url.startswith(OPENAI) else None), self.url)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._in_a_row = 0

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.model!r})"

    def ask(
        self, conversations: Sequence[Sequence[Mapping[str, str]]], parameters: Mapping[str, Any]
    ) -> list[Reply | Failure]:
        """An answer, or the reason why there is none, to each conversation.

        Equal conversations are sent once. What was answered is in the cache as soon as it is there, so a call that
        was killed or called off costs nothing twice.

        Raises:
            EndpointError: the endpoint refuses everybody (key, address, model), or fails again and again.
        """
        keys = [Cache.key(self.model, messages, parameters) for messages in conversations]
        unique = dict(zip(keys, conversations))
        found: dict[str, Reply | Failure] = {}
        for key in unique:
            known = None if self.cache is None else self.cache.get(key)
            if known is not None and _is_asked_for(known, parameters):
                found[key] = known
        left = [key for key in unique if key not in found]
        self._stop.clear()
        self._in_a_row = 0
        with self._client() as client, ThreadPoolExecutor(self.concurrency) as pool:
            jobs = {pool.submit(self._answer, client, key, unique[key], parameters): key for key in left}
            try:
                for job in _shown(as_completed(jobs), len(jobs)):
                    found[jobs[job]] = job.result()
            except BaseException:
                self._stop.set()  # ends waits, and requests after their present attempt
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        replies = [found[key] for key in keys]
        self.usage.cached += sum(isinstance(r, Reply) for r in replies) - sum(
            isinstance(found[key], Reply) for key in left
        )
        return replies

    def cost(self, reply: Reply) -> float | None:
        """US dollars that an answer costs by its tokens, whenever it was paid; None where that is not known."""
        if self.prices is None or reply.prompt_tokens is None or reply.completion_tokens is None:
            return None
        return self.prices.of(reply.prompt_tokens, reply.completion_tokens)

    @contextmanager
    def _client(self) -> Iterator[Any]:
        try:
            import httpx2
        except ImportError as error:
            raise EndpointError(
                "a judge behind an endpoint needs httpx2: pip install 'reinforced-token-optimization[judge]'"
            ) from error
        proxies = not _is_local(urlsplit(self.url).hostname or "")  # what runs here is not asked through a proxy
        with (
            _without_headers("httpcore2"),
            httpx2.Client(headers=self._headers(), timeout=self.patience.timeout, trust_env=proxies) as client,
        ):
            yield client

    def _headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return {"Content-Type": "application/json", **key}

    def _answer(
        self, client: Any, key: str, messages: Sequence[Mapping[str, str]], parameters: Mapping[str, Any]
    ) -> Reply | Failure:
        """One conversation with all its attempts."""
        body = {"model": self.model, "messages": list(messages), **parameters}
        reason, again = "called off", False
        for attempt in range(self.patience.retries + 1):
            if self._stop.is_set():
                return Failure(reason=reason)
            outcome = self._attempt(client, body)
            if isinstance(outcome, Reply):
                return self._settle(key, outcome, keep=_is_asked_for(outcome, parameters))
            reason, again = outcome.reason, outcome.again
            wait = self.patience.wait(attempt, outcome.retry_after)
            if not again or attempt == self.patience.retries or wait > self.patience.longest_wait:
                break
            with self._lock:
                self.usage.retries += 1
                self.usage.retry_reasons[outcome.kind] += 1
            self._stop.wait(wait)
        return self._fail(reason, own_fault=not again)

    def _settle(self, key: str, reply: Reply, *, keep: bool) -> Reply:
        if self.cache is not None and keep:
            self.cache.put(key, reply)
        with self._lock:
            self._in_a_row = 0
            self.usage.answered += 1
            self.usage.prompt_tokens += reply.prompt_tokens or 0
            self.usage.completion_tokens += reply.completion_tokens or 0
            self.usage.uncounted += reply.prompt_tokens is None or reply.completion_tokens is None
        return reply

    def _fail(self, reason: str, *, own_fault: bool) -> Failure:
        """Count a failure; one that is the request's own fault (too long, say) tells nothing about the others."""
        with self._lock:
            self.usage.failed += 1
            self._in_a_row += not own_fault
            if self._in_a_row >= self.patience.give_up_after:
                raise EndpointError(
                    f"{self.url}: {self._in_a_row} requests in a row had no answer, the last one: {reason}. What was "
                    "answered is kept; run again to go on"
                )
        return Failure(reason=reason)

    def _attempt(self, client: Any, body: Mapping[str, Any]) -> "Reply | _Refusal":
        """Send once. Whatever text comes back from the server loses the key before anybody sees it."""
        import httpx2

        with self._lock:
            self.usage.requests += 1
        start = time.monotonic()
        try:
            with client.stream("POST", self.url, content=json.dumps(body).encode()) as response:
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if time.monotonic() - start > self.patience.timeout:
                        return _Refusal(reason=f"no whole answer in {self.patience.timeout:g} s", kind="time-out")
                    if len(data) > LARGEST_BODY:
                        return _Refusal(reason=f"an answer of over {LARGEST_BODY} bytes", kind="garbage")
                status, headers = response.status_code, response.headers
        except httpx2.TimeoutException:
            return _Refusal(reason=f"no answer in {self.patience.timeout:g} s", kind="time-out")
        except httpx2.HTTPError as error:  # refused, reset, cut off, not HTTP
            return _Refusal(reason=self._clean(f"{type(error).__name__}: {error}"), kind="connection")
        text = self._clean(_plain(data.decode("utf-8", errors="replace")))
        text = text.encode("utf-8", errors="replace").decode()  # half a surrogate pair, escaped, is no text
        if status == 200:
            reply = _read_reply(text, time.monotonic() - start)
            return reply if isinstance(reply, Reply) else _Refusal(reason=reply, kind="garbage")
        return self._refused(status, headers.get("retry-after"), text)

    def _refused(self, status: int, retry_after: str | None, text: str) -> "_Refusal":
        """An HTTP error: worth another attempt, this request's own fault, or everybody's."""
        reason = f"HTTP {status}: {_said(text)}"
        if status in (408, 409, 425, 429) or status >= 500:
            return _Refusal(reason=reason, kind=f"HTTP {status}", retry_after=_seconds(retry_after))
        if status in (400, 413, 422):
            return _Refusal(reason=reason, kind=f"HTTP {status}", again=False)
        remedy = {
            401: "check the API key in its environment variable",
            403: "check what the API key may do",
            404: f"check the address and the model's name, {self.model}",
        }
        raise EndpointError(f"{self.url}: {reason}; {remedy.get(status, 'check the address')}")

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


@dataclass(frozen=True, kw_only=True)
class _Refusal:
    """An attempt without an answer."""

    reason: str
    kind: str
    again: bool = True
    retry_after: float | None = None


def _is_asked_for(reply: Reply, parameters: Mapping[str, Any]) -> bool:
    """Whether an answer is worth keeping: not one without log-probabilities that were asked for.

    Kept, it would answer for the server for ever, also once log-probabilities are switched on there.
    """
    return bool(reply.top_logprobs) or not parameters.get("logprobs")


def _read_reply(text: str, seconds: float) -> Reply | str:
    """The parts of an answer that judges read, or what is wrong with it."""
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        content = choice["message"]["content"]
        usage = body.get("usage") or {}
        tokens = (choice.get("logprobs") or {}).get("content") or []
        top = tokens[0].get("top_logprobs") if tokens else None
        finish = choice.get("finish_reason")
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"not a chat completion ({type(error).__name__}): {_said(text)}"
    if content is None:  # all tokens went into reasoning, say: an answer, with nothing in it
        content = ""
    whole = top is None or (isinstance(top, list) and all(isinstance(candidate, dict) for candidate in top))
    if not isinstance(content, str) or not whole:
        return f"not a chat completion: {_said(text)}"
    prompt, completion = (n if isinstance(n, int) and 0 <= n < 2**53 else None for n in counts)
    return Reply(
        text=content,
        top_logprobs=top,
        finish_reason=finish if isinstance(finish, str) else None,
        prompt_tokens=prompt,
        completion_tokens=completion,
        seconds=seconds,
    )


def _plain(text: str) -> str:
    """JSON without escapes that could hide something in it; what is no JSON stays as it is."""
    with suppress(ValueError, RecursionError):
        return json.dumps(json.loads(text), ensure_ascii=False)
    return text


def _said(text: str) -> str:
    """A server's words, short and on one line."""
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        text = json.loads(text)["error"]["message"]
    return repr(str(text)[:200])


def _seconds(retry_after: str | None) -> float | None:
    """``Retry-After`` in seconds: a number or an HTTP date (RFC 9110, 10.2.3); None where it is neither."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


def _address(base_url: str) -> str:
    """The URL that requests go to."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EndpointError(f"base_url must be like http://localhost:8000/v1, got {parts.scheme}://{parts.hostname}")
    if parts.username or parts.password or parts.query:
        raise EndpointError("base_url must hold no user, password or query: an API key comes from the environment")
    return base_url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"


def _read_key(variable: str | None, url: str) -> str | None:
    """The key in an environment variable, checked without being told."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", variable):  # a key, perhaps, given in place of its variable's name
        variable = "that was named (not shown here: it does not look like a variable)"
    if not key:
        raise EndpointError(f"the environment variable {variable} is not set: it must hold the API key")
    if not key.isascii() or not key.isprintable() or set(key) & set(' "\\') or len(key) < 8:
        raise EndpointError(f"the environment variable {variable} does not hold an API key (ASCII, 8 letters or more)")
    parts = urlsplit(url)
    if parts.scheme == "http" and not _is_local(parts.hostname or ""):
        raise EndpointError(f"an API key must not travel in clear text to {parts.hostname}: use an https address")
    return key


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def _without_headers(transport: str) -> Iterator[None]:
    """Keep the transport's DEBUG lines out of the log: they hold the answer's headers, which may repeat the key."""
    log = logging.getLogger(transport)
    level = log.level
    log.setLevel(max(level, logging.INFO))
    try:
        yield
    finally:
        log.setLevel(level)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counter.most_common())


def _shown(jobs: Iterator[Any], total: int) -> Iterator[Any]:
    """A progress bar where somebody is looking."""
    console = Terminal(stderr=True)
    yield from track(jobs, "judging", total=total, console=console, disable=not console.is_terminal)

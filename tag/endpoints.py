"""Asking models behind OpenAI-compatible servers, several at once (`vllm serve`, say), through the `openai` client.

What can go wrong is expected to: 429, 5xx, time-outs, cut or endless answers, a body that is no JSON, a server that is
gone. Each fault is counted by its kind; transient ones are tried again, on another server where there is one, after a
pause that doubles. A server that fails five times in a row is left alone for a while, then probed by one request.
Refusals and answers cut off by the token limit are the model's doing: a `Completion` says so.
"""

import asyncio
import base64
import io
import json
import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from PIL import Image

from tag.boxes import Canvas
from tag.errors import DataError

MAX_BODY = 1 << 20  # bytes of a response; an answer has a few thousand
FAULTS_TO_REST = 5  # in a row, after which a server is left alone
MAX_REST = 60.0  # seconds
FIRST_PAUSE, MAX_PAUSE = 0.5, 30.0  # seconds between tries of one question
USELESS = 20  # questions refused as wrong before any answer: the command is wrong, not the faces
JPEG_QUALITY = 92
# A connection pool looks at all its idle connections for every question: a quarter of the client's work with 128.
CONNECTIONS_A_POOL = 16


class Fault(Exception):
    """A question that got no answer; `kind` is counted. Whoever asked may ask again another day."""

    def __init__(self, kind: str, detail: str = "", transient: bool = True, wait: float | None = None) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.transient, self.wait = kind, transient, wait


class BackendDown(Exception):
    """Nobody is left to ask; the run stops cleanly."""


@dataclass(frozen=True)
class Completion:
    """One answer. reason: "stop", "length" (cut off by the token limit) or "refused" (by the model or a filter).

    The counts are the server's, None where it gives none. cost: what it says the answer cost, in its own unit
    (OpenRouter: US dollars).
    """

    text: str
    reason: str = "stop"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float | None = None


class Endpoint:
    """One server: its clients, how busy it is, how it has been doing."""

    def __init__(self, url: str, clients: Sequence[Any], slots: int) -> None:
        self.url, self.clients, self.slots = url, clients, slots
        self.turns = cycle(clients)
        self.in_use = self.answers = self.faults_in_a_row = 0
        self.rest_until = 0.0
        self.gone = ""  # why it is not asked any more
        self.faults: Counter[str] = Counter()

    def free(self, now: float) -> bool:
        """Whether it may get another question now; a server on probation gets one at a time."""
        slots = 1 if self.faults_in_a_row >= FAULTS_TO_REST else self.slots
        return not self.gone and now >= self.rest_until and self.in_use < slots

    def note(self, fault: Fault | None) -> None:
        """Remember how a question ended."""
        if fault is None:
            self.answers += 1
            self.faults_in_a_row = 0
            return
        self.faults[fault.kind] += 1
        if fault.kind in ("unauthorised", "not_found"):
            self.gone = str(fault)
        elif fault.kind not in ("rate_limited", "bad_request"):
            self.faults_in_a_row += 1
            if self.faults_in_a_row >= FAULTS_TO_REST:
                rest = 2.0 ** min(self.faults_in_a_row - FAULTS_TO_REST, 10)
                self.rest_until = time.monotonic() + min(rest, MAX_REST)


class Servers:
    """Questions go to the least busy of `urls`. key: sent as bearer token, never written anywhere.

    concurrency: questions a server gets at a time. tries: of one question before it is given up (Fault "unanswered").
    give_up_after: seconds without any answer from anyone after which BackendDown is raised.
    """

    def __init__(
        self,
        urls: Sequence[str],
        key: str = "",
        concurrency: int = 128,
        timeout: float = 120.0,
        tries: int = 8,
        give_up_after: float = 300.0,
    ) -> None:
        openai = _import_openai()
        self._errors = openai
        self.timeout, self.tries, self.give_up_after = timeout, tries, give_up_after
        self.concurrency = concurrency * len(urls)
        self.endpoints = []
        for url in urls:
            # Without max_retries=0 the client would try again by itself, unseen and uncounted.
            clients = [
                openai.AsyncOpenAI(base_url=url, api_key=key or "none", max_retries=0, timeout=timeout)
                for _ in range(-(-concurrency // CONNECTIONS_A_POOL))
            ]
            self.endpoints.append(Endpoint(url, clients, concurrency))
        self._waiting: deque[asyncio.Future[None]] = deque()  # for a server to be freed, longest first
        self._last_answer = time.monotonic()
        self._started = False

    async def complete(self, **request: Any) -> Completion:
        """The answer to one chat request (model, messages, temperature, ... as the client takes them).

        Raises Fault (also for a question that no server takes: `transient` is False then) and BackendDown.
        """
        if not self._started:
            self._started, self._last_answer = True, time.monotonic()
        avoid: Endpoint | None = None
        for attempt in range(self.tries):
            endpoint = await self._acquire(avoid)
            fault: Fault | None = None
            try:
                return await self._send(endpoint, request)
            except Fault as e:
                fault = e
            finally:
                self._release(endpoint, fault)
            if not fault.transient:
                raise fault
            avoid = endpoint
            pause = min(FIRST_PAUSE * 2**attempt, MAX_PAUSE) * random.uniform(0.5, 1.0)
            await asyncio.sleep(max(pause, min(fault.wait or 0.0, MAX_REST)))
        raise Fault("unanswered", f"{self.tries} tries, the last: {fault}")

    def stats(self) -> dict[str, Any]:
        """Answers and faults of each server."""
        return {
            e.url: {"answers": e.answers, "faults": dict(e.faults), **({"gone": e.gone} if e.gone else {})}
            for e in self.endpoints
        }

    async def close(self) -> None:
        """Close the connections."""
        for endpoint in self.endpoints:
            for client in endpoint.clients:
                await client.close()

    # ---- who is asked -----------------------------------------------------------------------------------------

    async def _acquire(self, avoid: Endpoint | None) -> Endpoint:
        """The least busy server that may be asked, `avoid` last; waits while there is none. Raises BackendDown."""
        while True:
            now = time.monotonic()
            self._check_alive(now)
            free = [e for e in self.endpoints if e.free(now)]
            if free:
                endpoint = min(free, key=lambda e: (e is avoid, e.in_use / e.slots))
                endpoint.in_use += 1
                return endpoint
            await self._wait(0.5)  # not for ever, because the end of a rest wakes nobody

    async def _wait(self, seconds: float) -> None:
        """Until a server is freed, or for so long. A future each and no asyncio.Condition: that takes its lock again
        even when it is cancelled, and a run that stops cancels everyone at once."""
        freed = asyncio.get_running_loop().create_future()
        self._waiting.append(freed)
        try:
            async with asyncio.timeout(seconds):
                await freed
        except TimeoutError:
            pass
        finally:
            with suppress(ValueError):  # taken out already by whoever freed a server
                self._waiting.remove(freed)

    def _release(self, endpoint: Endpoint, fault: Fault | None) -> None:
        endpoint.note(fault)
        endpoint.in_use -= 1
        if fault is None:
            self._last_answer = time.monotonic()
        while self._waiting:
            freed = self._waiting.popleft()
            if not freed.done():
                freed.set_result(None)
                return

    def _check_alive(self, now: float) -> None:
        if all(e.gone for e in self.endpoints):
            raise BackendDown("; ".join(f"{e.url}: {e.gone}" for e in self.endpoints))
        if now - self._last_answer > self.give_up_after:
            faults = "; ".join(f"{e.url}: {_most(e.faults)}" for e in self.endpoints)
            raise BackendDown(f"no answer from any server for {self.give_up_after:.0f} s ({faults})")
        refused = sum(e.faults["bad_request"] for e in self.endpoints)
        if refused >= USELESS and not any(e.answers for e in self.endpoints):
            raise BackendDown(f"the first {refused} questions were all refused as bad requests; is the model a VLM?")

    # ---- one question -----------------------------------------------------------------------------------------

    async def _send(self, endpoint: Endpoint, request: dict[str, Any]) -> Completion:
        """The answer. Raises Fault."""
        errors = self._errors
        try:
            async with asyncio.timeout(self.timeout):
                body = await self._body(endpoint, request)
        except (TimeoutError, errors.APITimeoutError):
            raise Fault("timeout", f"{self.timeout:.0f} s") from None
        except errors.APIStatusError as e:
            raise _status_fault(e) from None
        except errors.APIConnectionError as e:
            raise Fault("connection", _short(e.__cause__ or e)) from None
        except errors.OpenAIError as e:
            raise Fault("client", _short(e)) from None
        except OSError as e:
            raise Fault("connection", _short(e)) from None
        except Exception as e:
            # A stream that breaks off raises the HTTP library's own errors, whichever library the client uses.
            if type(e).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "h11"):
                raise
            raise Fault("cut", _short(e)) from None
        return _completion(body)

    async def _body(self, endpoint: Endpoint, request: dict[str, Any]) -> bytes:
        """The response, read bit by bit, so that an endless one costs a megabyte and not the memory."""
        body = bytearray()
        create = next(endpoint.turns).chat.completions.with_streaming_response.create
        async with create(**request) as response:
            async for chunk in response.iter_bytes():
                body += chunk
                if len(body) > MAX_BODY:
                    raise Fault("endless", f"more than {MAX_BODY} bytes")
        return bytes(body)


def image_question(image_url: str, prompt: str) -> list[dict[str, Any]]:
    """The messages of one question about one image."""
    content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]


def canvas_url(image: Image.Image, size: int) -> str:
    """The image as the model is to see it: on the square canvas that the boxes refer to, a JPEG data URL."""
    buffer = io.BytesIO()
    Canvas(*image.size).letterbox(image, size).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _completion(body: bytes) -> Completion:
    """What a chat completion holds. Raises Fault for another body."""
    try:
        raw = json.loads(body)
        choice = raw["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
        usage = raw.get("usage")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Fault("bad_body", "not a chat completion") from None
    usage = usage if isinstance(usage, dict) else {}
    tokens = [_number(usage.get(name), int) for name in ("prompt_tokens", "completion_tokens")]
    cost = _number(usage.get("cost"), float)
    if refusal or reason == "content_filter":
        return Completion(content if isinstance(content, str) else "", "refused", *tokens, cost)
    if not isinstance(content, str):
        if reason != "length":  # a model that thinks unseen may reach the limit before it says anything
            raise Fault("bad_body", "a message without text")
        content = ""
    return Completion(content, "length" if reason == "length" else "stop", *tokens, cost)


def _number(value: Any, kind: type) -> Any:
    """A count or an amount if it is a sensible one, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        return None
    return kind(value) if 0 <= value < 1e12 else None


def _status_fault(error: Any) -> Fault:
    """A status of 400 or more as a fault."""
    status, detail = error.status_code, f"status {error.status_code}"
    if status == 429:
        return Fault("rate_limited", detail, wait=_retry_after(error.response.headers.get("retry-after")))
    if status in (401, 403):
        return Fault("unauthorised", f"{detail}; is the key right?", transient=True)
    if status == 404:
        return Fault("not_found", f"{detail}; is the address (.../v1) right, and the model served there?")
    if status >= 500 or status in (408, 409, 425):
        return Fault("server_error", detail, wait=_retry_after(error.response.headers.get("retry-after")))
    return Fault("bad_request", f"{detail}: {_short(error)}", transient=False)


def _retry_after(text: str | None) -> float | None:
    try:
        seconds = float(text) if text else None
    except ValueError:  # a date
        return None
    return seconds if seconds is not None and 0 <= seconds < 1e6 else None


def _most(faults: Counter[str]) -> str:
    return ", ".join(f"{kind} {n}" for kind, n in faults.most_common(3)) or "not asked"


def _short(error: BaseException) -> str:
    text = "".join(c if c.isprintable() else " " for c in str(error))
    return " ".join(text.split())[:120] or type(error).__name__


def _import_openai() -> Any:
    try:
        import openai
    except ImportError as e:
        raise DataError(f"the openai client is not installed ({e.name}); run: pip install '.[api]'") from None
    return openai

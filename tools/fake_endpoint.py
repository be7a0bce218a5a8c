"""A server that speaks the OpenAI chat protocol, answers at once, and misbehaves as often as you ask: rehearse a build.

    python tools/fake_endpoint.py --port 8000 --fault-rate 0.2

It has no model. It reads classes and AU marks off the prompt and answers by the rules, with a class drawn by the
request's seed. Asked the prompt of the task (eval.py) it answers in the --style you like, with a class drawn by the
image; asked to judge two responses (tools/judge.py), in the way of --judge. Faults are drawn evenly from --faults.
Prints one JSON line with its counts when it is ended.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from tag.args import Parser, check, run
from tag.labels import CLASSES

# What each fault does, in the order of --faults' default.
FAULTS = {
    "rate_limit": "status 429",
    "server_error": "status 500 or 503",
    "hang": "no answer for --hang seconds",
    "reset": "the connection is closed without an answer",
    "cut": "the answer breaks off in the middle",
    "endless": "an answer that never ends",
    "html": "status 200 and a page of HTML",
    "bad_request": "status 400",
    "refusal": "a refusal in the protocol's own field",
    "length": "cut off by the token limit",
    "not_json": "an answer in prose",
    "invented": "an AU that is not in the list",
}
JUDGES = {
    "fair": "prefers the response with more boxes",
    "first": "always prefers the response shown first",
    "random": "scores and prefers by the request's seed, one without regard to the other",
    "wild": "scores that are no whole numbers from 1 to 5",
}
STYLES = {  # of answers to the prompt of the task
    "trace": "<think>A face. It moves (AU12) <bbox>[100, 200, 300, 400]</bbox>.</think><answer>{}</answer>",
    "prose": "The brows and lips of this face look rather like {} to me.",
    "json": '{{"reason": "A face.", "label": "{}", "box": [300, 400, 100, 200]}}',
}
MAX_REQUEST = 8 << 20
_CLASSES = re.compile(r"The label is one of: ([a-z, ]+)\.")
_CRITERIA = re.compile(r'"(\w+)": 1-5')
_RESPONSE = re.compile(r"^===== response [AB] \w+\n(.*?)\n===== end of response", re.M | re.S)
_MARK = re.compile(r"^- (<AU\d+> \[[\d, ]+\])", re.M)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    p = Parser(__doc__)
    p.add_argument("--port", type=int, default=8000, help="0: any free one, printed first")
    p.add_argument("--fault-rate", type=float, default=0.0, help="share of calls that go wrong")
    usual = ",".join(name for name in FAULTS if name != "bad_request")
    p.add_argument("--faults", default=usual, help="which, by commas; there is bad_request, too")
    p.add_argument("--key", help="answer 401 to calls without this key")
    p.add_argument("--hang", type=float, default=3600.0, help="seconds")
    p.add_argument("--delay", type=float, default=0.0, help="seconds before every answer")
    p.add_argument("--seed", type=int, default=0, help="of the faults")
    p.add_argument("--style", choices=[*STYLES], default="trace", help="of answers to the prompt of the task")
    p.add_argument("--cost", type=float, help="name this cost with every answer")
    about = "; ".join(f"{name}: {what}" for name, what in JUDGES.items())
    p.add_argument("--judge", choices=[*JUDGES], default="fair", help=f"how it compares two responses ({about})")
    args = p.parse_args(argv)
    args.faults = args.faults.split(",")
    check(set(args.faults) <= set(FAULTS), f"--faults: there are {', '.join(FAULTS)}")
    check(0 <= args.fault_rate <= 1, "--fault-rate must lie between 0 and 1")
    return args


def judge(prompt: str, seed: int, way: str) -> str:
    """The answer of a judge of `JUDGES`."""
    criteria = list(dict.fromkeys(_CRITERIA.findall(prompt)))
    boxes = [text.count("<bbox>") for text in _RESPONSE.findall(prompt)]
    rng = random.Random(seed)
    scores = [{name: min(1 + count, 5) for name in criteria} for count in boxes]
    preference = "tie" if boxes[0] == boxes[1] else "A" if boxes[0] > boxes[1] else "B"
    if way == "first":
        preference = "A"
    elif way == "random":
        scores = [{name: rng.randint(1, 5) for name in criteria} for _ in boxes]
        preference = rng.choice(("A", "B", "tie"))
    elif way == "wild":
        scores = [{name: rng.choice((0, 6, 4.5, "5", True, None)) for name in criteria} for _ in boxes]
    return json.dumps({"A": scores[0], "B": scores[1], "preference": preference, "reason": "It counted boxes."})


def answer(body: dict, style: str = "trace", way: str = "fair") -> str:
    """What a model that follows the prompt would write, in a style of `STYLES`; as a judge, in a way of `JUDGES`."""
    content = body["messages"][0]["content"]
    prompt = next(part["text"] for part in content if part["type"] == "text")
    if '"preference"' in prompt:
        if not any(part["type"] == "image_url" for part in content):
            return "I cannot see any face."
        return judge(prompt, body.get("seed", 0), way)
    if "<answer></answer>" in prompt:
        image = next(part["image_url"]["url"] for part in content if part["type"] == "image_url")
        return STYLES[style].format(CLASSES[zlib.crc32(image.encode()) % len(CLASSES)])
    if '"usable"' in prompt:
        return json.dumps({"usable": True, "reason": ""})
    classes, marks = _CLASSES.search(prompt)[1].split(", "), _MARK.findall(prompt)
    local = " ".join(f"Something moves here {mark}." for mark in marks) or "Nothing moves."
    label = classes[body.get("seed", 0) % len(classes)]
    return json.dumps({"global": "A face.", "local": local, "conclusion": f"This is {label}.", "label": label})


def completion(text: str | None, reason: str = "stop", refusal: str | None = None, cost: float | None = None) -> bytes:
    """A chat completion as JSON."""
    usage = {"prompt_tokens": 100, "completion_tokens": len((text or "").split())}
    usage |= {} if cost is None else {"cost": cost}
    message = {"role": "assistant", "content": text, "refusal": refusal}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    head = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
    return json.dumps({**head, "choices": [choice], "usage": usage}).encode()


def response(body: bytes, status: str = "200 OK", length: int | None = None, headers: str = "") -> bytes:
    """A whole HTTP response."""
    size = len(body) if length is None else length
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n{headers}\r\n"
    return head.encode() + body


async def misbehave(fault: str, body: dict, writer: asyncio.StreamWriter, args: argparse.Namespace) -> bool:
    """Do it; returns whether the connection can be used again."""
    if fault == "rate_limit":
        writer.write(response(b"{}", "429 Too Many Requests", headers="Retry-After: 0.1\r\n"))
    elif fault == "server_error":
        writer.write(response(b"{}", random.choice(("500 Internal Server Error", "503 Service Unavailable"))))
    elif fault == "hang":
        await asyncio.sleep(args.hang)
        return False
    elif fault == "reset":
        return False
    elif fault == "cut":
        whole = completion(answer(body, args.style, args.judge))
        writer.write(response(whole[: len(whole) // 2], length=len(whole)))
        await writer.drain()
        return False
    elif fault == "endless":
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + b"a" * 0x10000 + b"\r\n")
            await writer.drain()
    elif fault == "bad_request":
        writer.write(response(b"{}", "400 Bad Request"))
    elif fault == "html":
        writer.write(response(b"<html>Welcome</html>"))
    elif fault == "refusal":
        writer.write(response(completion(None, refusal="I cannot describe people.")))
    elif fault == "length":
        writer.write(response(completion('{"global": "A fa', "length")))
    elif fault == "not_json":
        writer.write(response(completion("This face looks happy to me.")))
    elif fault == "invented":
        parts = {"global": "A face.", "local": "It sees <AU39> [1, 2, 3, 4].", "conclusion": "So.", "label": "fear"}
        writer.write(response(completion(json.dumps(parts))))
    return True


async def serve(args: argparse.Namespace) -> None:
    """Until SIGTERM or SIGINT."""
    rng, counts = random.Random(args.seed), Counter()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(re.search(rb"content-length: *(\d+)", head.lower())[1])
                if length > MAX_REQUEST:
                    return
                body = json.loads(await reader.readexactly(length))
                counts["calls"] += 1
                if args.key and f"Bearer {args.key}".encode() not in head:
                    writer.write(response(b"{}", "401 Unauthorized"))
                    continue
                if args.delay:
                    await asyncio.sleep(args.delay)
                if rng.random() < args.fault_rate:
                    fault = rng.choice(args.faults)
                    counts[fault] += 1
                    if not await misbehave(fault, body, writer, args):
                        return
                else:
                    writer.write(response(completion(answer(body, args.style, args.judge), cost=args.cost)))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            return
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", args.port, limit=MAX_REQUEST)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await ended.wait()
    print(json.dumps(counts), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve."""
    asyncio.run(serve(parse_args(argv)))  # ends what is still under way, hanging answers too


if __name__ == "__main__":
    run(main)

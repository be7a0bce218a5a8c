"""The flags of tools that ask OpenAI-compatible servers. A key is no flag: it is read from the environment."""

import argparse
import os
from collections.abc import Callable

from tag.args import Parser, check
from tag.boxes import CANVAS_SIZE
from tag.datagen.backends import Backend

MAX_CONCURRENCY = 1000  # connections that the client keeps to a server


def add_endpoint_flags(p: Parser, title: str, concurrency: int) -> None:
    """A group of flags on servers; `concurrency` is the tool's default. `--model`, `--temperature` and `--max-tokens`
    are the tool's own."""
    a = p.add_argument_group(title).add_argument
    add_server_flags(a, concurrency)
    a("--json-mode", action="store_true", help="ask the server for response_format json_object")
    a("--image-size", type=int, default=CANVAS_SIZE, help="side in pixels of the square that is sent")


def add_server_flags(a: Callable, concurrency: int) -> None:
    """Flags on the servers themselves, by `a`, some group's add_argument: those of `tag.endpoints.Servers`."""
    a("--endpoint", nargs="+", metavar="URL", default=[], help="servers, each up to and with /v1")
    a("--key-variable", default="OPENAI_API_KEY", help="environment variable with the key, if one is needed")
    a("--concurrency", type=int, default=concurrency, help="questions a server gets at a time, per process")
    a("--timeout", type=float, default=120.0, help="seconds for one answer")
    a("--tries", type=int, default=8, help="of one question, before it is left for the next run")
    a("--give-up-after", type=float, default=300.0, help="seconds without any answer, then stop")


def check_endpoint_flags(args: argparse.Namespace) -> None:
    """Raises UsageError."""
    check_server_flags(args)
    check(args.temperature >= 0 and args.max_tokens >= 1, "--temperature must be at least 0, --max-tokens at least 1")


def check_server_flags(args: argparse.Namespace) -> None:
    """Those of `add_server_flags`, and --image-size. Raises UsageError."""
    for url in args.endpoint:
        check(url.startswith(("http://", "https://")), f"--endpoint {url}: not an http(s) address")
    for name in ("concurrency", "tries"):
        check(getattr(args, name) >= 1, f"--{name} must be at least 1")
    check(
        args.concurrency <= MAX_CONCURRENCY,
        f"--concurrency: a client keeps at most {MAX_CONCURRENCY:,} connections to a server",
    )
    check(args.timeout > 0 and args.give_up_after > 0, "--timeout and --give-up-after must be above 0")
    check(28 <= args.image_size <= 4096, "--image-size must lie between 28 and 4096")


def endpoint_backend(args: argparse.Namespace) -> Backend:
    """The servers asked for (imported here: it needs the `api` extra). Raises DataError without it."""
    from tag.datagen.endpoints import EndpointBackend

    return EndpointBackend(
        args.endpoint,
        args.model,
        os.environ.get(args.key_variable, ""),
        args.concurrency,
        args.timeout,
        args.tries,
        args.give_up_after,
        args.temperature,
        args.max_tokens,
        args.json_mode,
        args.image_size,
    )

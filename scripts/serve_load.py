#!/usr/bin/env python3
"""Measure `jetson-ft serve` under load, and print a table in markdown.

    python scripts/serve_load.py http://127.0.0.1:8000/v1 --model base

For each number of clients, all of them ask at the same time, and again when they have their reply.
Each reply is streamed and has at most `--tokens` tokens. A lost or empty reply ends the program.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

TOPICS = ("the sea", "a board", "rain", "北京", "bread", "a train", "snow", "the moon")


@dataclass(frozen=True)
class Reply:
    """Times in seconds."""

    first: float  # from the request to the first text
    whole: float
    tokens: int


def ask(client: httpx.Client, url: str, model: str, number: int, tokens: int) -> Reply:
    """Stream one reply; every prompt differs, so that none is answered from a cache alone."""
    body = {
        "model": model, "stream": True, "stream_options": {"include_usage": True},
        "prompt": f"{number}. A long story about {TOPICS[number % len(TOPICS)]}:",
        "max_tokens": tokens, "temperature": 1.0, "seed": number,
    }  # fmt: skip
    started, first, count = time.monotonic(), 0.0, 0
    with client.stream("POST", f"{url}/completions", json=body) as response:
        if response.status_code != 200:
            sys.exit(f"{response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                sys.exit(str(chunk))
            if chunk["choices"] and chunk["choices"][0]["text"] and not first:
                first = time.monotonic() - started
            if usage := chunk.get("usage"):
                count = usage["completion_tokens"]
    if not count:
        sys.exit("a reply without tokens")
    return Reply(first or time.monotonic() - started, time.monotonic() - started, count)


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the smallest value that so many percent of the values don't exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="as `jetson-ft serve` prints it")
    parser.add_argument("--model", default="base")
    parser.add_argument("--key", default="")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3, help="replies of each client")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of a reply")
    options = parser.parse_args()
    headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
    print("| clients | replies | first token p50 | p99 | reply p50 | p99 | tokens/s in all |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    with httpx.Client(headers=headers, timeout=3600) as client:
        ask(client, options.url, options.model, 0, 4)  # the first reply touches the weights
        for clients in options.clients:
            numbers = range(clients * options.rounds)
            started = time.monotonic()
            with ThreadPoolExecutor(clients) as pool:
                replies = list(
                    pool.map(
                        lambda n: ask(client, options.url, options.model, n, options.tokens),
                        numbers,
                    )
                )
            seconds = time.monotonic() - started
            first = [reply.first for reply in replies]
            whole = [reply.whole for reply in replies]
            speed = sum(reply.tokens for reply in replies) / seconds
            print(
                f"| {clients} | {len(replies)} | {statistics.median(first):.2f} s "
                f"| {percentile(first, 99):.2f} s | {statistics.median(whole):.1f} s "
                f"| {percentile(whole, 99):.1f} s | {speed:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

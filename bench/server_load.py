"""How much of the engine's speed is left behind HTTP, and how long do clients wait?

A closed loop, as wrk has it: so many clients, each of which asks for the next text as soon as it has the last one, all
streamed. The same texts are first written by the engine in this process, with as many sequences in its batch, the next
one added as soon as one is finished. Both are done in every round, and alternate; figures are medians over the rounds.

    python bench/server_load.py MODEL [--streams 16] [--requests 192] [--new-tokens 128] [--rounds 3]
    python bench/server_load.py MODEL --faults 1000

`--faults`: requests that end badly, one after the other and in tens at a time (clients that disconnect before, within
and behind their streams, bodies that are no JSON, or too large, or cut short, parameters out of range, prompts that are
too long, schemas that are none); then the server's memory and its slots are what they were before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fewbits.engine import Engine
from fewbits.engine.sequences import Sequence

WORDS = ("captain", "night", "was", "dark", "and", "every", "house", "by", "sea", "old", "men", "spoke", "of", "ships")
SETTLE = 2.0
"""Seconds until the server's counters are read after faults."""
MOST_BODY = 4_000_000


@dataclass
class Load:
    """What was seen. first and gaps in seconds."""

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def prompts(count: int, words: int) -> list[str]:
    """Texts that begin differently, so that none is known already."""
    drawn = random.Random(0)
    return [f"{i} " + " ".join(drawn.choices(WORDS, k=words)) for i in range(count)]


def engine_load(engine: Engine, texts: list[str], streams: int, new_tokens: int) -> Load:
    """The same by the engine alone."""
    load, waiting, running = Load(), list(reversed(texts)), list[Sequence]()
    engine.start_over()
    begin = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < streams:
            running.append(engine.sequence(waiting.pop(), max_tokens=new_tokens, temperature=0.8, seed=1))
            engine.batch.add(running[-1])
        engine.batch.step()
        for sequence in running:
            load.tokens += len(sequence.pieces)
            sequence.pieces.clear()
        running = [sequence for sequence in running if not sequence.ended]
    load.seconds = time.perf_counter() - begin
    return load


class Client:
    """One connection, kept open; HTTP/1.1 as far as the server speaks it."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def open(self) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)

    def close(self) -> None:
        self.writer.close()

    def send(self, path: str, body: bytes, method: str = "POST", length: int | None = None) -> None:
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self.writer.write(f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body)

    async def head(self) -> tuple[int, bytes]:
        """Status, and the head of the answer."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), head.lower()

    async def chunks(self) -> Any:
        """Data of a chunked answer, as it comes."""
        while size := int(await self.reader.readline(), 16):
            yield await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        await self.reader.readexactly(2)

    async def body(self, head: bytes) -> bytes:
        """The rest of an answer."""
        found = re.search(rb"content-length: (\d+)", head)
        if found:
            return await self.reader.readexactly(int(found[1]))
        return b"".join([chunk async for chunk in self.chunks()])


def asked(text: str, new_tokens: int) -> bytes:
    settings = {"max_tokens": new_tokens, "temperature": 0.8, "seed": 1, "stream": True}
    return json.dumps({"model": "m", "prompt": text, **settings, "stream_options": {"include_usage": True}}).encode()


async def one_stream(port: int, waiting: list[str], new_tokens: int, load: Load) -> None:
    client = Client(port)
    await client.open()
    while waiting:
        begin = last = time.perf_counter()
        client.send("/v1/completions", asked(waiting.pop(), new_tokens))
        status, _ = await client.head()
        assert status == 200, status
        seen, tail = 0, b""
        async for chunk in client.chunks():
            now = time.perf_counter()
            if b'"text"' in chunk:
                (load.gaps if seen else load.first).append(now - last)
                seen, last = seen + 1, now
            tail = (tail + chunk)[-4000:]
        load.tokens += int(re.findall(rb'"completion_tokens":(\d+)', tail)[-1])
        load.whole.append(time.perf_counter() - begin)
    client.close()


async def server_load(port: int, texts: list[str], streams: int, new_tokens: int) -> Load:
    load, waiting = Load(), list(reversed(texts))
    begin = time.perf_counter()
    await asyncio.gather(*(one_stream(port, waiting, new_tokens, load) for _ in range(streams)))
    load.seconds = time.perf_counter() - begin
    return load


@contextmanager
def server(model: str, slots: int, context: int) -> Iterator[tuple[int, psutil.Process]]:
    """A server in a process of its own: its port, and the process."""
    command = [sys.executable, "-m", "fewbits", "serve", model, "--port", "0", "--name", "m"]
    command += ["--slots", str(slots), "--context", str(context), "--max-body", str(MOST_BODY)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"http://127.0.0.1:(\d+)", line):
            break
    else:
        raise SystemExit("the server did not start")
    drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
    try:
        yield int(found[1]), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()
        drain.wait()


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(int(part * len(values)), len(values) - 1)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    context = args.new_tokens + 8 * args.prompt_words
    engine = Engine(args.model, slots=args.streams, context=context, speculate=False)
    texts = prompts(args.requests, args.prompt_words)
    rounds: list[dict[str, float]] = []
    with server(args.model, args.streams, context) as (port, _):
        engine_load(engine, texts[: args.streams], args.streams, args.new_tokens)
        asyncio.run(server_load(port, texts[: args.streams], args.streams, args.new_tokens))
        for _ in range(args.rounds):
            alone = engine_load(engine, texts, args.streams, args.new_tokens)
            served = asyncio.run(server_load(port, texts, args.streams, args.new_tokens))
            rounds.append(
                {
                    "engine tokens/s": alone.rate,
                    "server tokens/s": served.rate,
                    "kept": served.rate / alone.rate,
                    "first token median s": statistics.median(served.first),
                    "first token p95 s": percentile(served.first, 0.95),
                    "request median s": statistics.median(served.whole),
                    "request p95 s": percentile(served.whole, 0.95),
                    "between events p95 s": percentile(served.gaps, 0.95),
                }
            )
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--prompt-words", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    figures = measure(args)
    print("| | |\n|---|---|")
    for name, value in figures.items():
        print(f"| {name} | {value:.4g} |")
    facts = {name: getattr(args, name) for name in ("streams", "requests", "prompt_words", "new_tokens", "rounds")}
    print(json.dumps({"bench": "server_load", "model": Path(args.model).name, **facts, **figures}))


if __name__ == "__main__":
    main()

"""200 clients that stream at once: no error, every text the one that its request writes alone, and no memory lost."""

from __future__ import annotations

import asyncio
import os
import re
import time

import pytest
from tests.serve.conftest import Server

openai = pytest.importorskip("openai")

ASKS = [{"prompt": f"def f{i}(x", "seed": i, "max_tokens": 8 + i % 25, "temperature": 1.0 if i % 3 else 0.0} for i in range(40)]
SECONDS = float(os.environ.get("SPARING_LOAD_SECONDS", "180"))


async def load(url: str, alone: list[str], clients: int, seconds: float) -> tuple[int, list[str]]:
    """-> (answers, what was wrong)."""
    end, done, wrong = time.monotonic() + seconds, 0, []

    async def one(number: int, client) -> None:
        nonlocal done
        turn = number
        while time.monotonic() < end:
            turn += 7
            ask = ASKS[turn % len(ASKS)]
            try:
                stream = await client.completions.create(model="tiny", stream=True, **ask)
                text = "".join([chunk.choices[0].text async for chunk in stream])
                if text != alone[turn % len(ASKS)]:
                    wrong.append(f"{ask}: {text!r} is not {alone[turn % len(ASKS)]!r}")
            except Exception as error:  # whatever it is, it is what we look for
                wrong.append(f"{type(error).__name__}: {error}")
            done += 1

    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=600) as client:
        await asyncio.gather(*(one(number, client) for number in range(clients)))
    return done, wrong


@pytest.mark.slow
def test_200_clients_for_minutes(run, home):
    server = Server(run, env={"SPARING_HOME": str(home)})
    resident = lambda: float(re.search(r"sparing_resident_bytes (\d+)", server.ask("GET", "/metrics")[2])[1])  # noqa: E731
    try:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
        alone = [client.completions.create(model="tiny", **ask).choices[0].text for ask in ASKS]
        _, wrong = asyncio.run(load(server.url, alone, 200, SECONDS / 6))  # warm-up
        assert wrong == []
        before = resident()
        done, wrong = asyncio.run(load(server.url, alone, 200, SECONDS))
        after = resident()
        print(f"{done} answers in {SECONDS:g} s; resident {before / 1e6:.0f} -> {after / 1e6:.0f} MB")
        assert wrong == [] and done >= 200
        assert after < 1.05 * before + 10e6
    finally:
        assert server.stop() == 0

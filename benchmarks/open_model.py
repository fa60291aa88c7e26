"""The engine on an imported model, int8, against a llama.cpp built for the machine, Q8_0: speed, memory, bits per byte.

    python -m benchmarks.open_model --run RUN --out FOLDER [--isa avx512 avx2] [--text FILE...] [--rounds 5]

FOLDER keeps the builds of llama.cpp (a quarter of an hour on one core each), the model as GGUF, and a result for each case: what is there
is not done again, so the command can be interrupted. Sides take turns within a case. avx512: everything that this machine has on our side,
AVX-512 with VNNI and BF16 on theirs. avx2: both held to AVX2 (and our side's Python to one instruction set by SPARING_PROCESSOR).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.llamacpp import BUILD
from benchmarks.llamacpp_build import OPTIONS, PACKAGE, build
from sparing.base.config_file import read_config
from sparing.base.hardware import cores
from sparing.base.messages import say
from sparing.base.run import RunFolder
from sparing.bench.engines import Ours
from sparing.bench.generation import export_file, in_turn, rows_of
from sparing.bench.limit import Limit
from sparing.bench.results import print_table, row, stored_result
from sparing.bench.worker import Worker
from sparing.data.tokenizer import Tokenizer
from sparing.evals.bpb import bpb, nll_from_logits

OURS = {"avx512": {}, "avx2": {"SPARING_PROCESSOR": "x86-64-v3"}}
CASES = {"decode, 1 text": (1, 32, 64), "decode, 8 texts at once": (8, 32, 64), "a prompt of 512": (1, 512, 1)}
"""Texts, tokens of a prompt, tokens written."""
CONTEXT, PIECE_BYTES = 512, 4000
"""Tokens that are scored together; bytes that are taken of each file."""


def compare(run: str, out: Path, isa: str, name: str, rounds: int, threads: int, weights: str) -> list[dict]:
    """One case's rows."""
    (count, length, made), limit = CASES[name], Limit(600)
    file = out / "model-q8_0.gguf"
    if not file.exists():
        with Worker(threads, limit) as worker:
            worker.run(export_file, run=run, out=str(file), type="q8_0")
    size = read_config(RunFolder.open(run).config_file).model.vocab_size
    sides = {
        "ours": (Ours, run, {"weights": weights, "max_batch": count}, OURS[isa]),
        "peer": (
            "benchmarks.llamacpp.LlamaCppBuild",
            str(file),
            {"parallel": count, "context": 640, "type": "q8_0"},
            {BUILD: str(build(out, isa))},
        ),
    }
    generator = random.Random(0)
    groups = [[[generator.randrange(5, size) for _ in range(length)] for _ in range(count)] for _ in range(rounds)]
    measured = in_turn(sides, threads, groups, made, limit, together=count > 1)
    peer = f"{PACKAGE} for {isa}, q8_0"
    return rows_of(
        f"{isa}: {name}", measured, length if made == 1 else count * made, peer, threads=threads, system=measured["peer"]["system"]
    )


def machine_facts() -> dict:
    """Bytes per second that a thread reads from memory, and operations per second of our int8 products (a row's product counts 2)."""
    from sparing.infer.predict import _memory_rate
    from sparing.kernels import decode

    step, number = decode.library(), decode.FORMATS["int8"]
    rates = {rows: 2 * rows * 1024 * 1024 / step.probe(number, rows) / 1e9 for rows in (1, 8, 64, 512)}
    products = decode.PRODUCTS[step.products()]
    return {"memory_GB_per_s": _memory_rate() / 1e9, "int8_Gop_per_s": rates, "products": products, "tiles": step.use_tiles(1) > 0}


def bits_per_byte(run: str, weights: str, texts: Sequence[str]) -> dict:
    """`evals.bpb.bpb` of PIECE_BYTES from the middle of each file, by the compiled step."""
    import torch

    from sparing.infer.network import CompiledNetwork, Rows
    from sparing.infer.packed_weights import open_packed
    from sparing.kernels.sizes import CACHE_BLOCK

    folder = RunFolder.open(run)
    config = read_config(folder.config_file)
    context = min(CONTEXT, config.model.max_position_embeddings)
    blocks = -(-context // CACHE_BLOCK)
    network = CompiledNetwork(config.model, open_packed(folder, config.model, weights), weights, blocks, cores())

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        found = []
        for text in tokens.tolist():  # one after the other, over the same cache
            rows = Rows()
            rows.add(list(range(blocks)), text, 0, len(text))
            found.append(torch.from_numpy(network.forward(rows)))
        return torch.stack(found)

    pieces = []
    for path in texts:
        raw = Path(path).read_bytes()
        pieces.append(raw[len(raw) // 2 :][:PIECE_BYTES].decode(errors="ignore"))
    found = bpb(nll_from_logits(logits), Tokenizer.load(folder.tokenizer_file, config.tokens), pieces, context, batch=1)
    network.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--isa", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--weights", default="int8")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows, facts = [], {}
    for isa in given.isa:
        build(given.out, isa)
    for isa in given.isa:
        for name in CASES:
            kept = given.out / f"{isa}-{given.weights}-{name.replace(', ', '-').replace(' ', '-')}.json"
            arguments = (given.run, given.out, isa, name, given.rounds, given.threads, given.weights)
            rows += stored_result(kept, lambda a=arguments: {"rows": compare(*a)})["rows"]
        facts[isa] = stored_result(given.out / f"{isa}-machine.json", lambda isa=isa: _apart(machine_facts, OURS[isa]))
    if given.text:
        found = {
            weights: stored_result(
                given.out / f"bpb-{weights}.json", lambda w=weights: _apart(bits_per_byte, {}, run=given.run, weights=w, texts=given.text)
            )
            for weights in dict.fromkeys(("float32", given.weights))
        }
        rows.append(
            row(
                "bits per byte",
                found[given.weights]["bpb"],
                "",
                found["float32"]["bpb"],
                "ours in float32",
                bytes=found["float32"]["bytes"],
            )
        )
    print_table("an imported model", rows)
    for isa, found in facts.items():
        say(f"{isa}: {json.dumps(found)}")
    print(json.dumps({"rows": rows, "machine": facts}))


def _apart(function, environment: dict, **arguments) -> dict:
    """The result of a function in a process of its own, with environment variables."""
    with Worker(cores(), Limit(1800), environment) as worker:
        return worker.run(f"benchmarks.open_model.{function.__name__}", **arguments)


if __name__ == "__main__":
    main()

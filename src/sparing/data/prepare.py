"""Makes a TokenStore of a corpus: scan it, train the tokenizer, tokenise as much as will be used. The next call goes on after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from sparing.base.config import DataConfig, UserError
from sparing.base.files import file_sha256, write_atomic
from sparing.base.hardware import cores
from sparing.data.files import find_files, fingerprint
from sparing.data.progress import Progress, check
from sparing.data.scan import (
    FORMAT,
    SAMPLE_BYTES,
    CorpusFacts,
    data_home,
    load_sample,
    quarantine_path,
    room_in,
    scan,
    sections,
)
from sparing.data.sources import documents, readers
from sparing.data.split import content_hash, held_out_bound, threshold
from sparing.data.store import StoreWriter, TokenStore
from sparing.data.tokenizer import Tokenizer, train_tokenizer
from sparing.data.workers import encode_chunks

CHUNK_BYTES = 1 << 20
HELD_OUT_BYTES = 8 << 20
"""How much of the held-out text is kept: whole documents, in the order of their hashes."""
MAX_WORKERS = 8
"""By default. With more, this process, which reads, would be the bottleneck; each takes some 100 MB."""
try:
    import fcntl
except ImportError:  # Windows: two runs that prepare the same corpus at once are not kept apart there
    fcntl = None


def prepare(
    config: DataConfig,
    vocab_size: int,
    root: Path | None = None,
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TokenStore:
    """Tokenise the corpus `config` names into `root`/<fingerprint> (default root: `data_home()`), or open what is already there.

    vocab_size: of the tokenizer that is trained, unless `config.tokenizer` names one. With `config.max_tokens`, parts of up to 64 kB are
    sampled, by hash, until there are about that many tokens. Equal input gives equal bytes, whatever the number of workers. Raises
    UserError (bad paths, nothing usable, disk full) and Stopped.
    """
    files = find_files(config.paths)
    root = root or data_home()
    progress = progress or (lambda *_: None)
    if config.max_tokens is not None and config.max_tokens < 1:
        raise UserError(f"data.max_tokens must be at least 1, not {config.max_tokens}")
    workers = _workers(config)
    if config.tokenizer:
        tokenizer = Tokenizer.load(config.tokenizer)
    else:
        tokenizer = _trained(config, files, vocab_size, root, progress, should_stop)
    settings = (config.text_key, config.holdout_fraction, config.max_tokens, tokenizer.to_json())
    key = fingerprint(files, FORMAT, *settings, *readers(files, config.extract))
    target, partial = root / key, root / f"{key}.partial"
    with contextlib.suppress(UserError):  # not there, or not whole: build it
        return TokenStore(target)
    with room_in(root), _lock(root / "locks" / key, should_stop):
        with contextlib.suppress(UserError):  # another process was quicker
            return TokenStore(target)
        shutil.rmtree(target, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        try:
            facts = scan(config, root, progress=progress, should_stop=should_stop, files=files)
            tokenizer.save(partial / "tokenizer.json")
            shutil.copyfile(quarantine_path(facts.fingerprint, root), partial / "quarantine.jsonl")
            writer = _tokenise(config, files, facts, tokenizer, partial, root, workers, progress, should_stop)
            _seal(partial, key, facts, tokenizer, writer)
            os.replace(partial, target)
        except (OSError, UserError):
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return TokenStore(target)


def training_parts(raw: bytes, hash: int, facts: CorpusFacts, whole: bool) -> Iterator[tuple[int, bytes]]:
    """What a document gives to training: itself if `whole`, with order 0, else its `sections`; nothing if it is held out."""
    if facts.split.holds_out(hash):
        return
    if hash == facts.split.tail_hash:
        raw = raw[: facts.split.cut(raw)]
    yield from [(0, raw)] if whole else sections(raw, hash)


def held_out_texts(config: DataConfig, facts: CorpusFacts) -> Iterator[str]:
    """All documents of the corpus `config` that are held out, or their held-out ends. facts: of the same corpus."""
    for document in documents(find_files(config.paths), config.text_key, extract=config.extract):
        raw = document.text.encode()
        hash = content_hash(raw)
        if hash == facts.split.tail_hash:
            yield raw[facts.split.cut(raw) :].decode()
        elif facts.split.holds_out(hash):
            yield document.text


def _trained(config, files, vocab_size, root, progress, should_stop) -> Tokenizer:
    """The tokenizer of this corpus. It is kept beside the stores and serves every `max_tokens`."""
    key = fingerprint(files, FORMAT, config.text_key, config.holdout_fraction, vocab_size, *readers(files, config.extract))
    path = root / "tokenizers" / f"{key}.json"
    if path.is_file():
        return Tokenizer.load(path)
    with room_in(root), _lock(root / "locks" / key, should_stop):
        if path.is_file():  # another process was quicker
            return Tokenizer.load(path)
        facts = scan(config, root, progress=progress, should_stop=should_stop, files=files)
        total = min(SAMPLE_BYTES, facts.train_bytes)
        progress("tokenizer", 0, total)
        tokenizer = train_tokenizer(load_sample(facts.fingerprint, root), vocab_size, should_stop)
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
        progress("tokenizer", total, total)
        return tokenizer


def _selection(config, facts, tokenizer, root) -> tuple[int | None, int]:
    """-> (bound, bytes of text). Sections whose order is below the bound are taken; None: all documents, whole."""
    if config.max_tokens is None:
        return None, facts.train_bytes
    target = config.max_tokens * tokenizer.bytes_per_token(load_sample(facts.fingerprint, root)[:64])
    if target >= facts.train_bytes:
        return None, facts.train_bytes
    # The table counts held-out sections too; they are as frequent below any bound as over all.
    return threshold(facts.section_sizes, target / facts.train_bytes * facts.bytes), int(target)


def _tokenise(config, files, facts, tokenizer, folder, root, workers, progress, should_stop) -> StoreWriter:
    """Write shards and held_out.jsonl into `folder`."""
    split = facts.split
    bound, wanted = _selection(config, facts, tokenizer, root)
    held_bound = held_out_bound(facts.hash_sizes, split, HELD_OUT_BYTES)
    held_out: list[tuple[int, str]] = []
    writer = StoreWriter(folder, tokenizer.dtype, tokenizer.eot_id)

    def chunks() -> Iterator[tuple[list[tuple[int, int]], list[str]]]:
        entry, keys, texts, size = 0, [], [], 0
        for document in documents(files, config.text_key, tick=lambda _: check(should_stop), extract=config.extract):
            raw = document.text.encode()
            hash = content_hash(raw)
            if hash == split.tail_hash:
                held_out.append((hash, raw[split.cut(raw) :].decode()))
            elif hash < held_bound and split.holds_out(hash):
                held_out.append((hash, document.text))
            for order, part in training_parts(raw, hash, facts, bound is None):
                if bound is not None and order >= bound:
                    continue
                entry += 1
                if entry <= writer.written:  # in a shard that an earlier call, interrupted since, has finished
                    continue
                keys.append((hash, len(part)))
                texts.append(part.decode())
                size += len(part)
                if size >= CHUNK_BYTES:
                    yield keys, texts
                    keys, texts, size = [], [], 0
        if keys:
            yield keys, texts

    done = 0
    try:
        with contextlib.closing(encode_chunks(tokenizer, chunks(), workers, should_stop)) as results:
            for keys, arrays in results:
                writer.add([(hash, ids) for (hash, _), ids in zip(keys, arrays, strict=True)])
                done += sum(size for _, size in keys)
                progress("tokenise", min(done, wanted), wanted)
        writer.end_shard()
    finally:
        writer.close()
    if not writer.shards and config.max_tokens is not None:
        # So few tokens that by chance every part with a small hash is held out: take more.
        more = replace(config, max_tokens=4 * config.max_tokens)
        return _tokenise(more, files, facts, tokenizer, folder, root, workers, progress, should_stop)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for _, text in sorted(held_out)]
    write_atomic(folder / "held_out.jsonl", "".join(lines))
    return writer


def _seal(folder: Path, key: str, facts: CorpusFacts, tokenizer: Tokenizer, writer: StoreWriter) -> None:
    """Write manifest.json: what is in the store, with sizes and checksums. A store that has one is complete."""
    (folder / "journal.json").unlink(missing_ok=True)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json"
    }
    tokens = sum(shard["count"] for shard in writer.shards)
    manifest = {
        "format": FORMAT, "fingerprint": key, "dtype": tokenizer.dtype.name, "vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id,
        "tokens": tokens, "documents": sum(shard["documents"] for shard in writer.shards),
        "corpus": {
            "fingerprint": facts.fingerprint, "documents": facts.documents, "bytes": facts.bytes, "kinds": facts.kinds,
            "held_out_documents": facts.held_out_documents, "held_out_bytes": facts.held_out_bytes, "held_out_by": facts.split.reason,
            "quarantined": facts.quarantined, "reasons": facts.reasons,
        },
        "shards": [{name: shard[name] for name in ("tokens", "index", "documents")} for shard in writer.shards],
        "files": files,
    }  # fmt: skip
    write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1))


def _workers(config: DataConfig) -> int:
    if config.workers is not None and config.workers < 1:
        raise UserError(f"data.workers must be at least 1, not {config.workers}")
    return config.workers or min(cores(), MAX_WORKERS)


@contextlib.contextmanager
def _lock(path: Path, should_stop: Callable[[], bool] | None) -> Iterator[None]:
    """One process at a time prepares a corpus; the others wait for it. The system lets go of the lock when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        while fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                check(should_stop)
                time.sleep(0.1)
        yield

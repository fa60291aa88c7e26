"""The verb `serve` as one function: it checks what was asked for before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparing.base.config import UserError
from sparing.base.hardware import home
from sparing.serve.settings import LOCAL, Settings, read_keys

CALIBRATION_BYTES = 200_000
"""Bytes of text that the approximate tier is calibrated on."""
CHOICES = {"quantize": ("auto", "none", "int8", "int4"), "device": ("auto", "cpu", "cuda"), "speculate": ("auto", "on", "off")}


def serve(
    run: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    quantize: str = "auto",
    device: str = "auto",
    speculate: str = "auto",
    name: str | None = None,
    adapter: Sequence[str] = (),
    api_key_file: str | None = None,
    without_key: bool = False,
    cors: Sequence[str] = (),
    threads: int | None = None,
    cache_mb: int | None = None,
    expert_mb: int | None = None,
    approximate: bool = False,
    approximate_data: Sequence[str] = (),
    approximate_limit: float = 0.1,
    approximate_floor: int = 1,
    batch: int | None = None,
    queue: int = 256,
    answer_s: float = 600.0,
    drain_s: float = 30.0,
    audit_log: str | None = None,
    audit_text: bool = False,
    collect: str | None = None,
    collect_mb: int = 64,
    started: float | None = None,
) -> None:
    """Serve a run's model over HTTP until SIGTERM or Ctrl-C; call it from the main thread.

    The options are those of `sparing serve --help`: sizes in MB (2^20 bytes), times in seconds, approximate_limit in percent of the loss,
    quantize auto, none, int8 or int4, device auto, cpu or cuda, speculate auto, on or off. started: `time.monotonic()` at which metering
    began. Raises UserError: no such run, a port that is taken, packages that are missing, options that exclude each other.
    """
    for option, value in {"quantize": quantize, "device": device, "speculate": speculate}.items():
        if value not in CHOICES[option]:
            raise UserError(f"--{option} {value}: not available; choose {' or '.join(CHOICES[option])}")
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: must be from 0 to 65535")
    limits = {"answer-s": answer_s, "drain-s": drain_s, "queue": queue, "threads": threads, "batch": batch, "collect-mb": collect_mb}
    for option, value in (limits | {"cache-mb": cache_mb, "expert-mb": expert_mb}).items():
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{option} {value}: must be more than 0")
    host = host.lower()  # names of hosts are the same in capitals
    if host not in LOCAL and not (api_key_file or without_key):
        raise UserError(f"--host {host} lets others on the network in: give --api-key-file FILE, or say --without-key")
    keys = read_keys(Path(api_key_file)) if api_key_file else ()
    settings = Settings(host=host, port=port, name=name, origins=tuple(cors), answer_s=answer_s, drain_s=drain_s, keys=keys)

    from sparing.serve.audit import Audit
    from sparing.serve.server import run_server

    cache, experts = (None if size is None else size << 20 for size in (cache_mb, expert_mb))
    options: dict = {"cache_bytes": cache, "expert_bytes": experts, "max_batch": batch, "max_queue": queue, "threads": threads}
    options |= {"weights": {"none": "float32"}.get(quantize, quantize), "device": device}
    options["adapters"] = _adapters(adapter)
    options["speculate"] = {"on": True, "off": False}.get(speculate)
    if approximate or approximate_data:
        options["approximate"] = _approximate(approximate_data, approximate_limit / 100, approximate_floor)
    if audit_log is None:
        audit = Audit(home() / "audit.jsonl", audit_text, "SPARING_HOME")
    else:
        audit = Audit(None if audit_log == "none" else Path(audit_log), audit_text)
    collection = None
    if collect is not None:
        from sparing.serve.collect import Collection

        collection = Collection(collect, collect_mb << 20)
    run_server(run, settings, audit, started, collection, **options)


def _adapters(named: Sequence[str]) -> dict[str, str]:
    """{name: run} of NAME=RUN, NAME=RUN, ... Raises UserError."""
    found: dict[str, str] = {}
    for one in named:
        name, equals, run = one.partition("=")
        if not (name and equals and run):
            raise UserError(f"--adapter {one}: say NAME=RUN, the name for clients and the adapter run")
        if name in found:
            raise UserError(f"--adapter {one}: {name} is {found[name]} already")
        found[name] = run
    return found


def _approximate(paths: Sequence[str], limit: float, floor: int):
    """What the approximate tier may do; part of the text behind `paths` is read. Raises UserError for paths that name nothing."""
    from sparing.data.sources import texts
    from sparing.evals.select import select
    from sparing.infer.approximate import Approximate

    chosen = select(texts(paths, "--approximate-data"), CALIBRATION_BYTES) if paths else ()
    return Approximate(chosen, limit, floor)

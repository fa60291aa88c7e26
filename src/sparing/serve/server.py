"""`sparing serve`: opens the run, listens, and on SIGTERM or Ctrl-C lets running answers finish."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys

from sparing.account.meter import metered
from sparing.account.power import sources
from sparing.base.config import UserError
from sparing.base.layers import mixtures
from sparing.base.messages import say
from sparing.base.run import RunFolder
from sparing.data.chat import ChatTemplate, template_text
from sparing.infer.engine import Engine
from sparing.infer.predict import forecast
from sparing.serve.audit import Audit
from sparing.serve.collect import Collection
from sparing.serve.energy import Energy
from sparing.serve.service import Service
from sparing.serve.settings import Settings

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def speed_message(engine: Engine, expert_bytes: int) -> str:
    """The speed to expect with `expert_bytes` of experts in memory, in words."""
    if not mixtures(engine.config):
        return "the model has no experts: --expert-mb changes nothing"
    speed = forecast(engine.config, engine.packed_weights, expert_bytes, engine.threads)
    return (
        f"with {expert_bytes >> 20} MB of experts in memory about {speed.tokens_per_s:.0f} tokens/s are to be expected of one text: "
        f"{speed.reads:.1f} experts of {speed.expert_bytes / 1e6:.2g} MB a token come from the disk, at {speed.disk_rate / 1e6:,.0f} MB/s"
    )


def run_server(
    run: str, settings: Settings, audit: Audit, started: float | None = None, collection: Collection | None = None, **engine_options
) -> None:
    """Serve until a signal. collection: where answers go that people accept. engine_options: those of `Engine`.

    Raises UserError: no such run, port in use, missing packages."""
    try:
        import pydantic  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("serve needs its packages: pip install 'sparing[serve]'") from None
    folder = RunFolder.open(run)
    with _listening(settings) as listeners, metered("serve", folder, "serve", started) as meter:
        template = ChatTemplate(template_text(folder))
        if template.plain:
            say(f"{run} has no chat template: it is served as a base model, chats are written as plain lines of User: and Assistant:")
        energy = Energy(sources(meter.machine, meter.tariff.rates, meter.tariff.processor))
        if getattr(engine_options.get("approximate"), "texts", ()):
            say("finding out how few experts the given text needs, unless that is known already")
        with Engine(run, **engine_options) as engine:
            templates = {name: template_text(RunFolder(path)) for name, path in (engine_options.get("adapters") or {}).items()}
            own = {name: ChatTemplate(text) for name, text in templates.items() if text is not None}
            service = Service(engine, template, settings, energy, audit, own, collection)
            if collection is not None:
                say(f"answers that people accept or correct are kept in {collection.path}, with the conversation before them")
            host, port = listeners[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            if engine.approximate:
                tier = engine.approximate.calibration
                rise = f"{100 * tier.increase / tier.loss:.3f} % of the loss on {tier.tokens} tokens of {tier.date}"
                say(f"approximate answers: {tier.experts:.2f} of {engine.config.num_experts_per_tok} experts a token, {rise}")
            keyed = f", {len(settings.keys)} keys" if settings.keys else ""
            if engine.plain and engine.config.mtp_depth:
                what = "on as you asked, and can change" if engine.speculates else "off, because they could change"
                say(f"drafts are {what} a text in plain PyTorch ({engine.plain}): a row's last bits depend on the other rows")
            where = (
                f"{engine.weights} on {engine.device}, {engine.context} tokens of context, drafts {'on' if engine.speculates else 'off'}"
            )
            names = ", ".join(service.templates)
            say(f"{names} ({where}{keyed}) at http://{shown}:{port}")
            if limit := engine_options.get("expert_bytes"):
                say(speed_message(engine, limit))
            asyncio.run(_run(service, listeners))
            meter.add(int(engine.metrics().get("completion_tokens_total", 0)))


@contextlib.contextmanager
def _listening(settings: Settings):
    """The sockets, opened before the model is loaded: a port in use is reported at once. A name may mean several addresses."""
    where, port = f"{settings.host} port {settings.port}", settings.port
    hosts = ("127.0.0.1", "::1") if settings.host == "localhost" else (settings.host,)  # whatever /etc/hosts says: RFC 6761, 6.3
    try:
        found = [row for host in hosts for row in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)]
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen at {where}: {getattr(error, 'strerror', None) or error}") from None
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    with contextlib.ExitStack() as stack:
        listeners: list[socket.socket] = []
        for family, address in sorted(addresses):  # IPv4 first
            try:
                listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                if os.name == "posix":
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6 and len(addresses) > 1:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                if hasattr(socket, "TCP_USER_TIMEOUT"):  # inherited by connections: drops those that a client never reads from
                    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(2000 * settings.send_s))
                listener.bind((address[0], port, *address[2:]))
            except OSError as error:
                if listeners and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # a machine without IPv6
                    continue
                hint = f"; choose another --port, 0 for a free one ({port} is taken)" if error.errno == errno.EADDRINUSE else ""
                raise UserError(f"cannot listen at {where}: {error.strerror}{hint}") from None
            listener.listen(512)
            port = listener.getsockname()[1]  # of 0 the first address's choice
            listeners.append(listener)
        yield listeners


async def _run(service: Service, listeners: list[socket.socket]) -> None:
    import uvicorn

    from sparing.serve.app import application

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self):
            """uvicorn would raise the signals again after a clean end."""
            yield

    config = uvicorn.Config(
        application(service), log_level="critical", access_log=False, server_header=False, lifespan="off", ws="none", loop="asyncio",
        timeout_keep_alive=30, timeout_graceful_shutdown=max(1, round(service.settings.drain_s)), h11_max_incomplete_event_size=64 << 10,
    )  # fmt: skip
    server = Server(config)

    def stop(*_: object) -> None:
        if server.should_exit:
            server.force_exit = True
            return
        service.draining = server.should_exit = True
        running = service.engine.metrics().get("requests_running", 0)
        print(f"stopping: {running:.0f} answers may take {service.settings.drain_s:g} s more; again: at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(-1)  # its listener would end the process before the answers
    try:
        await server.serve(sockets=listeners)
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)

"""Notices of a cloud that this machine is about to be taken away, read from the cloud's metadata service.

Each cloud tells a machine so at an address that only the machine can reach. A thread asks there, and on a notice tells `Preempt` how many
seconds are left. What is asked, how often, and what an answer means is from the clouds' manuals, named at each service. Nothing is ever
acknowledged or changed. No fault of a service reaches the job.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from sparing.base.config import UserError
from sparing.base.rank import elastic, this_rank

CLOUD, METADATA = "SPARING_CLOUD", "SPARING_METADATA"
"""Environment variables: the cloud, where the machine doesn't say (aws, gcp, azure or none); where its metadata service is."""
ADDRESS = "http://169.254.169.254"
"""Of the metadata service, in each of the clouds. By number, because a look-up of a name could take longer than any timeout."""
TIMEOUT_S = 2.0
MOST_BYTES = 1 << 16
"""Of an answer."""
LEAD_S = 120.0
"""An event that is further away is told once, and acted on when so much time is left."""
UNTIMED_S = 30.0
"""For a notice without a readable time: the shortest that any of the clouds gives."""
STALE_S = 300.0
"""What was announced for a time so long ago has not happened: EC2 may fail to end a machine, and leaves the notice there."""
FAULTS = 60
"""In a row, after which the user is told. The first answer of Azure may take two minutes."""
SLOW_S = 60.0
"""Between questions from then on."""


class Notice(NamedTuple):
    """What is going to happen to this machine."""

    what: str
    left_s: float
    """Until it does, at least."""


class Fault(Exception):
    """No usable answer, and why."""


class Service(ABC):
    """The metadata service of a cloud."""

    name: str
    every_s: float
    """Between questions."""

    def __init__(self, address: str = ADDRESS, timeout_s: float = TIMEOUT_S):
        """Raises UserError for an address that is none."""
        try:
            parts = urlsplit(address)
            self.host, self.port = parts.hostname, parts.port or 80
        except ValueError:
            self.host = None
        if not self.host or parts.scheme != "http":
            raise UserError(f"{METADATA}={address}: expected an address such as {ADDRESS}")
        self.timeout_s = timeout_s

    @abstractmethod
    def notice(self) -> Notice | None:
        """What is announced now. Raises Fault, or whatever a broken connection or answer raises."""

    def _ask(self, path: str, headers: dict[str, str], method: str = "GET") -> tuple[int, str]:
        """-> (HTTP status, text). `http.client` knows no proxies, which must not see these questions, and follows nothing elsewhere."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_s)
        ends, body = time.monotonic() + self.timeout_s, b""
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            while part := response.read1(MOST_BYTES):
                body += part
                if len(body) > MOST_BYTES:
                    raise Fault("an endless answer")
                if time.monotonic() > ends:
                    raise Fault("timed out")
        except TimeoutError:
            raise Fault("timed out") from None
        finally:
            connection.close()
        return response.status, body.decode()

    def _text(self, path: str, headers: dict[str, str]) -> str:
        """The text of an answer that must be there."""
        status, text = self._ask(path, headers)
        if status != 200:
            raise Fault(f"HTTP {status}")
        return text.strip()


class Aws(Service):
    """EC2's notice to spot instances, two minutes ahead; AWS recommends to ask every 5 seconds.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html (`spot/instance-action`: 404 until there is a
    notice), https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html (version 2 with its token; after 401 a new
    one). Recommendations to rebalance announce nothing certain and aren't read; nor are states of auto scaling groups.
    """

    name, every_s = "AWS", 5.0
    TOKEN_S = 21600
    """How long a token lasts: the most that is allowed."""

    _token: str | None = None

    def notice(self) -> Notice | None:
        status, text = self._with_token("/latest/meta-data/spot/instance-action")
        if status == 401:
            self._token = None
            status, text = self._with_token("/latest/meta-data/spot/instance-action")
        if status == 404:
            return None
        if status != 200:
            raise Fault(f"HTTP {status}")
        found = json.loads(text)
        left = _left(datetime.fromisoformat, found.get("time"))
        return Notice(f"spot instance: {_word(found['action'])}", left) if left > -STALE_S else None

    def _with_token(self, path: str) -> tuple[int, str]:
        if self._token is None:
            status, token = self._ask("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(self.TOKEN_S)}, "PUT")
            if status != 200 or not token.isascii() or not token.isprintable():
                raise Fault(f"no token: HTTP {status}")
            self._token = token
        return self._ask(path, {"X-aws-ec2-metadata-token": self._token})


class Gcp(Service):
    """Compute Engine's notices. A spot machine is preempted 30 seconds after `preempted` is TRUE, or later where its owner asked for that.
    Before maintenance that a machine does not survive, `maintenance-event` says so: an hour ahead to a machine with GPUs, a minute to
    others. It doesn't say when; so an event that was there at the first question is taken to be near.

    https://cloud.google.com/compute/docs/instances/spot, https://cloud.google.com/compute/docs/gpus/gpu-host-maintenance,
    https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice (asked at least once an hour, or no notice is given).
    """

    name, every_s = "Google Cloud", 1.0
    HEADERS = {"Metadata-Flavor": "Google"}  # noqa: RUF012
    PREEMPTED_S, MAINTENANCE_S, GPU_MAINTENANCE_S = 30.0, 60.0, 3600.0

    GPUS = Path("/proc/driver/nvidia/gpus")

    _quiet: float | None = None
    """When no maintenance was announced, last."""

    def notice(self) -> Notice | None:
        preempted = self._text("/computeMetadata/v1/instance/preempted", self.HEADERS)
        if preempted == "TRUE":
            return Notice("spot machine: preempted", self.PREEMPTED_S)
        if preempted != "FALSE":
            raise Fault(f"neither TRUE nor FALSE: {preempted}")
        event, now = self._text("/computeMetadata/v1/instance/maintenance-event", self.HEADERS), time.monotonic()
        if event != "TERMINATE_ON_HOST_MAINTENANCE":
            self._quiet = now
            return None
        left = self.MAINTENANCE_S
        if self.GPUS.exists() and self._quiet is not None:
            left = self.GPU_MAINTENANCE_S - (now - self._quiet)
        return Notice("maintenance of the host: terminated", left)


class Azure(Service):
    """Azure's scheduled events: 30 seconds ahead of a spot machine's end, 5 to 15 minutes ahead of others; Azure recommends to ask every
    second. The first question switches the events on for the machine. They are for all machines of a set, so this one's name is asked too.
    An event that is acknowledged may begin earlier: this never does.

    https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events,
    https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service (name, proxies, at most 5 questions a second).
    """

    name, every_s = "Azure", 1.0
    HEADERS = {"Metadata": "true"}  # noqa: RUF012
    ENDING = ("Preempt", "Terminate", "Reboot", "Redeploy")
    """Events that no process survives. The other kind, Freeze, is a pause of seconds."""

    _machine: str | None = None

    def notice(self) -> Notice | None:
        if self._machine is None:
            name = self._text("/metadata/instance/compute/name?api-version=2021-02-01&format=text", self.HEADERS)
            if not re.fullmatch(r"[\w.-]{1,100}", name):
                raise Fault(f"no machine's name: {name}")
            self._machine = name.lower()
        found = json.loads(self._text("/metadata/scheduledevents?api-version=2020-07-01", self.HEADERS))
        notices = [
            # NotBefore of an event that has started is empty
            Notice(f"scheduled event: {event['EventType']}", _left(parsedate_to_datetime, event.get("NotBefore")))
            for event in found["Events"]
            if event["EventType"] in self.ENDING and self._machine in [str(name).lower() for name in event["Resources"]]
        ]
        return min(notices, key=lambda notice: notice.left_s, default=None)


SERVICES: dict[str, type[Service]] = {"aws": Aws, "gcp": Gcp, "azure": Azure}


def cloud(files: Path = Path("/sys")) -> str | None:
    """The cloud whose machine this is, by what its firmware says (DMI), so that elsewhere nothing is ever asked; SPARING_CLOUD overrides.

    EC2: the maker is "Amazon EC2" (systemd, src/basic/virt.c), of older machines the hypervisor's UUID begins with "ec2"
    (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/identify_ec2_instances.html). Google: the product is "Google ..."
    (google-auth, google/auth/compute_engine/_metadata.py). Azure: the tag of the chassis (cloud-init, tools/ds-identify), because its
    maker's name is also that of Hyper-V at home. Raises UserError for an unknown SPARING_CLOUD.
    """
    chosen = os.environ.get(CLOUD)
    if chosen:
        if chosen not in (*SERVICES, "none"):
            raise UserError(f"{CLOUD}={chosen}: expected one of {', '.join(SERVICES)}, none")
        return None if chosen == "none" else chosen

    def says(name: str) -> str:
        try:
            return (files / name).read_text(errors="replace").strip()
        except OSError:
            return ""

    if says("class/dmi/id/sys_vendor") == "Amazon EC2" or says("hypervisor/uuid").lower().startswith("ec2"):
        return "aws"
    if says("class/dmi/id/product_name").startswith("Google"):
        return "gcp"
    if says("class/dmi/id/chassis_asset_tag") == "7783-7084-3265-9085-8269-3286-77":
        return "azure"
    return None


@contextmanager
def notices(leave_by: Callable[[float], None]) -> Iterator[None]:
    """While it lasts, a notice that this machine goes away stops the job, as a signal would. On a machine of no cloud it does nothing.
    leave_by: gets the seconds that are left, from another thread, once.

    One rank of each machine asks: ranks that train together agree to stop. Before they do, rank 0 that leaves tells the others; another
    one's absence is noticed at the first sum, and nothing is there to be lost yet. Raises UserError for environment variables that are
    wrong.
    """
    name = cloud()
    if name is None or this_rank().local or elastic():  # there the launcher asks, and leaves with its ranks
        yield
        return
    service, left, leaving = SERVICES[name](os.environ.get(METADATA) or ADDRESS), threading.Event(), threading.Lock()

    def leave(seconds: float) -> None:
        with leaving:
            if not left.is_set():
                leave_by(seconds)

    threading.Thread(target=watch, args=(service, leave, left), daemon=True, name="sparing-notices").start()
    try:
        yield
    finally:
        with leaving:  # the thread is not waited for, which may be in the middle of a question; but it sends no signal after this
            left.set()


def watch(service: Service, leave_by: Callable[[float], None], left: threading.Event, slow_s: float = SLOW_S) -> None:
    """Ask until `left` is set or a notice has come, which is told, and of which `leave_by` gets the seconds that are left."""
    faults, told = 0, set()
    while not left.is_set():
        try:
            notice = service.notice()
            faults = 0
        except Exception as error:  # whatever a service says, the job goes on
            notice, faults = None, faults + 1
            if faults == FAULTS and "faults" not in told:
                told.add("faults")
                why = str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {error}"
                _tell(f"{service.name} doesn't say whether it takes this machine away ({_word(why)}, {faults} times in a row); asked on")
        if left.is_set():
            return
        if notice is not None and notice.left_s <= LEAD_S:
            _tell(f"{service.name} takes this machine away: {notice.what}, in {max(0.0, notice.left_s):.0f} s; the run stops now")
            return leave_by(notice.left_s)
        if notice is not None and notice.what not in told:
            told.add(notice.what)
            minutes = f"{notice.left_s / 60:.0f} minutes"
            _tell(f"{service.name} takes this machine away: {notice.what}, in {minutes}; the run goes on until {LEAD_S:.0f} s before")
        left.wait(slow_s if faults >= FAULTS else service.every_s)


def _tell(text: str) -> None:
    """Any rank may be the one that is told: `messages.say` would keep quiet on all but the first."""
    with suppress(OSError, ValueError):
        print(f"sparing: {text}", file=sys.stderr, flush=True)


def _left(parse: Callable[[str], datetime], time_: object) -> float:
    """Seconds from now to a time in words."""
    try:
        at = parse(time_)
        return (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError, OverflowError):
        return UNTIMED_S


def _word(text: object) -> str:
    """What a service said, in a line of ours."""
    return re.sub(r"\s+|[^\x20-\x7e]", " ", str(text))[:80]

"""Notices of the clouds that this machine is taken away, read from a local imitation of each metadata service."""

import json
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sparing.base import notices as module
from sparing.base.config import UserError
from sparing.base.files import read_lines
from sparing.base.notices import Aws, Azure, Fault, Gcp, Notice, cloud, notices, watch
from sparing.base.preempt import Interrupted, Preempt
from sparing.base.run import RunFolder, verify_folder

TAG = "7783-7084-3265-9085-8269-3286-77"


class Handler(BaseHTTPRequestHandler):
    """What the manuals say of each service: its headers, tokens and answers."""

    def log_message(self, *_):
        pass

    def do_PUT(self):
        service = self.server.service
        if service.cloud != "aws" or self.path != "/latest/api/token":
            return self.answer(403, "")
        if not 1 <= int(self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", 0)) <= 21600:
            return self.answer(400, "")
        service.token = f"token-{len(service.asked)}=="
        self.answer(200, service.token)

    def do_GET(self):
        service = self.server.service
        service.asked.append(self.path)
        if service.broken is not None:
            return service.broken(self)
        if "X-Forwarded-For" in self.headers:
            return self.answer(403, "")
        getattr(self, service.cloud)(service)

    def aws(self, service):
        if service.token is None or self.headers.get("X-aws-ec2-metadata-token") != service.token:
            return self.answer(401, "")
        if self.path == "/latest/meta-data/events/recommendations/rebalance":
            return self.answer(200, json.dumps({"noticeTime": "2020-10-27T08:22:00Z"}))
        if self.path != "/latest/meta-data/spot/instance-action" or service.notice is None:
            return self.answer(404, "<html>404 - Not Found</html>")
        self.answer(200, json.dumps(service.notice))

    def gcp(self, service):
        if self.headers.get("Metadata-Flavor") != "Google":
            return self.answer(403, "")
        values = {"preempted": "FALSE", "maintenance-event": "NONE"} | (service.notice or {})
        name = self.path.removeprefix("/computeMetadata/v1/instance/")
        self.answer(200, values[name]) if name in values else self.answer(404, "")

    def azure(self, service):
        if self.headers.get("Metadata") != "true":
            return self.answer(400, "")
        if self.path == "/metadata/instance/compute/name?api-version=2021-02-01&format=text":
            return self.answer(200, "Worker_3")
        if self.path != "/metadata/scheduledevents?api-version=2020-07-01":
            return self.answer(404, "")
        self.answer(200, json.dumps({"DocumentIncarnation": 1, "Events": service.notice or []}))

    def answer(self, status, text):
        body = text if isinstance(text, bytes) else text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that did not wait: told by a thread, it would be in another test's output."""


class Imitation:
    """A metadata service on this machine. notice: what it announces; broken: answers instead of it."""

    def __init__(self, cloud):
        self.cloud, self.notice, self.broken, self.token, self.asked = cloud, None, None, None, []
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.block_on_close, self.server.service = True, False, self
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def imitation():
    servers = []

    def start(cloud):
        servers.append(Imitation(cloud))
        threading.Thread(target=servers[-1].server.serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1]

    yield start
    for one in servers:
        one.server.shutdown()
        one.server.server_close()


def soon(seconds):
    return datetime.now(UTC) + timedelta(seconds=seconds)


def event(kind, seconds, *machines, status="Scheduled"):
    not_before = format_datetime(soon(seconds), usegmt=True) if status == "Scheduled" else ""
    return {
        "EventId": "A123BC45-1234-5678-AB90-ABCDEF123456", "EventStatus": status, "EventType": kind, "ResourceType": "VirtualMachine",
        "Resources": list(machines), "NotBefore": not_before, "Description": "", "EventSource": "Platform", "DurationInSeconds": -1,
    }  # fmt: skip


def near(seconds):
    """Left of so many seconds, on a machine that may be busy."""
    return pytest.approx(seconds - 20, abs=21)


def test_aws(imitation):
    server = imitation("aws")
    service = Aws(server.address)
    assert service.notice() is None
    server.token = "another"  # as after the six hours that one lasts
    assert service.notice() is None
    server.notice = {"action": "terminate", "time": soon(119).strftime("%Y-%m-%dT%H:%M:%SZ")}
    what, left = service.notice()
    assert what == "spot instance: terminate" and left == near(119)
    server.notice = {"action": "stop", "time": "soon"}
    assert service.notice() == Notice("spot instance: stop", module.UNTIMED_S)
    server.notice = {"action": "stop", "time": "2017-09-18T08:22:00Z"}  # it was not stopped
    assert service.notice() is None
    assert set(server.asked) == {"/latest/meta-data/spot/instance-action"}


def test_gcp(imitation, tmp_path, monkeypatch):
    server = imitation("gcp")
    service = Gcp(server.address)
    assert service.notice() is None
    server.notice = {"maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE"}
    assert service.notice() is None
    server.notice = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
    what, left = service.notice()
    assert what == "maintenance of the host: terminated" and left == 60
    monkeypatch.setattr(Gcp, "GPUS", tmp_path)
    assert service.notice().left_s == near(3600)
    assert Gcp(server.address).notice().left_s == 60  # announced nobody knows when
    server.notice = {"preempted": "TRUE"}
    assert service.notice() == Notice("spot machine: preempted", 30)


def test_azure(imitation):
    server = imitation("azure")
    service = Azure(server.address)
    assert service.notice() is None
    server.notice = [event("Preempt", 30, "worker_1"), event("Freeze", 600, "worker_3")]
    assert service.notice() is None
    server.notice = [event("Terminate", 600, "worker_3"), event("Preempt", 30, "worker_1", "worker_3")]
    what, left = service.notice()
    assert what == "scheduled event: Preempt" and left == near(30)
    server.notice = [event("Reboot", 0, "worker_3", status="Started")]
    assert service.notice() == Notice("scheduled event: Reboot", module.UNTIMED_S)
    assert [path for path in server.asked if "compute" in path] == [server.asked[0]]


def test_no_proxy_sees_a_question(imitation, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert Gcp(imitation("gcp").address).notice() is None


def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.02)


ANNOUNCED = {
    "aws": lambda: {"action": "terminate", "time": "soon"},
    "gcp": lambda: {"preempted": "TRUE"},
    "azure": lambda: [event("Preempt", 0, "worker_3", status="Started")],
}
BROKEN = {
    "500": lambda handler: handler.answer(500, "no"),
    "503": lambda handler: handler.answer(503, "no"),
    "moved": lambda handler: handler.answer(301, ""),
    "a page": lambda handler: handler.answer(200, "<html>Please log in</html>"),
    "JSON of another kind": lambda handler: handler.answer(200, '[{"Events": 7}]'),
    "deep": lambda handler: handler.answer(200, "[" * 60_000),
    "bytes": lambda handler: handler.answer(200, bytes(range(256))),
    "no HTTP": lambda handler: handler.wfile.write(b"hello\r\n\r\n"),
    "empty": lambda handler: handler.answer(200, ""),
    "endless": lambda handler: handler.answer(200, b"7" * (10 * module.MOST_BYTES)),
    "closed": lambda handler: handler.connection.close(),
    "late": lambda handler: time.sleep(0.4),
    "drips": drip,
}


@pytest.mark.parametrize("cloud", module.SERVICES)
def test_wrong_answers_are_survived_and_the_notice_after_them_is_read(imitation, cloud):
    server = imitation(cloud)
    server.notice = ANNOUNCED[cloud]()
    for name, broken in BROKEN.items():

        def once(handler, broken=broken):
            server.broken = None
            broken(handler)

        server.broken, before, found = once, len(server.asked), []
        service = module.SERVICES[cloud](server.address, 0.3)
        service.every_s = 0.0
        watch(service, found.append, threading.Event())
        assert len(found) == 1 and 0 < found[0] <= 30, name
        assert len(server.asked) >= before + 2, name


class Script:
    """A service that says one thing after the other, and the last one again and again."""

    name, every_s = "A cloud", 0.0

    def __init__(self, *answers):
        self.answers = list(answers)

    def notice(self):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def watched(*answers, **options):
    """What `leave_by` was told."""
    found = []
    watch(Script(*answers), found.append, threading.Event(), **options)
    return found


def test_a_distant_event_is_told_once_and_acted_on_when_it_is_near(capsys):
    assert watched(None, Notice("reboot", 900), Notice("reboot", 899), Notice("reboot", 119)) == [119]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "sparing: A cloud takes this machine away: reboot, in 15 minutes; the run goes on until 120 s before",
        "sparing: A cloud takes this machine away: reboot, in 119 s; the run stops now",
    ]


def test_many_faults_in_a_row_are_told_once_and_then_it_asks_more_slowly(capsys):
    started = time.monotonic()
    few = [Fault("HTTP 500")] * (module.FAULTS - 1)
    many = [ValueError("no\nJSON")] * (module.FAULTS + 2)
    assert watched(*few, None, *many, *many, Notice("gone", 30), slow_s=0.001) == [30]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0] == (
        "sparing: A cloud doesn't say whether it takes this machine away (ValueError: no JSON, 60 times in a row); asked on"
    )
    assert time.monotonic() > started


def test_it_ends_with_the_job(imitation, monkeypatch):
    server = imitation("azure")
    monkeypatch.setenv("SPARING_CLOUD", "azure")
    monkeypatch.setenv("SPARING_METADATA", server.address)
    monkeypatch.setattr(Azure, "every_s", 0.01)
    with Preempt("go on") as signals, notices(signals.leave_by):
        thread = next(thread for thread in threading.enumerate() if thread.name == "sparing-notices")
        while len(server.asked) < 5:
            time.sleep(0.01)
    thread.join(30)
    assert not thread.is_alive() and not signals.requested


def test_a_notice_stops_what_can_be_left_at_once(imitation, monkeypatch):
    server = imitation("gcp")
    monkeypatch.setenv("SPARING_CLOUD", "gcp")
    monkeypatch.setenv("SPARING_METADATA", server.address)
    monkeypatch.setattr(Gcp, "every_s", 0.01)
    with Preempt("go on") as signals, notices(signals.leave_by), pytest.raises(Interrupted, match="go on"), signals.interruptible():
        server.notice = {"preempted": "TRUE"}
        time.sleep(60)
        pytest.fail("the notice came to nothing")


def test_in_another_thread_it_is_seen_between_steps():
    seen = []

    def work():
        with Preempt("go on") as signals:
            signals.leave_by(100)
            seen.append(signals.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]


def test_which_cloud(tmp_path, monkeypatch):
    monkeypatch.delenv("SPARING_CLOUD", raising=False)
    assert cloud(tmp_path) is None
    for number, (name, text, found) in enumerate(
        [
            ("class/dmi/id/sys_vendor", "Amazon EC2", "aws"),
            ("hypervisor/uuid", "ec2e1916-9099-7caf-fd21-012345abcdef", "aws"),
            ("class/dmi/id/product_name", "Google Compute Engine", "gcp"),
            ("class/dmi/id/chassis_asset_tag", TAG, "azure"),
            ("class/dmi/id/sys_vendor", "Microsoft Corporation", None),
            ("class/dmi/id/sys_vendor", "QEMU", None),
        ]
    ):
        file = tmp_path / str(number) / name
        file.parent.mkdir(parents=True)
        file.write_text(text + "\n")
        assert cloud(tmp_path / str(number)) == found
    monkeypatch.setenv("SPARING_CLOUD", "none")
    assert cloud(tmp_path / "0") is None
    monkeypatch.setenv("SPARING_CLOUD", "gcp")
    assert cloud(tmp_path / "0") == "gcp"
    monkeypatch.setenv("SPARING_CLOUD", "amazon")
    with pytest.raises(UserError, match="SPARING_CLOUD=amazon: expected one of aws, gcp, azure, none"):
        cloud()


def test_elsewhere_and_on_all_but_one_rank_nothing_is_started(imitation, monkeypatch):
    threads = threading.active_count()
    monkeypatch.setenv("SPARING_CLOUD", "none")
    with notices(Preempt("go on").leave_by):
        assert threading.active_count() == threads
    monkeypatch.setenv("SPARING_CLOUD", "aws")
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with notices(Preempt("go on").leave_by):
        assert threading.active_count() == threads
    monkeypatch.setenv("LOCAL_RANK", "0")
    for address in ("127.0.0.1:80", "https://127.0.0.1", "http://", "http://127.0.0.1:port"):
        monkeypatch.setenv("SPARING_METADATA", address)
        with pytest.raises(UserError, match="expected an address such as"), notices(Preempt("go on").leave_by):
            pytest.fail("unreachable")


def in_a_process(text, **environment):
    """-> (exit status, what it said) of a program."""
    program = "import os, signal, threading, time\nfrom sparing.base import preempt\nfrom sparing.base.preempt import Preempt\n"
    done = subprocess.run(
        [sys.executable, "-c", program + textwrap.dedent(text)], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


SAVES = """
    preempt.GRACE_S, preempt.SAVING_S, preempt.MARGIN_S = 0.05, 0.1, 0.1
    with Preempt("go on") as signals:
        with signals.finishing("saving"):
            {stops}
            end = time.monotonic() + {lasts}
            while time.monotonic() < end:
                time.sleep(0.01)
            print("saved")
"""


@pytest.mark.parametrize(
    ("stops", "saved"),
    [
        ("os.kill(os.getpid(), signal.SIGTERM)", False),
        ("signals.leave_by(60)", True),
        ("signals.leave_by(60); os.kill(os.getpid(), signal.SIGTERM)", True),  # of a machine that is going down already
        ("os.kill(os.getpid(), signal.SIGTERM); signals.leave_by(60)", True),
        ("signals.leave_by(60); os.kill(os.getpid(), signal.SIGINT)", False),
        ("signals.leave_by(0)", False),
    ],
)
def test_a_notice_gives_the_time_that_is_left_to_what_has_to_be_finished(stops, saved):
    status, said = in_a_process(SAVES.format(stops=stops, lasts=0.5 if saved else 100))
    assert (status, "saved" in said) == ((0, True) if saved else (130, False)), said


def test_code_that_does_not_come_back_is_left_before_the_machine_goes():
    status, said = in_a_process(
        """
        preempt.GRACE_S, preempt.SAVING_S, preempt.MARGIN_S = 30, 0.1, 0.5
        with Preempt("go on") as signals:
            threading.Timer(0.1, signals.leave_by, [0.7]).start()
            import hashlib
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # C code that takes many minutes and lets other threads run
            print("came back")
        """
    )
    assert status == 130 and "go on" in said, said


def test_ranks_have_the_time_that_torchrun_gives_them():
    rank = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    twice = "os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1); os.kill(os.getpid(), signal.SIGTERM)"
    status, said = in_a_process(SAVES.format(stops=twice, lasts=0.5), **rank)
    assert status == 0 and "saved" in said, said


RECIPE = """
[train]
seq_len = 32
batch_size = 4
micro_batch_size = 2
dtype = "float32"
kernels = "plain"
threads = 1
replicas = 1
compile = false
evals = 1
checkpoint_interval_s = 100000.0
[model]
vocab_size = 384
hidden_size = 32
num_layers = 1
num_heads = 2
"""


def steps_of(run):
    return [line["step"] for line in read_lines(run / "metrics.jsonl") if "loss" in line] if (run / "metrics.jsonl").exists() else []


def sparing(folder, server, *words):
    environment = {"SPARING_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment |= {"SPARING_CLOUD": server.cloud, "SPARING_METADATA": server.address}
    words = [sys.executable, "-m", "sparing", *map(str, words)]
    return subprocess.Popen(words, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def stopped_by_a_notice(process, server, run, after):
    """Wait for so many steps, announce the end of the machine, and check how the run was left; -> its last step."""
    try:
        while process.poll() is None and len(steps_of(run)) < after:
            time.sleep(0.02)
        server.notice = ANNOUNCED[server.cloud]()
        said = process.communicate(timeout=600)[1]
    finally:
        process.terminate()
    server.notice = None
    assert process.returncode == 130, said
    assert said.count(" takes this machine away: ") == 1 and f"sparing resume {run}" in said and "Traceback" not in said, said
    steps = steps_of(run)
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= after
    newest = max(RunFolder(run).state.glob("step-*"))
    assert newest.name == f"step-{len(steps):08d}"
    verify_folder(newest)
    return len(steps)


@pytest.mark.parametrize(("cloud", "how"), [pytest.param("azure", (), marks=pytest.mark.slow), ("gcp", ("launch", "-n", 2))])
def test_a_run_is_saved_after_a_notice_and_goes_on_later(imitation, tmp_path, cloud, how):
    server, dice = imitation(cloud), random.Random(0)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 6))) for _ in range(200)]
    for name in range(8):
        (tmp_path / f"{name}.txt").write_text(" ".join(dice.choices(words, k=1500)))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    run = tmp_path / "run"
    training = ("train", tmp_path / "recipe.toml", "--data", tmp_path, "--budget", "100Mtok", "--samples", 0, "--out", run)
    last = stopped_by_a_notice(sparing(tmp_path, server, *how, *training), server, run, 3)
    stopped_by_a_notice(sparing(tmp_path, server, *how, "resume", run), server, run, last + 3)

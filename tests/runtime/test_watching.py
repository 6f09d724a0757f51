"""What the server tells of itself: metrics of queue and device, a line a request, traces, systemd."""

import json
import logging
import re
import socket
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from fakes import bundles
from fakes.requests_to import ask

import edgekit
from edgekit.cli import cli
from edgekit.runtime import sensors
from edgekit.runtime.host import Host
from edgekit.runtime.server import access_log, serve_in_thread, systemd

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def running(tmp_path):
    bundles.mlp_bundle(tmp_path / "b")
    host = Host(edgekit.load(tmp_path / "b"))
    with serve_in_thread(host) as running:
        yield running
    host.close()


def infer(running, headers=None):
    given = {"name": "image", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}
    return ask(running.url, "POST", "/v2/models/mlp/infer", json.dumps({"inputs": [given]}), headers)


def metrics(running):
    text = ask(running.url, path="/metrics")[2].decode()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}


def test_metrics_are_read_by_prometheus_own_parser_and_count_the_queue(running):
    for _ in range(3):
        assert infer(running)[0] == 200
    found = metrics(running)
    assert found["edgekit_queue_seconds_count"] == 3
    assert 0 < found["edgekit_queue_seconds_sum"] < 3
    assert found['edgekit_queue_seconds_bucket{le="+Inf"}'] == 3
    assert (found["edgekit_requests_waiting"], found["edgekit_turned_away_total"]) == (0, 0)
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client reads the metrics")
    families = {f.name: f for f in parser.text_string_to_metric_families(ask(running.url, path="/metrics")[2].decode())}
    assert families["edgekit_queue_seconds"].type == "histogram"


def test_sensors_are_read_as_linux_lays_them_out(tmp_path):
    files = {
        "sys/class/thermal/thermal_zone0/temp": "48312\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "no number",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
        "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "2400000\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50000\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    found = sensors.read(tmp_path)
    assert found == sensors.Readings({"cpu-thermal-0": 48.312}, {"cpu0": 1.5e9}, {"cpu0": 2.4e9}, throttled=False)
    (tmp_path / "sys/devices/platform/soc/soc:firmware/get_throttled").write_text("50005\n")
    assert sensors.read(tmp_path).throttled is True
    assert sensors.read(tmp_path / "nothing") == sensors.Readings({}, {}, {}, None)


def test_a_request_is_one_line_and_joins_the_callers_trace(running, caplog):
    with caplog.at_level(logging.INFO, logger="edgekit.access"):
        _, headers, _ = infer(running, {"traceparent": TRACE})
        assert ask(running.url, path="/nothing")[0] == 404
        deadline = time.monotonic() + 10
        while len(caplog.records) < 2:  # a line is written when the answer is on its way
            assert time.monotonic() < deadline
            time.sleep(0.01)
    first, second = (json.loads(record.message) for record in caplog.records)
    assert (first["method"], first["path"], first["status"]) == ("POST", "/v2/models/mlp/infer", 200)
    assert first["trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert first["parent_id"] == "00f067aa0ba902b7"
    assert {n.lower(): v for n, v in headers.items()}[
        "traceresponse"
    ] == f"00-{first['trace_id']}-{first['span_id']}-01"
    assert 0 < first["ms"] < 5000
    assert (second["status"], "trace_id" in second) == (404, False)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00-1-2-01",
        TRACE.replace("4bf9", "zzzz"),
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
        TRACE[:36] + "0" * 16 + "-01",
    ],
)
def test_what_is_no_trace_is_none(header):
    assert access_log.trace_of({b"traceparent": header.encode()}) is None


class Listener:
    """Stands where systemd listens."""

    def __init__(self, folder):
        self.path = str(folder / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.settimeout(20)

    def next(self):
        return self.socket.recv(100).decode()


def test_systemd_hears_that_the_server_is_ready_lives_and_stops(tmp_path):
    bundles.null_bundle(tmp_path / "b")
    listener = Listener(tmp_path)
    command = [
        sys.executable,
        "-c",
        "from edgekit.cli import main; main()",
        "serve",
        str(tmp_path / "b"),
        "--port",
        "0",
    ]
    environment = {"NOTIFY_SOCKET": listener.path, "WATCHDOG_USEC": "200000", "PATH": ""}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert [listener.next() for _ in range(3)] == ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]
        child.terminate()
        while (told := listener.next()) == "WATCHDOG=1":
            pass
        assert told == "STOPPING=1"
        child.communicate(timeout=20)
    assert child.returncode == 0


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [({}, None), ({"WATCHDOG_USEC": "3000000"}, 1.5), ({"WATCHDOG_USEC": "0"}, None), ({"WATCHDOG_USEC": "x"}, None),
     ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None)],
)  # fmt: skip
def test_the_watchdog_is_fed_twice_as_often_as_it_asks(environment, seconds):
    assert systemd.watchdog_seconds(environment) == seconds


def test_nobody_listens_is_no_fault(tmp_path):
    assert not systemd.notify("READY=1", {})
    assert not systemd.notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "gone")})
    assert not systemd.notify("READY=1", {"NOTIFY_SOCKET": "relative"})


def test_the_unit_runs_the_command_that_was_typed(tmp_path, monkeypatch):
    bundles.null_bundle(tmp_path / "a b")
    monkeypatch.chdir(tmp_path)
    flags = ["--threads", "2", "--token-file", "t%k", "--access-log", "--no-isolate", "--systemd"]
    shown = CliRunner().invoke(cli, ["serve", "a b", *flags])
    assert shown.exit_code == 0, shown.output
    line = re.search(r"^ExecStart=(.*)$", shown.output, re.MULTILINE)[1]
    assert (
        line.split(" serve ")[1]
        == f"'{tmp_path}/a b' --threads 2 --no-isolate --token-file {tmp_path!s}/t%%k --access-log"
    )
    assert "Type=notify" in shown.output
    assert "WatchdogSec=30" in shown.output
    assert json.loads(CliRunner().invoke(cli, ["serve", "a b", "--systemd", "--json"]).output)["unit"].startswith(
        "[Unit]"
    )

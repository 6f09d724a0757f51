"""The command line's frame: every command speaks alike, starts fast, and fails with a hint and a code."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import click
import pytest
from click.testing import CliRunner

from edgekit import errors
from edgekit.cli import EPILOG, _terminal, cli
from edgekit.cli._terminal import Terminal, bar, command, markdown_table

HEAVY = {"numpy", "torch", "onnx", "onnxruntime", "tuf", "securesystemslib", "paho", "httptools", "PIL", "asyncio",
         "multiprocessing", "sqlite3", "cryptography", "matplotlib", "iotcore", "xllamacpp", "ssl"}  # fmt: skip


def walk(group, path=()):
    context = click.Context(group)
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        if isinstance(found, click.Group):
            yield from walk(found, (*path, name))
        else:
            yield " ".join((*path, name)), found


COMMANDS = dict(walk(cli))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_speaks_json_is_quiet_on_demand_and_shows_traces_on_demand(name):
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert {"--json", "--quiet", "--debug"} <= options


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(name):
    found = COMMANDS[name]
    assert found.help
    assert found.help.strip().splitlines()[0].endswith(".")
    assert [p.opts[0] for p in found.params if isinstance(p, click.Option) and not p.help] == []


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['edgekit', '--help']; before = set(sys.modules)\nfrom edgekit.cli import main\n"
        "try: main()\nexcept SystemExit: pass\nprint('MODULES', *(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text, _, modules = done.stdout.partition("MODULES")
    assert "doctor" in text
    assert HEAVY & {name.partition(".")[0] for name in modules.split()} == set()


def test_help_tells_the_exit_code_of_every_kind_of_error():
    told = {int(number) for number in re.findall(r"\b(\d+) [a-z]", EPILOG)}

    def codes(kind):
        return {kind.exit_code}.union(*(codes(child) for child in kind.__subclasses__()))

    assert codes(errors.EdgekitError) <= told


def test_an_unknown_command_offers_the_nearest():
    done = CliRunner().invoke(cli, ["dcotor"])
    assert done.exit_code == 2
    assert "did you mean doctor" in done.output


def edgekit(*arguments, **settings):
    return subprocess.run(
        [sys.executable, "-m", "edgekit", *arguments], capture_output=True, text=True, check=False, **settings
    )


def test_the_shell_can_complete_commands():
    done = edgekit(env={**os.environ, "_EDGEKIT_COMPLETE": "bash_source"})
    assert "complete -o nosort -F" in done.stdout
    words = {"COMP_WORDS": "edgekit dev", "COMP_CWORD": "1", "_EDGEKIT_COMPLETE": "bash_complete"}
    done = edgekit(env={**os.environ, **words})
    assert done.stdout.split() == ["plain,devices"]


def run(function, *arguments):
    return CliRunner().invoke(command(name="try")(function), list(arguments))


def raise_usage(_terminal):
    raise errors.TrustError("the signature is broken", "call somebody")


def test_an_error_becomes_message_hint_and_code():
    done = run(raise_usage)
    assert done.exit_code == errors.TrustError.exit_code
    assert done.stderr == "error: the signature is broken\nhint: call somebody\n"
    assert done.stdout == ""


def test_json_tells_an_error_too():
    done = run(raise_usage, "--json")
    assert json.loads(done.stdout)["error"] == {
        "kind": "TrustError", "message": "the signature is broken", "hint": "call somebody", "exit_code": 10,
    }  # fmt: skip


def test_debug_shows_the_trace_and_keeps_the_code():
    done = run(raise_usage, "--debug")
    assert done.exit_code == 10
    assert "Traceback" in done.stderr
    assert "raise_usage" in done.stderr


def test_what_the_system_refuses_has_a_hint_and_no_trace():
    def full(_terminal):
        raise OSError(28, "No space left on device")

    done = run(full)
    assert done.exit_code == 12
    assert "free disk space" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_memory_is_told():
    def huge(_terminal):
        raise MemoryError

    assert run(huge).exit_code == 12


def test_quiet_says_nothing_but_warns():
    def talk(terminal):
        terminal.say("hello")
        terminal.warn("careful")
        terminal.result({"a": 1})

    done = run(talk, "--quiet")
    assert (done.stdout, done.stderr) == ("", "warning: careful\n")


def test_json_is_the_only_thing_on_stdout():
    def talk(terminal):
        terminal.say("hello")
        terminal.result({"a": 1})

    assert json.loads(run(talk, "--json").stdout) == {"a": 1}


def test_a_bug_is_told_without_a_trace_and_with_one_under_debug():
    code = (
        "from edgekit.cli import main, cli\nimport click\n"
        "debug = click.Option(['--debug'], is_flag=True, expose_value=False)\n"
        "bug = click.Command('x', callback=lambda: 1 / 0, params=[debug])\n"
        "cli.resolve_command = lambda context, words: ('x', bug, words[1:])\nmain()"
    )
    short = subprocess.run([sys.executable, "-c", code, "x"], capture_output=True, text=True, check=False)
    assert short.returncode == 1
    assert "internal error: ZeroDivisionError" in short.stderr
    assert "Traceback" not in short.stderr
    long = subprocess.run([sys.executable, "-c", code, "x", "--debug"], capture_output=True, text=True, check=False)
    assert "Traceback" in long.stderr


def test_a_reader_that_goes_away_is_no_error():
    code = "import sys; from edgekit.cli import main; sys.argv = ['edgekit', 'devices', 'list', '--json']; main()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert b"error" not in said
    assert b"Traceback" not in said


def test_interrupt_leaves_with_130():
    code = (
        "import click, time\nfrom edgekit.cli import main, cli\n"
        "slow = click.Command('x', callback=lambda: (print('up', flush=True), time.sleep(60)))\n"
        "cli.resolve_command = lambda context, words: ('x', slow, [])\nmain()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "x"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert "Traceback" not in process.stderr.read()


def test_the_bar_shows_what_how_far_and_how_long():
    assert bar("training", 5, 10, 30.0) == f"{'training':<34} [############------------] 5/10 0:30 left"
    assert bar("training", 0, 10, 3.0).endswith("0/10 ")
    assert bar("searching", 7, 0, 65.0) == "searching … 7 1:05"


def test_the_bar_is_drawn_on_a_terminal_and_wiped_at_the_end():
    code = (
        "import time\nfrom edgekit.cli._terminal import Terminal\n"
        "t = Terminal(as_json=False, quiet=False)\n"
        "for i in range(5):\n    t.progress('counting sheep', i, 4)\n    time.sleep(0.12)\n"
        "t.say('slept')"
    )
    shown = under_pty([sys.executable, "-c", code])
    assert "counting sheep" in shown
    assert "2/4" in shown
    assert re.search(r"0:0\d left", shown)
    assert re.search(r"\r\x1b\[K(\r\x1b\[K)?slept", shown)


def test_the_bar_never_wraps_on_a_narrow_terminal():
    code = (
        "from edgekit.cli._terminal import Terminal\nt = Terminal(as_json=False, quiet=False)\n"
        "t.progress('a very long name of something', 1, 1000)"
    )
    shown = under_pty([sys.executable, "-c", code], {"COLUMNS": "30"})
    assert len(shown.rpartition("\x1b[K")[2]) <= 30


def under_pty(arguments, env=None):
    parent, child = pty.openpty()
    process = subprocess.Popen(arguments, stdout=child, stderr=child, env={**os.environ, **(env or {})})
    os.close(child)
    shown = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and select.select([parent], [], [], 30)[0]:
        try:
            piece = os.read(parent, 4096)
        except OSError:  # Linux says so when the last writer is gone
            break
        if not piece:
            break
        shown += piece
    os.close(parent)
    assert process.wait(timeout=30) == 0
    return shown.decode()


def test_nothing_is_drawn_where_stderr_is_no_terminal(capsys):
    Terminal(as_json=False, quiet=False).progress("counting", 1, 2)
    assert capsys.readouterr().err == ""


def test_bars_of_two_tasks_do_not_share_a_clock(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(_terminal.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    terminal = Terminal(as_json=False, quiet=False)
    terminal.progress("layer 1", 1, 10)
    now[0] = 100.0
    terminal.progress("layer 10", 1, 10)
    assert "0:00 left" in capsys.readouterr().err.rpartition("\r")[2]


def test_tables_line_up_and_are_markdown():
    assert markdown_table(("a", "long"), [("wide cell", 1)]).splitlines() == [
        "| a         | long |",
        "|-----------|------|",
        "| wide cell | 1    |",
    ]

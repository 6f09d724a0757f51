"""The rules of ARCHITECTURE.md that a linter does not know, checked on every file there is."""

import ast
import importlib
import pkgutil
import statistics
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

import edgekit

ROOT = Path(edgekit.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if "_examples" not in path.parts)
LIGHT = (
    "edgekit.runtime", "edgekit.ota.device", "edgekit.ota.messages", "edgekit.bundle", "edgekit.guards",
    "edgekit.device_profiles",
)  # fmt: skip
WORKSTATION = {
    "torch", "onnx", "onnxscript", "torch_pruning", "transformers", "coremltools", "litert_torch",
    "edgekit.model", "edgekit.workload", "edgekit.datasets", "edgekit.compress", "edgekit.export", "edgekit.ota.server",
}  # fmt: skip
PLUGIN_FOLDERS = ("edgekit.compress.passes", "edgekit.export.targets", "edgekit.runtime.backends", "edgekit.guards")
EMPTY_WORDS = {"utils", "util", "common", "base", "manager", "helper", "helpers", "handler", "misc"}
MAY_CATCH_ALL = 3
"""The agent's and the service's outer loops, and the command line's last line of defence."""


def relative(path):
    return path.relative_to(ROOT).as_posix()


def functions():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{relative(path)}:{node.name}", node


def modules_below(package):
    found = importlib.import_module(package)
    below = pkgutil.walk_packages(found.__path__, f"{package}.") if hasattr(found, "__path__") else ()
    return [package, *(m.name for m in below)]


@pytest.mark.parametrize("package", LIGHT)
def test_what_runs_on_the_device_imports_nothing_of_the_workstation(package):
    names = [name for name in modules_below(package) if not name.endswith("__main__")]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    assert WORKSTATION & set(done.stdout.split()) == set()


def test_importing_edgekit_brings_no_third_party_package():
    code = "import sys; before = set(sys.modules); import edgekit; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in done.stdout.split()} <= {"edgekit", *sys.stdlib_module_names}


def test_every_room_has_its_layer():
    contracts = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layered = {name.strip() for line in contracts[0]["layers"] for name in line.split("|")}
    rooms = {f"edgekit.{m.name}" for m in pkgutil.iter_modules(edgekit.__path__) if not m.name.startswith("_")}
    assert layered == rooms


@pytest.mark.parametrize("folder", PLUGIN_FOLDERS)
def test_the_last_line_of_a_plugin_is_its_plugin(folder):
    for info in pkgutil.iter_modules(importlib.import_module(folder).__path__):
        path = ROOT.parent / folder.replace(".", "/") / f"{info.name}.py"
        if info.name.startswith("_") or not path.exists():
            continue
        last = ast.parse(path.read_text()).body[-1]
        assert isinstance(last, ast.AnnAssign), f"{path.name} ends with its PLUGIN, with its type"
        assert last.target.id == "PLUGIN", path.name


def test_the_same_format_stands_on_both_sides():
    targets, backends, guards = (
        {m.name for m in pkgutil.iter_modules(importlib.import_module(folder).__path__) if not m.name.startswith("_")}
        for folder in PLUGIN_FOLDERS[1:]
    )
    assert targets <= backends
    assert backends - guards == {"null"}, "what native code parses is looked at before; null is JSON"
    assert guards <= backends


def test_modules_are_nouns_of_the_domain():
    words = {word for path in FILES for word in path.stem.strip("_").split("_")}
    assert words & EMPTY_WORDS == set()


def test_every_module_opens_with_what_it_knows():
    opening = {relative(path): ast.get_docstring(ast.parse(path.read_text())) or "" for path in FILES}
    assert [name for name, text in opening.items() if len(text) < 20] == []


def test_functions_are_short():
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    assert {name: n for name, n in lengths.items() if n > 60} == {}
    ordered = sorted(lengths.values())
    assert ordered[int(0.9 * len(ordered))] <= 30
    assert statistics.median(ordered) <= 9


def test_functions_take_at_most_four_positional_parameters():
    def positional(node):
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        return len(names) - (names[:1] in (["self"], ["cls"]))

    many = {name: positional(node) for name, node in functions() if positional(node) > 4}
    # resolve_command and its like are click's; a pass through of a callback is counted by whoever calls it
    assert many == {}


def test_files_are_short():
    def code_lines(path):
        empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
        with path.open("rb") as file:
            return len({t.start[0] for t in tokenize.tokenize(file.readline) if t.type not in empty})

    lengths = {relative(path): code_lines(path) for path in FILES}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
    assert statistics.median(lengths.values()) <= 120


def test_everything_is_caught_only_where_nothing_may_die():
    places = [
        relative(path)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "Exception"))
    ]
    assert len(places) <= MAY_CATCH_ALL, places


def test_who_expects_what_cannot_be_decoded_expects_bytes_that_are_no_text_too():
    """msgspec lets UnicodeDecodeError through, a ValueError, where a name or a text is no UTF-8."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and node.type is not None:
                caught = ast.unparse(node.type)
                if "msgspec.DecodeError" in caught:
                    assert any(name in caught for name in ("Unicode", "ValueError")), f"{relative(path)}:{node.lineno}"


def test_only_the_command_line_prints_or_exits():
    for path in FILES:
        if relative(path).startswith("cli/"):
            continue
        calls = {n.func.id for n in ast.walk(ast.parse(path.read_text()))
                 if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}  # fmt: skip
        assert calls & {"print", "exit", "quit", "input"} == set(), relative(path)


def test_nothing_is_unpickled():
    for path in FILES:
        text = path.read_text()
        assert "pickle.load" not in text, relative(path)
        assert "allow_pickle=True" not in text, relative(path)
        assert "weights_only=False" not in text, relative(path)


def test_servers_bind_the_loopback_only():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 80:
                assert "0.0.0.0" not in node.value, relative(path)  # noqa: S104  # the very thing we refuse


def test_every_silenced_rule_says_why():
    for path in FILES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for mark in ("# noqa", "# type: ignore"):
                if mark in line and "test_every" not in line:
                    reason = line.partition(mark)[2].partition("  # ")[2]
                    assert len(reason) > 5, f"{relative(path)}:{number}"

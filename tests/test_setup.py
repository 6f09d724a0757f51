"""The two set-up commands: what they install and in which order, what a killed run leaves, what they refuse."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

STUB = """#!/bin/sh
case "$*" in
  *version_info*) exit {recent} ;;
  --version) echo Python 3.9.1 ;;
  "-m venv "*) mkdir -p "$3/bin" "$3/lib/python3.11/site-packages"; cp "$0" "$3/bin/python" ;;
  "-m pip install"*) echo "$*" >> "{log}"; exit {installs} ;;
esac
exit 0
"""


@pytest.fixture
def clone(tmp_path):
    """A folder with what `make` needs of the repository, and an interpreter that only takes notes."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "checks", tmp_path / "checks")
    return tmp_path


def interpreter(clone, *, recent=0, installs=0):
    path = clone / "python-stub"
    path.write_text(STUB.format(recent=recent, installs=installs, log=clone / "log"))
    path.chmod(0o755)
    return path


def make(clone, *arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = ["make", "-C", str(clone), *arguments]
    return subprocess.run(done, capture_output=True, text=True, check=False, env=environment, timeout=60)


def ready(clone, **settings):
    return make(clone, ".venv/.edgekit-ready", f"PYTHON={interpreter(clone, **settings)}")


def installed(clone):
    return [line.partition("install ")[2] for line in (clone / "log").read_text().splitlines()]


def test_torch_comes_first_and_alone_then_the_pins_then_the_models(clone):
    assert ready(clone).returncode == 0
    torch, pinned, models = installed(clone)
    assert torch.endswith("torch==2.13.0")
    assert "-c constraints.txt -e .[dev]" in pinned
    assert "--no-deps" in models


def test_the_second_run_installs_nothing(clone):
    ready(clone)
    count = len(installed(clone))
    assert "up to date" in ready(clone).stdout
    assert len(installed(clone)) == count


def test_new_pins_are_installed(clone):
    ready(clone)
    stamp = clone / ".venv/.edgekit-ready"
    os.utime(clone / "constraints.txt", (stamp.stat().st_mtime + 5,) * 2)
    ready(clone)
    assert len(installed(clone)) == 6


def test_a_run_that_failed_is_taken_up_again(clone):
    assert ready(clone, installs=1).returncode != 0
    assert not (clone / ".venv/.edgekit-ready").exists()
    shutil.copy(interpreter(clone), clone / ".venv/bin/python")  # the network is back
    half = clone / ".venv/lib/python3.11/site-packages"
    for name in ("whole", "half"):
        (half / f"{name}-1.dist-info").mkdir(parents=True)
    (half / "whole-1.dist-info/RECORD").write_text("")
    assert ready(clone).returncode == 0
    assert [path.name for path in half.glob("*.dist-info")] == ["whole-1.dist-info"], "what pip was killed in goes"


def test_packages_of_an_environment_that_was_there_are_left_alone(clone):
    theirs = clone / ".venv/lib/python3.11/site-packages/conda_made-1.dist-info"
    theirs.mkdir(parents=True)
    assert ready(clone).returncode == 0
    assert theirs.exists()


def test_an_index_of_cpu_wheels_is_used_for_torch_only(clone):
    done = make(clone, ".venv/.edgekit-ready", f"PYTHON={interpreter(clone)}", "TORCH_INDEX=file:///wheels")
    assert done.returncode == 0
    assert ["--index-url file:///wheels" in line for line in installed(clone)] == [True, False, False]


def test_an_old_python_is_refused_with_the_way_out(clone):
    done = ready(clone, recent=1)
    assert done.returncode != 0
    assert "needs Python 3.11 or later" in done.stderr
    assert "make PYTHON=" in done.stderr


def test_an_environment_of_an_old_python_is_refused_and_kept(clone):
    (clone / ".venv/bin").mkdir(parents=True)
    shutil.copy(interpreter(clone, recent=1), clone / ".venv/bin/python")
    done = ready(clone)
    assert done.returncode != 0
    assert ".venv holds Python 3.9.1" in done.stderr
    assert (clone / ".venv/bin/python").exists()


def test_an_environment_that_exists_is_used(clone):
    other = clone / "other"
    (other / "bin").mkdir(parents=True)
    shutil.copy(interpreter(clone), other / "bin/python")
    assert make(clone, "other/.edgekit-ready", "VENV=other", "PYTHON=/nowhere").returncode == 0
    assert not (clone / ".venv").exists()


def test_without_a_right_to_install_a_program_the_tests_go_on(tmp_path):
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    for tool in ("sh", "timeout"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    script = (ROOT / "checks/programs.sh").read_text().replace('PATH="$PATH:/usr/sbin:/usr/local/sbin"', "")
    done = subprocess.run(
        [tmp_path / "sh", "-c", script, "sh", "mosquitto=mosquitto", "timeout=timeout"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(tmp_path)},
    )
    assert done.returncode == 0
    assert "missing: mosquitto; there is no apt-get" in done.stdout
    assert "will be skipped" in done.stdout


def test_the_first_interpreter_that_works_is_taken(clone):
    folder = clone / "shims"
    folder.mkdir()
    for name, recent in (("python3.11", 127), ("python3.12", 0)):
        shutil.copy(interpreter(clone, recent=recent), folder / name)
    path = f"PATH={folder}:{os.environ['PATH']}"
    done = subprocess.run(
        ["env", path, "make", "-C", clone, ".venv/.edgekit-ready"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (clone / ".venv/bin/python").read_text() == (folder / "python3.12").read_text()

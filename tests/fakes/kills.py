"""Kills a piece of work with SIGKILL before its n-th call that changes the disk, in a forked child."""

from __future__ import annotations

import os
import pathlib
import signal

CALLS = ["fsync", "rename", "replace", "unlink", "link", "mkdir", "rmdir", "open"]


def _changes_the_disk(name, args):
    if name != "open":
        return True
    return len(args) > 1 and isinstance(args[1], int) and bool(args[1] & (os.O_WRONLY | os.O_RDWR))


def run_and_kill(work, at):
    """Fork, run ``work`` and kill it before the call number ``at``; return whether it was killed.

    Every path that Python's ``os`` and ``pathlib`` take to the disk is counted.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _count_down(at)
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the work failed before it could be killed"
    return False


def _count_down(at):
    left = [at]

    def counted(name, call):
        def run(*args, **kwargs):
            if _changes_the_disk(name, args):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return run

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))
    writer = pathlib.Path.open

    def opened(self, mode="r", *args, **kwargs):
        if set(mode) & set("wax+"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return writer(self, mode, *args, **kwargs)

    pathlib.Path.open = opened

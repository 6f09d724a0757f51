"""Real small disks: ext4 in a file, mounted for one test. Skips where nobody may mount."""

import contextlib
import shutil
import subprocess

import pytest


class Disk:
    """A mounted file system at ``path``."""

    def __init__(self, path):
        self.path = path

    def set_writable(self, is_writable):
        """Let the system write to it, or no more."""
        _do("mount", "-o", f"remount,{'rw' if is_writable else 'ro'}", self.path)

    @property
    def free(self):
        """Bytes that are free."""
        return shutil.disk_usage(self.path).free

    def fill(self, leave):
        """Fill it up with a file but for so many bytes."""
        with (self.path / "ballast").open("wb") as file:
            file.write(bytes(max(0, self.free - leave)))

    def empty(self):
        """Take that file away again."""
        (self.path / "ballast").unlink()


@contextlib.contextmanager
def disk(folder, mib):
    """Mount a new disk of so many MiB below ``folder``."""
    image, path = folder / "disk.img", folder / "disk"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(mib << 20)
    try:
        _do("mkfs.ext4", "-q", "-m", "0", "-N", "256", image)
        _do("mount", "-o", "loop", image, path)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    try:
        yield Disk(path)
    finally:
        _do("umount", "-l", path)


def _do(*command):
    subprocess.run(
        [shutil.which(command[0], path="/usr/sbin:/sbin:/usr/bin:/bin") or command[0], *map(str, command[1:])],
        check=True,
        capture_output=True,
        timeout=30,
    )

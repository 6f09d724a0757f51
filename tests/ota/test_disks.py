"""A state folder in memory is told from one on a disk."""

from pathlib import Path

import pytest

from edgekit.errors import ResourceError
from edgekit.ota.device.disks import file_system, require_lasting

MOUNTS = r"""21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 21 0:5 / /run rw,nosuid shared:2 - tmpfs tmpfs rw,size=1g
31 30 8:2 / /run/disk rw - xfs /dev/sdb rw
32 21 0:6 / /var/lib/with\040space rw - ramfs none rw
33 21 0:7 / /srv rw - tmpfs tmpfs rw
34 21 8:3 / /srv rw master:3 propagate_from:1 - btrfs /dev/sdc rw
garbage
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/var/lib/edgekit", "ext4"),
        ("/run/state", "tmpfs"),
        ("/run", "tmpfs"),
        ("/running/state", "ext4"),
        ("/run/disk/state", "xfs"),
        ("/var/lib/with space/state", "ramfs"),
        ("/srv/state", "btrfs"),  # the later mount covers the earlier
    ],
)
def test_the_last_mount_of_the_longest_path_counts(tmp_path, folder, kind):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert file_system(Path(folder), mounts) == kind
    if kind in ("tmpfs", "ramfs"):
        with pytest.raises(ResourceError, match=f"lies on {kind}") as caught:
            require_lasting(Path(folder), mounts)
        assert "--allow-volatile" in caught.value.hint
    else:
        require_lasting(Path(folder), mounts)


def test_overlay_is_what_its_upper_layer_is(tmp_path):
    """A root kept read-only by an overlay: what is written there lies in memory, or on another disk."""
    upper, mounts = tmp_path / "upper", tmp_path / "mountinfo"
    upper.mkdir()
    root = f"22 1 0:20 / / rw,relatime - overlay overlayroot rw,lowerdir=/lower,upperdir={upper},workdir=/work\n"
    mounts.write_text(root + f"25 22 0:21 / {tmp_path} rw - tmpfs tmpfs rw\n")
    with pytest.raises(ResourceError, match="lies on tmpfs"):
        require_lasting(Path("/var/lib/edgekit"), mounts, containers=())
    mounts.write_text(root + f"25 22 8:2 / {tmp_path} rw - ext4 /dev/sda2 rw\n")
    require_lasting(Path("/var/lib/edgekit"), mounts, containers=())
    upper.rmdir()
    with pytest.raises(ResourceError, match=r"layered file system \(overlay\).*cannot see"):
        require_lasting(Path("/var/lib/edgekit"), mounts, containers=())
    require_lasting(Path("/var/lib/edgekit"), mounts, containers=(str(mounts),))  # a container's, as anybody expects


def test_link_into_memory_is_followed(tmp_path):
    (tmp_path / "state").symlink_to("/dev/shm/edgekit")  # noqa: S108  # nothing is written there
    if file_system(Path("/dev/shm")) != "tmpfs":  # noqa: S108  # the same
        pytest.skip("there is no /dev/shm here")
    with pytest.raises(ResourceError, match="lies on tmpfs"):
        require_lasting(tmp_path / "state")


def test_system_that_tells_nothing_refuses_nothing(tmp_path):
    assert file_system(tmp_path, tmp_path / "none") == ""
    require_lasting(tmp_path, tmp_path / "none")

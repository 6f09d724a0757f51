"""Bundles as OCI layouts: there and back, the same bytes, nothing foreign replaced, nothing wrong believed."""

import hashlib
import json

import pytest
from click.testing import CliRunner
from fakes import bundles as made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit import bundle, oci
from edgekit.cli import cli
from edgekit.errors import BundleError, UsageError


@pytest.fixture
def sealed(tmp_path):
    made.mlp_bundle(tmp_path / "b")
    return bundle.read(tmp_path / "b")


def test_there_and_back_is_the_same_bundle(sealed, tmp_path):
    written = CliRunner().invoke(cli, ["oci", "write", str(tmp_path / "b"), "-o", str(tmp_path / "l"), "--json"])
    assert written.exit_code == 0, written.output
    image = json.loads(written.stdout)["image"]
    back = CliRunner().invoke(cli, ["oci", "read", str(tmp_path / "l"), "-o", str(tmp_path / "c"), "--json"])
    assert json.loads(back.stdout)["digest"] == sealed.digest
    assert bundle.read(tmp_path / "c").digest == sealed.digest
    assert oci.write(sealed, tmp_path / "again") == image, "the same bundle gives the same image"


def test_it_is_a_layout_as_the_specification_has_it(sealed, tmp_path):
    digest = oci.write(sealed, tmp_path / "l")
    assert json.loads((tmp_path / "l/oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((tmp_path / "l/index.json").read_bytes())
    (entry,) = index["manifests"]
    assert (index["schemaVersion"], entry["digest"]) == (2, digest)
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == sealed.manifest.version
    image = json.loads((tmp_path / "l/blobs/sha256" / digest.removeprefix("sha256:")).read_bytes())
    assert (image["schemaVersion"], image["mediaType"]) == (2, "application/vnd.oci.image.manifest.v1+json")
    assert image["artifactType"] == "application/vnd.edgekit.bundle.v1"
    titles = [layer["annotations"]["org.opencontainers.image.title"] for layer in image["layers"]]
    assert titles == [file.path for file in sealed.manifest.files]
    for described in (image["config"], *image["layers"], entry):
        blob = (tmp_path / "l/blobs/sha256" / described["digest"].removeprefix("sha256:")).read_bytes()
        assert len(blob) == described["size"]
        assert hashlib.sha256(blob).hexdigest() == described["digest"].removeprefix("sha256:")


def test_what_is_there_and_no_layout_or_bundle_is_not_replaced(sealed, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="is no OCI layout"):
        oci.write(sealed, tmp_path / "mine")
    oci.write(sealed, tmp_path / "l")
    with pytest.raises(UsageError, match="is no bundle"):
        oci.read(tmp_path / "l", tmp_path / "mine")
    with pytest.raises(UsageError, match="is no OCI layout"):
        oci.read(tmp_path / "mine", tmp_path / "c")
    assert (tmp_path / "mine/precious.txt").read_text() == "mine"
    oci.write(sealed, tmp_path / "l")  # a layout is replaced


def test_a_changed_or_missing_blob_is_refused_and_nothing_is_written(sealed, tmp_path):
    oci.write(sealed, tmp_path / "l")
    blob = tmp_path / "l/blobs/sha256" / sealed.manifest.files[0].sha256
    content = blob.read_bytes()
    blob.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(BundleError, match="is not what its digest says"):
        oci.read(tmp_path / "l", tmp_path / "c")
    blob.unlink()
    with pytest.raises(BundleError, match="is missing"):
        oci.read(tmp_path / "l", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def rewritten(folder, change):
    """Change the image manifest and all that names it."""
    index = json.loads((folder / "index.json").read_bytes())
    path = folder / "blobs/sha256" / index["manifests"][0]["digest"].removeprefix("sha256:")
    image = json.loads(path.read_bytes())
    change(image, index)
    data = json.dumps(image).encode()
    digest = hashlib.sha256(data).hexdigest()
    (folder / "blobs/sha256" / digest).write_bytes(data)
    for entry in index["manifests"]:
        entry |= {"digest": f"sha256:{digest}", "size": len(data)}
    (folder / "index.json").write_bytes(json.dumps(index).encode())


@pytest.mark.attack("zip-slip")
def test_other_images_and_digests_that_lead_elsewhere_are_refused(sealed, tmp_path):
    oci.write(sealed, tmp_path / "l")
    rewritten(tmp_path / "l", lambda image, _: image["config"].update(mediaType="application/vnd.docker.x"))
    with pytest.raises(BundleError, match="is no bundle of edgekit"):
        oci.read(tmp_path / "l", tmp_path / "c")
    oci.write(sealed, tmp_path / "l")
    rewritten(tmp_path / "l", lambda image, _: image["config"].update(digest="sha256:../../../../etc/passwd"))
    with pytest.raises(BundleError, match=r"is no bundle|no SHA-256 digest"):
        oci.read(tmp_path / "l", tmp_path / "c")


def test_a_tag_chooses_among_several(sealed, tmp_path):
    oci.write(sealed, tmp_path / "l")

    def twice(_, index):
        index["manifests"].append({**index["manifests"][0], "annotations": {oci.TAG: "other"}})

    rewritten(tmp_path / "l", twice)
    with pytest.raises(UsageError, match="holds 2 images"):
        oci.read(tmp_path / "l", tmp_path / "c")
    with pytest.raises(UsageError, match="no image tagged 'third'"):
        oci.read(tmp_path / "l", tmp_path / "c", "third")
    assert oci.read(tmp_path / "l", tmp_path / "c", "other").digest == sealed.digest


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(garbage=st.binary(max_size=200))
def test_garbage_is_refused_with_an_error_of_ours(sealed, tmp_path, garbage):
    oci.write(sealed, tmp_path / "l")
    (tmp_path / "l/index.json").write_bytes(garbage)
    with pytest.raises((BundleError, UsageError)):
        oci.read(tmp_path / "l", tmp_path / "c")

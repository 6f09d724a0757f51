"""Data as people have it: loaders, folders of pictures, text and tables; which splits may not share a sample."""

import json
import struct

import numpy as np
import pytest
from PIL import Image

from edgekit import datasets, token_numbers
from edgekit.errors import UnknownName, UsageError
from edgekit.manifest import ImagePreprocess
from edgekit.model import Data, Split
from edgekit.pictures import picture_to_tensor

torch = pytest.importorskip("torch")

STATED = """
kind = "images"
resize = 10
crop = 8
mode = "RGB"
interpolation = "bilinear"
mean = [120.0, 110.0, 100.0]
std = [60.0, 50.0, 40.0]
"""


def loader(tmp_path, text):
    head = "import numpy as np, torch\nx = np.arange(24, dtype=np.float32).reshape(12, 2)\ny = np.arange(12) % 3\n"
    (tmp_path / "mine.py").write_text(f"{head}def data():\n    {text}\n")
    return f"{tmp_path / 'mine.py'}:data"


def painted(folder, counts, seed=0):
    """Write pictures of noise, 12 x 10, so many a class."""
    random = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 255, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03}.png")
    return folder


def stated(folder, text=STATED, **counts):
    lines = [f"{name} = {count}" for name, count in counts.items()]
    (folder / "data.toml").write_text("\n".join([text, *(["[counts]"] if lines else []), *lines]))
    return str(folder / "data.toml")


def sizes(data):
    return {name: len(split) for name, split in data.splits().items()}


# --- loaders


def test_a_dict_of_arrays_and_pairs_becomes_splits(tmp_path):
    data = datasets.load_data(
        loader(tmp_path, "return {'calibration': x[:4], 'test': ({'a': x[4:6], 'b': x[6:8]}, y[:2])}")
    )
    assert data.calibration.inputs["input"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert {name: array[0].tolist() for name, array in data.test.inputs.items()} == {"a": [8, 9], "b": [12, 13]}
    assert data.test.labels.tolist() == [0, 1]


def test_a_data_loader_of_pytorch_becomes_a_split(tmp_path):
    text = (
        "pairs = torch.utils.data.TensorDataset(torch.as_tensor(x), torch.as_tensor(y))\n"
        "    return {'calibration': torch.utils.data.DataLoader(pairs, batch_size=5)}"
    )
    data = datasets.load_data(loader(tmp_path, text))
    assert data.calibration.inputs["input"].tolist() == np.arange(24).reshape(12, 2).tolist()
    assert data.calibration.labels.tolist() == [0, 1, 2] * 4


def test_batches_of_several_inputs_keep_their_names_and_order(tmp_path):
    by_name = datasets.load_data(loader(tmp_path, "return {'calibration': [({'a': x[:2], 'b': y[:2]}, y[:2])] * 3}"))
    assert {name: array.shape for name, array in by_name.calibration.inputs.items()} == {"a": (6, 2), "b": (6,)}
    in_order = datasets.load_data(loader(tmp_path, "return {'calibration': iter([((x[:2], y[:2]), y[:2])])}"))
    assert list(in_order.calibration.inputs) == ["input_0", "input_1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("return 3", "returned int, not edgekit.model.Data or a dict of splits"),
        ("return {}", "no calibration split"),
        ("return {'test': x}", "no calibration split"),
        ("return {'calibration': []}", "calibration is empty"),
        ("return {'calibration': 7}", "a int is no split"),
        ("return {'calibration': [(x, y, y)]}", "a batch of 3 parts"),
        ("return {'calibration': [x[:3], {'a': x}]}", "batches have different inputs"),
        ("return {'calibration': [x[:3], x[:3, :1]]}", "batches do not fit together"),
        ("return {'calibration': ['words']}", "not an array of numbers"),
        ("return {'calibration': (x, y[:3])}", "arrays of one length"),
    ],
)
def test_what_is_no_split_is_refused(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        datasets.load_data(loader(tmp_path, text))


def test_a_misspelled_split_offers_the_nearest(tmp_path):
    with pytest.raises(UnknownName) as caught:
        datasets.load_data(loader(tmp_path, "return {'calibration': x, 'valid': x}"))
    assert "validation" in caught.value.hint


@pytest.mark.parametrize(
    ("labels", "scores", "axis"),
    [
        ((4,), (-1, 10), 1),
        ((4,), (-1, 1), 1),
        ((4,), (-1, 6, 10), None),
        ((4,), (-1,), None),
        ((4, 8, 9), (-1, 5, 8, 9), 1),
        ((4, 8, 9), (-1, 8, 9, 5), 3),
        ((4, 8, 9), (-1, 21, -1, -1), 1),
        ((4, 8, 9), (-1, 1, 8, 9), None),
        ((4, 6), (-1, 6, 5), 2),
        ((4, 6), (-1, 5, 6), 1),
        ((4, 6), (-1, 6, 6), 2),
        ((4, 6), (-1, 7, 8), None),
        ((4, 6), (-1, 6), None),
    ],
)
def test_the_classes_lie_where_the_labels_leave_an_axis(labels, scores, axis):
    assert datasets.class_axis(labels, scores) == axis


# --- samples in two splits


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            "'calibration': x[:4], 'test': x[3:6]",
            "sample 0 of the test split is in the calibration split too, as sample 3",
        ),
        ("'calibration': x[:4], 'train': x[4:], 'test': x[11:]", "sample 0 of the test split is in the train split"),
        ("'calibration': x[:4], 'validation': x[4:6], 'test': x[5:7]", "test split is in the validation split"),
        (
            "'calibration': x[:4], 'validation': x[2:9]",
            "sample 0 of the validation split is in the calibration split too, as sample 2",
        ),
        ("'calibration': x[:2], 'train': x[:4], 'validation': x[3:9]", "validation split is in the train split"),
    ],
)
def test_a_sample_that_judges_may_not_steer(tmp_path, splits, message):
    with pytest.raises(UsageError, match=message) as caught:
        datasets.load_data(loader(tmp_path, f"return {{{splits}}}"))
    assert "without_overlap" in caught.value.hint


def test_calibration_may_be_part_of_train(tmp_path):
    assert sizes(datasets.load_data(loader(tmp_path, "return {'calibration': x[:4], 'train': x}"))) == {
        "calibration": 4,
        "train": 12,
    }


def test_shared_samples_can_be_left_out_of_what_steers():
    x = np.arange(10.0)[:, None]
    data = Data(Split({"x": x[:5]}), train=Split({"x": x}), validation=Split({"x": x[4:8]}), test=Split({"x": x[7:]}))
    apart = datasets.without_overlap(data)
    assert {name: split.inputs["x"][:, 0].tolist() for name, split in apart.splits().items()} == {
        "calibration": [0, 1, 2, 3],
        "train": [0, 1, 2, 3],
        "validation": [4, 5, 6],
        "test": [7, 8, 9],
    }
    datasets.refuse_overlap(apart)


def test_the_digest_names_every_array_label_and_group():
    x, y = np.arange(6.0)[:, None], np.arange(6)
    whole = Data(Split({"x": x}, y, np.array(list("aabbcc"))), test=Split({"x": x}))
    others = [
        Data(Split({"x": x + 1}, y, np.array(list("aabbcc"))), test=whole.test),
        Data(Split({"x": x}, y[::-1], np.array(list("aabbcc"))), test=whole.test),
        Data(Split({"x": x}, y, np.array(list("aabbcd"))), test=whole.test),
        Data(Split({"x": x}, y, np.array(list("aabbcc"))), validation=whole.test),
        Data(Split({"x": x.astype(np.float32)}, y, np.array(list("aabbcc"))), test=whole.test),
    ]
    assert len({data.digest() for data in (whole, *others)}) == 6
    assert whole.digest() == Data(Split({"x": x.copy()}, y, np.array(list("aabbcc"))), test=whole.test).digest()


# --- pictures


def test_a_folder_of_classes_is_drawn_evenly_by_counts_and_seed(tmp_path):
    folder = painted(tmp_path / "pets", {"dog": 9, "cat": 9, "ant": 3})
    data = datasets.load_data(stated(folder, calibration=6, validation=5, test=6))
    assert sizes(data) == {"calibration": 6, "validation": 5, "test": 6}
    assert data.labels == ("ant", "cat", "dog")
    assert np.bincount(data.test.labels).tolist() == [2, 2, 2]
    assert datasets.load_data(str(folder)).digest() == data.digest(), "the folder finds its data.toml"
    more = datasets.load_data(stated(folder, calibration=9, validation=5, test=6))
    np.testing.assert_array_equal(more.test.inputs["image"], data.test.inputs["image"], "what judges stays the same")
    other = datasets.load_data(stated(folder, STATED + "seed = 3\n", calibration=6, validation=5, test=6))
    assert other.digest() != data.digest()


def test_a_picture_is_prepared_as_on_the_device(tmp_path):
    folder = painted(tmp_path / "pets", {"cat": 3})
    data = datasets.load_data(stated(folder, calibration=3))
    how = ImagePreprocess(
        input="image", resize=10, crop=8, interpolation="bilinear", mean=(120.0, 110.0, 100.0), std=(60.0, 50.0, 40.0)
    )
    assert data.preprocess == how
    wanted = {picture_to_tensor(path.read_bytes(), how).tobytes() for path in folder.glob("cat/*.png")}
    assert {row.tobytes() for row in data.calibration.inputs["image"]} == wanted


def test_folders_of_splits_are_taken_whole_and_the_rest_is_drawn_from_train(tmp_path):
    folder = tmp_path / "pets"
    painted(folder / "train", {"cat": 6, "dog": 6}, seed=1)
    painted(folder / "test", {"cat": 2, "dog": 1}, seed=2)
    data = datasets.load_data(stated(folder, calibration=4, validation=2))
    assert sizes(data) == {"calibration": 4, "train": 6, "validation": 2, "test": 3}
    assert sizes(datasets.load_data(stated(folder, calibration=4, train=5))) == {
        "calibration": 4,
        "train": 5,
        "test": 3,
    }


def test_a_class_that_is_called_train_is_no_split(tmp_path):
    data = datasets.load_data(stated(painted(tmp_path / "traffic", {"train": 4, "bus": 4}), calibration=4))
    assert data.labels == ("bus", "train")


def test_pictures_without_stated_preprocessing_are_not_guessed(tmp_path):
    folder = painted(tmp_path / "pets", {"cat": 3})
    with pytest.raises(UsageError, match=r"has no data\.toml") as caught:
        datasets.load_data(str(folder))
    (folder / "data.toml").write_text(
        caught.value.hint.partition(":\n\n")[2].replace("128", "3").split("validation")[0]
    )
    assert datasets.load_data(str(folder)).calibration.inputs["image"].shape == (3, 3, 224, 224)
    (folder / "data.toml").rename(tmp_path / "pets.toml")
    assert sizes(datasets.load_data(str(folder))) == {"calibration": 3}, "it may lie beside the folder"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("crop = 8\n", ""), "missing required field `crop`"),
        (("mean", "means"), r"field `means`|missing required field `mean`"),
        (("crop = 8", "crop = 80"), "crops 80 from a shorter side of 10"),
        (("120.0, 110.0", "1.0"), "states 2 numbers as mean, RGB needs 3"),
        (("60.0", "0.0"), "states std"),
        (("images", "pictures"), "'pictures'"),
        (("kind", "kind ="), "does not state data"),
    ],
)
def test_a_data_toml_that_states_something_odd_is_refused(tmp_path, change, message):
    folder = painted(tmp_path / "pets", {"cat": 3})
    with pytest.raises(UsageError, match=message):
        datasets.load_data(stated(folder, STATED.replace(*change), calibration=2))


@pytest.mark.parametrize(
    ("counts", "message"),
    [({}, "no calibration split"), ({"calibration": 9}, "wants 9 pictures for calibration, .* has 3 left"),
     ({"calibration": 2, "test": 2}, "has 1 left")],
)  # fmt: skip
def test_counts_that_the_folder_has_not_are_refused(tmp_path, counts, message):
    with pytest.raises(UsageError, match=message):
        datasets.load_data(stated(painted(tmp_path / "pets", {"cat": 3}), **counts))


def test_the_same_picture_in_two_splits_is_refused_by_file_or_dropped(tmp_path):
    folder = tmp_path / "pets"
    painted(folder / "train", {"cat": 4, "dog": 4}, seed=1)
    painted(folder / "calibration", {"cat": 2}, seed=3)
    painted(folder / "test", {"cat": 2, "dog": 1}, seed=2)
    (folder / "test/cat/copy.png").write_bytes((folder / "train/dog/002.png").read_bytes())
    with pytest.raises(
        UsageError, match=r"test/cat/copy\.png of the test split is in the train split too, as train/dog/002"
    ):
        datasets.load_data(stated(folder))
    data = datasets.load_data(stated(folder, STATED + 'overlap = "drop"\n'))
    assert sizes(data) == {"calibration": 2, "train": 7, "test": 4}


def test_a_damaged_picture_is_named(tmp_path):
    folder = painted(tmp_path / "pets", {"cat": 3})
    (folder / "cat/001.png").write_bytes(b"not a picture")
    with pytest.raises(UsageError, match=r"cat/001\.png: these 13 bytes are no picture"):
        datasets.load_data(stated(folder, calibration=3))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no pictures in folders of classes"):
        datasets.load_data(stated(tmp_path / "empty", calibration=3))


def test_more_pictures_than_memory_are_refused_before_they_are_read(tmp_path):
    text = STATED.replace("= 10", "= 8192").replace("= 8\n", "= 8192\n")
    with pytest.raises(UsageError, match=r"take 9\.0 GiB as arrays"):
        datasets.load_data(stated(painted(tmp_path / "pets", {"cat": 12}), text, calibration=12))


DETECTOR = (
    STATED.replace("resize = 10", 'fit = "pad"\nfill = 9\nresize = 8')
    + """
outputs = ["boxes", "scores"]

[detection]
boxes = "boxes"
scores = "scores"
labels = ["cat", "dog"]
"""
)


def test_a_detectors_pictures_need_no_folders_of_classes(tmp_path):
    folder = painted(tmp_path / "street", {"near": 3})
    for path in (folder / "near").iterdir():
        path.rename(folder / path.name)
    (folder / "near").rmdir()
    data = datasets.load_data(stated(folder, DETECTOR, calibration=2))
    assert data.calibration.inputs["image"].shape == (2, 3, 8, 8)
    assert (data.calibration.labels, data.labels, data.outputs) == (None, (), ("boxes", "scores"))
    assert (data.preprocess.fit, data.preprocess.fill, data.detection.labels) == ("pad", 9, ("cat", "dog"))
    with pytest.raises(UsageError, match="folders of classes"):
        datasets.load_data(stated(folder, STATED, calibration=2))


def test_a_whole_picture_has_one_size(tmp_path):
    folder = painted(tmp_path / "pets", {"cat": 2})
    for more, message in (
        ('fit = "pad"\nfill = 0\n', 'states fit = "pad" with resize = 10 and crop = 8'),
        ('fit = "pad"\n', 'states fit = "pad" without fill'),
        ('fit = "stretch"\nfill = 3\n', 'states fit = "stretch" with fill'),
    ):
        with pytest.raises(UsageError, match=message):
            datasets.load_data(stated(folder, STATED + more, calibration=1))


# --- text


def words(folder):
    """Write a tokenizer of whole words."""
    tokenizers = pytest.importorskip("tokenizers")
    folder.mkdir()
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "<s>", "one", "two", "three", "four"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 2)]
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "pad_token": "<pad>"})
    )


def text_toml(tmp_path, more="", **files):
    if not (tmp_path / "words").exists():
        words(tmp_path / "words")
    named = "".join(f'files.{name} = "{file}"\n' for name, file in files.items())
    (tmp_path / "data.toml").write_text(f'kind = "text"\ntokenizer = "words"\ntokens = 3\n{more}{named}')
    return str(tmp_path / "data.toml")


def test_text_becomes_windows_of_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four one two three")
    (tmp_path / "b.txt").write_text("four four four END two two two END")
    data = datasets.load_data(text_toml(tmp_path, calibration="a.txt", test="b.txt"))
    assert data.calibration.inputs["input_ids"].tolist() == [[3, 4, 5], [6, 3, 4]]
    assert data.calibration.inputs["input_ids"].dtype == np.int64
    documents = datasets.load_data(text_toml(tmp_path, 'separator = "END"\nbos = true\n', calibration="b.txt"))
    assert documents.calibration.inputs["input_ids"].tolist() == [[2, 6, 6], [6, 2, 4]]
    few = datasets.load_data(text_toml(tmp_path, "counts.calibration = 1\n", calibration="a.txt"))
    assert sizes(few) == {"calibration": 1}


@pytest.mark.parametrize(
    ("files", "more", "message"),
    [
        ({"calibration": "a.txt", "test": "./a.txt"}, "", r"a\.txt is given for calibration and for test"),
        ({"test": "a.txt"}, "", "no file for calibration"),
        ({"calibration": "gone.txt"}, "", "there is no file"),
        ({"calibration": "short.txt"}, "", "gives 0 windows of 3 tokens"),
        ({"calibration": "a.txt"}, "counts.calibration = 5\n", "gives 2 windows of 3 tokens, 5 wanted"),
        ({"calibration": "a.txt", "validation": "c.txt"}, "", "sample 0 of the validation split is in the calibration"),
        ({"calibration": "bytes.txt"}, "", "no text in UTF-8"),
    ],
)
def test_text_that_cannot_be_used_is_refused(tmp_path, files, more, message):
    (tmp_path / "a.txt").write_text("one two three four one two three")
    (tmp_path / "c.txt").write_text("four one two")
    (tmp_path / "short.txt").write_text("one")
    (tmp_path / "bytes.txt").write_bytes(b"one \xff\xfe two")
    with pytest.raises(UsageError, match=message):
        datasets.load_data(text_toml(tmp_path, more, **files))


def test_overlapping_windows_can_be_dropped_from_what_steers(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four one two three")
    (tmp_path / "c.txt").write_text("four one two")
    source = text_toml(tmp_path, 'overlap = "drop"\n', calibration="a.txt", validation="c.txt")
    assert sizes(datasets.load_data(source)) == {"calibration": 1, "validation": 1}


def table_toml(tmp_path, lines, columns='text = "said"\nlabel = "mood"\n', **others):
    words(tmp_path / "words")
    for name, content in {"calibration": lines, **others}.items():
        (tmp_path / f"{name}.tsv").write_text("\n".join(["said\tmood\twho\treply", *content]))
    named = "".join(f'files.{name} = "{name}.tsv"\n' for name in ["calibration", *others])
    (tmp_path / "data.toml").write_text(f'kind = "tsv"\ntokenizer = "words"\ntokens = 5\n{columns}{named}')
    return str(tmp_path / "data.toml")


def test_a_table_becomes_padded_tokens_labels_and_groups(tmp_path):
    source = table_toml(
        tmp_path,
        ["one two\tsad\told\tthree", "one two three four one two\tglad\tyoung\t"],
        'text = "said"\nlabel = "mood"\ngroup = "who"\n',
        test=["four\tangry\told\t"],
    )
    data = datasets.load_data(source)
    assert data.calibration.inputs["input_ids"].tolist() == [[2, 3, 4, 0, 0], [2, 3, 4, 5, 6]]
    assert data.calibration.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert data.labels == ("angry", "glad", "sad")
    assert (data.calibration.labels.tolist(), data.test.labels.tolist()) == ([2, 1], [0])
    assert data.calibration.groups.tolist() == ["old", "young"]


def test_a_table_keeps_the_tokenizer_that_a_device_will_read_texts_with(tmp_path):
    source = table_toml(tmp_path, ["one\tsad\told\tthree"])
    text = datasets.load_data(source).text
    assert text.tokens == 5
    found = pytest.importorskip("tokenizers").Tokenizer.from_str(text.tokenizer.decode())
    assert found.encode("one two", "three").ids == [2, 3, 4, 2, 5]
    assert (found.padding, found.truncation["max_length"]) == (None, 5)


@pytest.mark.parametrize(("moods", "kind"), [(["0", "2"], "i"), (["0.5", "2"], "f"), (["-1", "1"], "f")])
def test_numbers_as_labels_are_classes_or_targets(tmp_path, moods, kind):
    lines = [f"{word}\t{mood}\told\t" for word, mood in zip(["one", "two"], moods, strict=True)]
    labels = datasets.load_data(table_toml(tmp_path, lines)).calibration.labels
    assert (labels.dtype.kind, labels.tolist()) == (kind, [float(mood) for mood in moods])


def test_two_columns_of_text_are_framed_as_a_pair(tmp_path):
    data = datasets.load_data(table_toml(tmp_path, ["one\t\t\ttwo", "two\t\t\tone"], 'text = ["said", "reply"]\n'))
    assert data.calibration.inputs["input_ids"].tolist() == [[2, 3, 2, 4, 0], [2, 4, 2, 3, 0]]
    assert data.calibration.labels is None


@pytest.mark.parametrize(
    ("lines", "columns", "message"),
    [
        (["one\tsad\told\t"], 'text = "speech"\n', "has no column 'speech'"),
        ([], 'text = "said"\n', "has 0 lines"),
        (["one\tsad"], 'text = "said"\n', "line 2 of .* has another number of columns"),
        (["one\tsad\told\t"], 'text = "said"\nseparator = "--"\n', "separates columns by '--'"),
        (["one\tsad\told\t"], 'text = "said"\ncounts.calibration = 2\n', "has 1 lines, 2 wanted"),
    ],
)
def test_a_table_of_another_kind_is_refused(tmp_path, lines, columns, message):
    with pytest.raises(UsageError, match=message):
        datasets.load_data(table_toml(tmp_path, lines, columns))


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    (tmp_path / "inner").mkdir()
    with pytest.raises(UsageError, match="has no tokenizer"):
        token_numbers.read(tmp_path / "inner")
    (tmp_path / "inner/tok9.bin").write_bytes(b"\0" * 30)
    with pytest.raises(UsageError, match=r"no llama2\.c tokenizer"):
        token_numbers.read(tmp_path / "inner")


def llama2c(path, tokens):
    """Write llama2.c's tokenizer file: three specials, 256 bytes, then tokens with their scores."""
    pieces = [
        (b"<unk>", 0.0),
        (b"\n<s>\n", 0.0),
        (b"\n</s>\n", 0.0),
        *((b"<0x%02X>" % b, 0.0) for b in range(256)),
        *tokens,
    ]
    path.write_bytes(struct.pack("<i", 9) + b"".join(struct.pack("<fi", s, len(t)) + t for t, s in pieces))


def test_llama2c_joins_the_pair_with_the_best_score_and_spells_what_it_does_not_know_in_bytes(tmp_path):
    pieces = [(b" ", -9.0), (b"a", -9.0), (b"b", -9.0), (b"ab", -2.0), (b" a", -1.0), (b"bb", -1.0), (b" ab", -3.0)]
    llama2c(tmp_path / "tok9.bin", pieces)
    space, a, b, ab, space_a, bb, space_ab = range(259, 266)
    (tmp_path / "model").mkdir()
    found = token_numbers.read(tmp_path / "model")
    assert found.encode("ab") == [space_ab], "a space is put in front; ' a' is joined first, then ' ab'"
    assert found.encode("abb") == [space_a, bb], "'bb' scores more than ' ab'"
    assert found.encode("b ab\u00e9") == [space, b, space_ab, 3 + 0xC3, 3 + 0xA9]
    assert found.encode("bab") == [space, b, ab]
    assert found.framed(["a", "b"], 3) == [1, space_a, space]
    assert a not in found.encode("ab abb")

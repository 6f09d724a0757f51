"""The demo's story: what it tells and proves, its page and plots, and that a false claim makes it fail."""

import base64
import io
import json
import re
import threading
import xml.etree.ElementTree as ET
from http.server import BaseHTTPRequestHandler, HTTPServer

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from fakes import digits
from fakes.exportable import tiny_model

pytest.importorskip("torch", reason="the demo needs the compress extra")
pytest.importorskip("matplotlib", reason="the demo needs the compress extra")

import torch

from edgekit import workload
from edgekit.cli import cli
from edgekit.cli._demo import cast, fleet, language, models, plots, report
from edgekit.cli._demo.story import Story
from edgekit.cli._terminal import Terminal
from edgekit.compress import compress
from edgekit.device_profiles.machine import Machine
from edgekit.errors import ExportError, HealthError


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # threads that spin beside other work make it 20 times slower


@pytest.fixture
def story():
    return Story(Terminal(as_json=False, quiet=True))


@pytest.fixture
def shop(tmp_path):
    return models.Workshop(tmp_path, digits.EXAMPLES)


def claims(story):
    return {check.claim: check.holds for check in story.checks}


def png(width, height=0):
    """Return a picture of one colour."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (width, height or width), "teal").save(file, "PNG")
    return file.getvalue()


def parsed(svg):
    """Parse as XML: a plot that is cut short or not escaped is none."""
    return ET.fromstring(svg)  # noqa: S314  # our own output


def texts(svg):
    return {"".join(node.itertext()).strip() for node in parsed(svg).iter() if node.tag.endswith("}text")}


# --- the story and its page


def test_what_is_told_is_printed_and_kept_in_order(capsys):
    story = Story(Terminal(as_json=False, quiet=False))
    story.chapter("One")
    story.tell("It begins.")
    story.table(["name", "size"], [("fp32", 18), ("int8", 5)])
    story.check("int8 is smaller", 5 / 18, holds=True)
    story.chapter("Two")
    story.check("pigs fly", "none seen", holds=False)
    told = capsys.readouterr().out
    pieces = ("1. One", "It begins.", "| fp32 | 18   |", "✔ int8 is smaller (0.27", "2. Two", "✘ pigs fly (none seen)")
    assert [told.index(piece) for piece in pieces] == sorted(told.index(piece) for piece in pieces)
    assert [check.claim for check in story.failed] == ["pigs fly"]
    assert [len(chapter.parts) for chapter in story.chapters] == [3, 1]
    assert story.close() >= sum(chapter.seconds for chapter in story.chapters) >= 0


def test_a_claim_is_as_true_as_what_was_measured(story):
    story.chapter("One")
    story.check("numpy says so", 1, holds=np.arange(3).sum() > 3)
    assert story.checks[0].holds is False
    assert len(story.failed) == 1


def test_the_page_shows_everything_and_loads_nothing_from_the_network(story):
    story.chapter("Sizes <small>")
    story.tell("A & B")
    story.table(["name"], [("<script>alert(1)</script>",)])
    story.show("a plot", plots.bars({"fp32": 18.6}, "MiB"))
    story.check("it <holds>", "yes", holds=True)
    good = report.page(story, 12.4, "a machine")
    assert "1 claims, every claim held; 12 seconds on a machine" in good
    for shown in (
        "Sizes &lt;small&gt;",
        "A &amp; B",
        "&lt;script&gt;",
        "it &lt;holds&gt;",
        "<figcaption>a plot",
        "<svg",
    ):
        assert shown in good
    assert "<script" not in good
    assert not re.search(r'(?:src|href)="(?!data:|#)', good.replace("xlink:", ""))
    story.check("it fails", "no", holds=False)
    bad = report.page(story, 12.4, "a machine")
    assert "2 claims, 1 claims did NOT hold" in bad
    assert "DID NOT HOLD:</b> it fails" in bad


# --- plots


def test_bars_name_every_value_and_two_drawings_are_the_same():
    values = {"fp32 & more": 18.6, "int8": 5.07}
    drawn = plots.bars(values, "MiB")
    assert {"fp32 & more", "int8", "MiB", "18.6", "5.07"} <= texts(drawn)
    assert drawn == plots.bars(values, "MiB")


def test_a_timeline_names_versions_and_events():
    drawn = plots.timeline({"v1": [(0.0, 5.0), (1.0, 6.0)], "v2": [(2.0, 3.0)]}, {"replay": 1.5})
    assert {"v1", "v2", "replay", "seconds", "ms a request"} <= texts(drawn)


def test_a_picture_is_made_smaller_and_carries_its_bytes():
    from PIL import Image

    tag = plots.picture(png(900, 450), width=300)
    small = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", tag)[1])))
    assert small.size == (300, 150)


# --- the command


def tell_instead(monkeypatch, chapter):
    """Put one chapter in place of the long ones."""
    from edgekit.cli import demo

    monkeypatch.setattr(demo, "_tell", lambda story, output: chapter(story))


def play(monkeypatch, tmp_path, chapter, *words):
    tell_instead(monkeypatch, chapter)
    return CliRunner().invoke(cli, ["demo", "-o", str(tmp_path / "out"), *words])


def claim(story, *, holds):
    story.chapter("One")
    story.check("the sky is blue", "it is", holds=True)
    story.check("two and two make four", "5", holds=holds)


def test_true_claims_are_exit_code_0_and_a_report(monkeypatch, tmp_path):
    done = play(monkeypatch, tmp_path, lambda story: claim(story, holds=True))
    assert done.exit_code == 0, done.output
    assert "2 of 2 claims held" in done.stdout
    assert "every claim held" in (tmp_path / "out/demo-report.html").read_text()


@pytest.mark.parametrize("words", [(), ("--quiet",), ("--json",)])
def test_one_false_claim_is_exit_code_1_and_names_it(monkeypatch, tmp_path, words):
    done = play(monkeypatch, tmp_path, lambda story: claim(story, holds=False), *words)
    assert done.exit_code == 1
    assert done.stderr == "did not hold: two and two make four (5)\n"
    assert "1 claims did NOT hold" in (tmp_path / "out/demo-report.html").read_text()
    if words == ("--json",):
        assert [c["holds"] for c in json.loads(done.stdout)["checks"]] == [True, False]


def test_what_does_not_happen_in_time_is_a_false_claim_and_not_the_end_of_the_report(monkeypatch, tmp_path):
    def wait_in_vain(story):
        claim(story, holds=True)
        raise HealthError("the demo waited 90 s in vain until the rollout halts")

    done = play(monkeypatch, tmp_path, wait_in_vain)
    assert done.exit_code == 1
    assert "waited 90 s in vain" in done.stderr
    assert "waited 90 s in vain" in (tmp_path / "out/demo-report.html").read_text()


def test_the_examples_are_found_and_their_absence_is_told(monkeypatch):
    from edgekit.cli import demo
    from edgekit.errors import UsageError

    assert demo._examples() == digits.EXAMPLES
    monkeypatch.setattr(demo, "__file__", "/nowhere/edgekit/cli/demo.py")
    with pytest.raises(UsageError, match="example workloads are missing"):
        demo._examples()


# --- the chapters of models


@pytest.mark.slow
def test_the_digits_chapter_proves_what_it_claims_on_files_it_wrote(story, shop, monkeypatch):
    whole = models._digit_recipes

    def quick(teacher, checkpoint):
        return {name: shortened(recipe) for name, recipe in whole(teacher, checkpoint).items()}

    monkeypatch.setattr(models, "_digit_recipes", quick)
    models.three_verbs(story, shop)
    assert set(claims(story).values()) == {True}, story.checks
    assert len(story.checks) == 3
    table = next(part for part in story.chapters[0].parts if hasattr(part, "rows"))
    assert [row[0] for row in table.rows] == [
        "trained, fp32",
        "int8",
        "half the channels, int8",
        "distilled student, int8",
    ]
    assert len(list((shop.out / "digits").iterdir())) == 4


def shortened(recipe):
    def few(step):
        return msgspec.structs.replace(step, epochs=min(step.epochs, 10)) if hasattr(step, "epochs") else step

    return models.recipes.Recipe(tuple((name, few(step)) for name, step in recipe.passes))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return the bundles of the digits in fp32 and int8, for the class that the demo measures."""
    folder = tmp_path_factory.mktemp("pair")
    plain = models.bundle_of(digits.model(), ["raspberry-pi-5"], folder / "fp32", version="1")
    return plain, models.bundle_of(digits.quantized(), ["raspberry-pi-5"], folder / "int8", version="2")


def test_the_size_claim_follows_the_files(story, pair):
    whole, small = pair
    story.chapter("Sizes")
    models._compare_sizes(story, whole, small)
    share = small.path(small.manifest.variants[0].main).stat().st_size
    share /= whole.path(whole.manifest.variants[0].main).stat().st_size
    assert story.checks[0].seen == f"{share:.3f}"
    assert story.checks[0].holds == (share <= 0.30)


@pytest.mark.parametrize("dot_product", ["avx_vnni", ""])
def test_the_claim_of_int8_follows_what_the_processor_can(story, pair, monkeypatch, dot_product):
    limit, of = (0.65, "time") if dot_product else (0.8, "memory")

    def measure(contenders, settings, progress):
        return real(contenders, models.Settings(seconds=0.3, warmup_seconds=0.1), progress)

    real = models.measure
    monkeypatch.setattr(models, "measure", measure)
    monkeypatch.setattr(Machine, "integer_dot_product", dot_product)
    models.side_by_side(story, *pair)
    (check,) = story.checks
    assert of in check.claim
    assert check.holds == (float(check.seen) <= limit) or float(check.seen) == limit
    plot = next(part for part in story.chapters[0].parts if hasattr(part, "html"))
    assert {"fp32 p50", "int8 p99", "ms"} <= texts(plot.html)
    told = " ".join(part for part in story.chapters[0].parts if isinstance(part, str))
    assert ("saves memory here, not time" in told) == (not dot_product)


def test_a_target_that_fails_ends_the_chapter(tmp_path):
    with pytest.raises(ExportError, match="no language model"):
        models.bundle_of(tiny_model(), ["llama-cpp"], tmp_path / "b")


# --- the chapters of the fleet


class Broken(BaseHTTPRequestHandler):
    """Answers the first request well and the others with 503."""

    answers = 0

    def do_POST(self):  # the name http.server wants
        self.rfile.read(int(self.headers["Content-Length"]))
        Broken.answers += 1
        body = json.dumps({"digest": "d", "labels": [{"label": "cat", "probability": 0.9}]}).encode()
        self.send_response(200 if Broken.answers == 1 else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


def test_an_answer_is_kept_and_a_failure_is_counted_as_one():
    import http.client

    server = HTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    good, bad = (cast._ask(connection, b"picture", 1.0) for _ in range(2))
    assert (good.labels, good.digest, good.error) == ((("cat", 0.9),), "d", "")
    assert bad.error.startswith("503")
    server.shutdown()
    server.server_close()
    connection.close()
    gone = cast._ask(connection, b"picture", 1.0)
    assert "Refused" in gone.error
    assert not cast._is_ready(server.server_port)
    running = cast.Fleet(None, "", None, 0, requests=[good, bad, gone], failures=["E: x"])
    assert running.failed_requests() == [bad.error, gone.error, "E: x"]


def test_one_failed_request_breaks_the_last_claim(story):
    fine = [cast.Request(i / 10, 5.0, "one" if i < 150 else "two", ()) for i in range(300)]
    names = {"v1": "one", "v2": "two"}
    for requests, holds in (
        (fine, True),
        ([*fine, cast.Request(1.0, 0.0, "", (), "503: late")], False),
        (fine[:9], False),
    ):
        story.chapter("End")
        fleet._nothing_failed(story, cast.Fleet(None, "", None, 0, requests=list(requests)), names, {"v2": 15.0})
        assert story.checks[-1].holds is holds
    assert {"v1", "v2"} <= texts(story.chapters[0].parts[-1].html)


def test_waiting_ends_when_it_is_so_and_gives_up_in_the_end(monkeypatch):
    running = cast.Fleet(None, "", None, 0)
    asked = iter([False, True])
    assert running.wait("it is so", lambda: next(asked)) < 5
    monkeypatch.setattr(cast, "PATIENCE", 0.1)
    with pytest.raises(HealthError, match="in vain until pigs fly"):
        running.wait("pigs fly", lambda: False)


def test_a_shifted_classifier_answers_the_next_class():
    class Headed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self._fc = torch.nn.Linear(192, 10)

        def forward(self, image):
            return self._fc(image.flatten(1))

    model = tiny_model(Headed())
    images = model.data.calibration.inputs
    right = model.network.run(images)["scores"]
    wrong = fleet._shifted(model).network.run(images)["scores"]
    np.testing.assert_allclose(wrong, np.roll(right, 1, axis=1), atol=1e-5)
    assert np.array_equal(model.network.run(images)["scores"], right)


def test_the_language_chapter_is_left_out_without_its_package(story, shop, monkeypatch):
    monkeypatch.setattr(language.importlib.util, "find_spec", lambda name: None)
    language.talk(story, shop)
    assert story.checks == []
    assert "Left out" in story.chapters[0].parts[0]


SMALL = """
from pathlib import Path
import numpy as np
import torch
from edgekit.manifest import ImagePreprocess
from edgekit.model import Data, Split


class build(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self._fc = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(288, 10)

    def forward(self, image):
        return 20 * self._fc(torch.relu(self.stem(image)).flatten(1))


def data():
    images = np.random.default_rng(0).random((24, 3, 8, 8), np.float32)
    how = ImagePreprocess(input="image", resize=8, crop=8, std=(255.0,))
    return Data(Split({"image": images}), preprocess=how, labels=tuple(f"cat {i}" for i in range(10)))


def cat_picture():
    return Path(__file__).parent / "cat.png"
"""


@pytest.mark.slow
def test_the_fleet_chapters_hold_on_a_small_model(story, tmp_path):
    """The whole fleet, its attacks and its rollouts, with a network that answers in a millisecond."""
    pytest.importorskip("iotcore", reason="the demo needs the fleet extra")
    (tmp_path / "cat.png").write_bytes(png(8))
    (tmp_path / "efficientnet.py").write_text(SMALL)
    small_shop = models.Workshop(tmp_path / "out", tmp_path)
    data = workload.load_data(small_shop.example("efficientnet.py:data"))
    model = workload.load(small_shop.example("efficientnet.py:build"), None, data)
    int8 = compress(model, models.recipes.default())
    workload.save(int8, small_shop.out / "efficientnet-int8")
    names = {"name": cast.MODEL}
    whole = models.bundle_of(model, [cast.CLASS], small_shop.out / "v1", version="1", **names)
    small = models.bundle_of(int8, [cast.CLASS], small_shop.out / "v2", version="2", **names)
    fleet.play(story, small_shop, whole, small)
    assert [check.claim for check in story.failed] == []
    assert len(story.checks) == 13
    assert len(story.chapters) == 5

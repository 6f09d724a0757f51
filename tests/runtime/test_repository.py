"""Several models at once: by their names, within a budget of memory, two sharing requests, one in another's place."""

import json
import threading
from collections import Counter

import numpy as np
import pytest
from fakes import bundles
from fakes.requests_to import ask, post_json

import edgekit
from edgekit.errors import HealthError, InputError, ResourceError, UsageError
from edgekit.runtime import memory
from edgekit.runtime.host import Host
from edgekit.runtime.repository import Repository
from edgekit.runtime.server import Limits, Options, serve_in_thread

ONE = {"image": np.zeros((1, 3), np.float32)}
GIVEN = {"inputs": [{"name": "image", "shape": [1, 3], "datatype": "FP32", "data": [0, 0, 0]}]}


def opener(folder, name, value):
    bundles.null_bundle(folder / name, name=name, value=value)
    return lambda: edgekit.load(folder / name)


def weighty(monkeypatch, sizes):
    """Let models of the null engine weigh what ``sizes`` says: MiB by the order in which they are loaded."""
    held = iter(np.cumsum([0.0, *sizes]).repeat(2)[1:])
    monkeypatch.setattr(memory, "rss_mib", lambda: float(next(held, 0.0)))


def test_each_request_is_answered_by_the_model_it_names(tmp_path):
    models = Repository()
    for name, value in (("one", 1.0), ("two", 2.0)):
        models.add(opener(tmp_path, name, value))
    with serve_in_thread(models) as running:
        for name, value in (("one", 1.0), ("two", 2.0)):
            status, answer = post_json(running.url, f"/v2/models/{name}/infer", GIVEN)
            assert (status, answer["outputs"][0]["data"][0]) == (200, value)
            assert answer["model_name"] == name
            assert json.loads(ask(running.url, path=f"/v2/models/{name}")[2])["name"] == name
        status, answer = post_json(running.url, "/v2/models/three/infer", GIVEN)
        assert status == 404
        assert "'one' 1, 'two' 1" in answer["error"]
        listed = json.loads(ask(running.url, path="/v1/models")[2])["data"]
        assert [one["id"] for one in listed] == ["one", "two"]
        text = ask(running.url, path="/metrics")[2].decode()
        assert text.count("edgekit_request_seconds_count{") == 2
        assert text.count("# TYPE edgekit_requests_total counter") == 1
    models.close()


def test_two_models_of_one_name_are_refused(tmp_path):
    models = Repository()
    models.add(opener(tmp_path / "a", "same", 1.0))
    with pytest.raises(UsageError, match="two of the bundles hold a model called 'same'"):
        models.add(opener(tmp_path / "b", "same", 2.0))
    assert len(list(models)) == 1
    models.close()


def test_the_model_that_was_not_asked_for_the_longest_makes_room_and_comes_back(tmp_path, monkeypatch):
    weighty(monkeypatch, [10, 10, 10])
    models = Repository(budget_mib=20)
    a, b = (models.add(opener(tmp_path, name, value)) for name, value in (("a", 1.0), ("b", 2.0)))
    a.run(ONE)  # so that b is the older one
    c = models.add(opener(tmp_path, "c", 3.0))
    assert [host.is_loaded for host in (a, b, c)] == [True, False, True]
    assert models.loaded_mib == 20
    assert b.session.contract.name == "b"  # its metadata are still told
    assert b.run(ONE).outputs["scores"][0, 0] == 2.0
    assert [host.is_loaded for host in (a, b, c)] == [False, True, True]
    assert b.statistics().requests == 1
    models.close()


def test_a_model_larger_than_the_budget_is_refused_with_its_size(tmp_path, monkeypatch):
    weighty(monkeypatch, [30])
    models = Repository(budget_mib=20)
    with pytest.raises(ResourceError, match="'a' takes 30 MiB, the budget is 20 MiB"):
        models.add(opener(tmp_path, "a", 1.0))
    assert not list(models)


def test_models_that_take_turns_in_a_narrow_budget_fail_no_request(tmp_path, monkeypatch):
    """Eight threads, three models, room for one: each answer is of the model that was asked."""
    weighty(monkeypatch, [10, 10, 10])
    models = Repository(budget_mib=10)
    values = {"a": 1.0, "b": 2.0, "c": 3.0}
    for name, value in values.items():
        models.add(opener(tmp_path, name, value))
    wrong, done = [], Counter()

    def work(seed):
        chance = np.random.default_rng(seed)
        for _ in range(40):
            name = str(chance.choice(list(values)))
            answer = models.get(name).run(ONE)
            done[name] += 1
            if answer.outputs["scores"][0, 0] != values[name]:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong
    assert sum(done.values()) == 320
    models.close()


@pytest.mark.slow
def test_real_models_stay_within_their_budget(tmp_path):
    """Four networks of 16 MiB that are asked in turn: the process holds two of them, however often they change."""

    def written(name, seed):
        bundles.wide_bundle(tmp_path / name, name=name, seed=seed)
        return lambda: edgekit.load(tmp_path / name, threads=1)

    openers = [written(f"m{seed}", seed) for seed in range(4)]
    openers[0]().close()  # the engine itself is loaded
    memory.give_back()
    empty = memory.rss_mib()
    models = Repository(budget_mib=40)
    hosts = [models.add(one) for one in openers]
    given = {"image": np.ones((1, 2048), np.float32)}
    most = 0.0
    for turn in range(24):
        hosts[turn % 4].run(given)
        most = max(most, memory.rss_mib() - empty)
        assert sum(host.is_loaded for host in hosts) == 2
    assert most < 50  # all four take 70
    models.close()


def test_unloading_and_loading_may_be_asked_for(tmp_path):
    models = Repository()
    host = models.add(opener(tmp_path, "a", 1.0))
    with serve_in_thread(models) as running:
        assert ask(running.url, "POST", "/v2/repository/models/a/unload")[0] == 200
        assert not host.is_loaded
        (told,) = json.loads(ask(running.url, "POST", "/v2/repository/index")[2])
        assert (told["state"], told["reason"]) == ("READY", "loaded when it is asked for")
        assert 'model="a"' in ask(running.url, path="/metrics")[2].decode()
        assert ask(running.url, "POST", "/v2/repository/models/a/load")[0] == 200
        assert host.is_loaded
        assert ask(running.url, "POST", "/v2/repository/models/b/load")[0] == 404
        assert ask(running.url, "POST", "/v2/repository/models/a/burn")[0] == 404
    models.close()
    fixed = Host(edgekit.load(tmp_path / "a"))
    with pytest.raises(InputError, match="nobody said how a is loaded again"):
        fixed.unload()
    assert fixed.run(ONE).outputs["scores"][0, 0] == 1.0
    fixed.close()


def test_a_slow_model_holds_up_no_other(tmp_path):
    """Each model has threads and a queue of its own."""
    go = threading.Event()
    models = Repository()
    slow = models.add(opener(tmp_path, "slow", 1.0))
    models.add(opener(tmp_path, "quick", 2.0))
    engine = slow.session._engine  # there is no slow engine to be had
    run = engine.run
    engine.run = lambda inputs: go.wait(20) and run(inputs)
    with serve_in_thread(models, options=Options(limits=Limits(workers=1, queue=1))) as running:
        waiting = [
            threading.Thread(target=post_json, args=(running.url, "/v2/models/slow/infer", GIVEN)) for _ in range(2)
        ]
        for thread in waiting:
            thread.start()
        for _ in range(20):
            assert post_json(running.url, "/v2/models/quick/infer", GIVEN)[0] == 200
        go.set()
        for thread in waiting:
            thread.join()
    models.close()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_a_share_of_the_requests_goes_to_the_newer_model_exactly(tmp_path, share):
    host = Host(opener(tmp_path, "old", 1.0)())
    old, new = host.session, opener(tmp_path, "new", 2.0)()
    host.swap(new, share=share, shadow=True)
    counts = Counter()
    for _ in range(200):
        answer = host.run(ONE)
        counts[answer.digest] += 1
        assert answer.outputs["scores"][0, 0] == (2.0 if answer.digest == new.digest else 1.0)
    assert counts[new.digest] == round(200 * share)
    assert host.statistics(old.digest).requests == 200 - round(200 * share)
    host.close()


def test_both_models_of_a_split_compute_each_request_and_are_compared(tmp_path):
    bundles.null_bundle(tmp_path / "a", value=1.0)
    bundles.null_bundle(tmp_path / "b", value=2.0)
    host = Host(edgekit.load(tmp_path / "a"))
    host.swap(edgekit.load(tmp_path / "b"), share=0.5)
    for _ in range(20):
        host.run(ONE)
    found = host.end_shadow()
    assert found.samples + found.skipped == 20
    assert found.samples > 0
    assert {host.run(ONE).outputs["scores"][0, 0] for _ in range(10)} == {2.0}  # the older one is gone
    with pytest.raises(UsageError, match="no model to share"):
        host.split(0.5)
    host.close()


def test_a_share_may_change_and_end_in_a_roll_back(tmp_path):
    host = Host(opener(tmp_path, "old", 1.0)())
    host.swap(opener(tmp_path, "new", 2.0)(), share=0.0)
    assert {host.run(ONE).outputs["scores"][0, 0] for _ in range(10)} == {1.0}
    host.split(1.0)
    assert {host.run(ONE).outputs["scores"][0, 0] for _ in range(10)} == {2.0}
    host.roll_back()
    assert {host.run(ONE).outputs["scores"][0, 0] for _ in range(10)} == {1.0}
    host.close()


def test_a_model_takes_anothers_place_where_memory_holds_one_and_no_request_fails(tmp_path):
    """The old one is closed before the new one opens; requests wait for as long as is told."""
    open_new = opener(tmp_path, "new", 2.0)
    host = Host(opener(tmp_path, "old", 1.0)())
    old, stop, failed, seen = host.session, threading.Event(), [], []

    def ask_on():
        while not stop.is_set():
            try:
                seen.append(float(host.run(ONE).outputs["scores"][0, 0]))
            except Exception as error:  # noqa: BLE001  # whatever fails is what this test looks for
                failed.append(error)

    def opened():
        assert old._engine is None, "two models were in memory"
        return open_new()

    threads = [threading.Thread(target=ask_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    gap = host.replace(opened)
    host.run(ONE)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed
    assert gap > 0
    assert seen[-1] == 2.0
    host.close()


def test_a_replacement_that_does_not_open_lets_the_old_model_come_back(tmp_path):
    again = opener(tmp_path, "old", 1.0)
    host = Host(again(), again)

    def broken():
        raise HealthError("no")

    with pytest.raises(HealthError, match="no"):
        host.replace(broken)
    assert host.run(ONE).outputs["scores"][0, 0] == 1.0
    host.close()


def test_unloading_and_loading_at_once_end(tmp_path):
    """A host that loads its model asks the repository for room; an unload must not hold that meanwhile."""
    models = Repository()
    hosts = [models.add(opener(tmp_path, name, 1.0)) for name in "ab"]
    stop = threading.Event()

    def unload(host):
        while not stop.is_set():
            models.unload(host)

    def ask_on(host):
        for _ in range(150):
            host.run(ONE)

    unloading = [threading.Thread(target=unload, args=(host,), daemon=True) for host in hosts]
    asking = [threading.Thread(target=ask_on, args=(host,), daemon=True) for host in hosts * 2]
    for thread in (*unloading, *asking):
        thread.start()
    for thread in asking:
        thread.join(60)
    stop.set()
    assert not any(thread.is_alive() for thread in asking)
    models.close()


def test_a_share_beside_a_model_that_was_unloaded_loads_it(tmp_path):
    open_old = opener(tmp_path, "old", 1.0)
    host = Host(open_old(), open_old)
    host.unload()
    host.swap(opener(tmp_path, "new", 2.0)(), share=0.5)
    assert Counter(float(host.run(ONE).outputs["scores"][0, 0]) for _ in range(10)) == {1.0: 5, 2.0: 5}
    host.split(0.0)
    assert host.run(ONE).outputs["scores"][0, 0] == 1.0
    host.close()


def test_a_replacement_waits_until_the_old_model_is_closed_and_survives_the_lack_of_memory(tmp_path):
    open_old = opener(tmp_path, "old", 1.0)
    host = Host(open_old(), open_old)

    def no_memory():
        raise MemoryError

    with pytest.raises(MemoryError):
        host.replace(no_memory)
    assert host.run(ONE).outputs["scores"][0, 0] == 1.0
    host.close()


def test_loading_by_hand_does_not_make_a_slow_model_look_quick(tmp_path):
    models = Repository()
    host = models.add(opener(tmp_path, "slow", 1.0))
    engine = host.session._engine
    run = engine.run
    names = []

    def slowly(inputs):
        names.append(threading.current_thread().name)
        return run(inputs)

    engine.run = slowly
    with serve_in_thread(models) as running:
        for _ in range(5):
            assert ask(running.url, "POST", "/v2/repository/models/slow/load")[0] == 200
        assert post_json(running.url, "/v2/models/slow/infer", GIVEN)[0] == 200
    assert names[-1].startswith("inference")
    models.close()

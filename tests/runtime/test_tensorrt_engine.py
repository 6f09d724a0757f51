"""TensorRT's engine on a seam: a driver whose memory is NumPy's, and an engine that multiplies what lies there."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from edgekit.errors import HealthError, UsageError
from edgekit.runtime.tensorrt_engine import TensorRtEngine

WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4) - 5
LARGEST = 4
SHAPES = {"x": (-1, 3), "scale": (1,), "y": (-1, 4)}


class Driver:
    """The calls of `Cuda` that an engine makes, on memory of this process; counts what is not given back."""

    def __init__(self):
        self.memory = {}
        self.last = 0

    def enter(self):
        pass

    def stream(self):
        return 7

    def allocate(self, size):
        self.last += 1 << 20
        self.memory[self.last] = bytearray(size)
        return self.last

    def free(self, address):
        del self.memory[address]

    def upload(self, address, array):
        self.memory[address][: array.nbytes] = array.tobytes()

    def download(self, array, address):
        array[...] = np.frombuffer(self.memory[address][: array.nbytes], array.dtype).reshape(array.shape)

    def wait(self, stream):
        assert stream == 7


class Loaded:
    """A deserialized engine of ``y = scale * x @ WEIGHTS`` and its context; ``batches`` are those that it computed."""

    num_io_tensors = 3

    def __init__(self, driver, batch=-1, hold=None):
        self.driver, self.batches, self.given, self.places, self.hold = driver, [], {}, {}, hold
        self.shapes = {name: tuple(batch if n == -1 else n for n in shape) for name, shape in SHAPES.items()}
        self.fails = False

    def create_execution_context(self):
        return self

    def get_tensor_name(self, number):
        return list(self.shapes)[number]

    def get_tensor_mode(self, name):
        return "out" if name == "y" else "in"

    def get_tensor_dtype(self, name):
        return np.float32

    def get_tensor_profile_shape(self, name, profile):
        largest = tuple(LARGEST if n == -1 else n for n in self.shapes[name])
        return (1, *largest[1:]), largest, largest

    def set_input_shape(self, name, shape):
        smallest, _, largest = self.get_tensor_profile_shape(name, 0)
        self.given[name] = shape
        return all(a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True))

    def get_tensor_shape(self, name):
        if len(self.given) < 2:  # asked of the engine, or too early
            return self.shapes[name]
        return (self.given["x"][0], 4) if name == "y" else self.given[name]

    def set_tensor_address(self, name, address):
        self.places[name] = address

    def execute_async_v3(self, stream):
        if self.hold:
            self.hold.wait(10)
        count = self.given["x"][0]
        x = np.frombuffer(self.driver.memory[self.places["x"]][: 12 * count], np.float32).reshape(count, 3)
        scale = np.frombuffer(self.driver.memory[self.places["scale"]], np.float32)
        self.driver.upload(self.places["y"], np.ascontiguousarray(scale * (x @ WEIGHTS)))
        self.batches.append(count)
        return not self.fails


class Engine:
    """What TensorRT tells of an engine whose shapes were not given yet."""

    def __init__(self, loaded):
        self._loaded = loaded

    def __getattr__(self, name):
        return getattr(self._loaded, name)

    def get_tensor_shape(self, name):
        return self._loaded.shapes[name]


TRT = SimpleNamespace(
    __name__="tensorrt", __version__="0", nptype=lambda dtype: dtype, TensorIOMode=SimpleNamespace(INPUT="in")
)


@pytest.fixture
def opened():
    driver = Driver()
    loaded = Loaded(driver)
    return TensorRtEngine(Engine(loaded), TRT, driver, LARGEST), loaded, driver


def inputs(batch):
    x = np.random.default_rng(batch).normal(size=(batch, 3)).astype(np.float32)
    return {"x": x, "scale": np.array([2], np.float32)}


@pytest.mark.parametrize(("batch", "pieces"), [(1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4]), (11, [4, 4, 3])])
def test_a_batch_above_the_largest_is_computed_in_pieces_and_joined_in_order(opened, batch, pieces):
    engine, loaded, _ = opened
    given = inputs(batch)
    found = engine.run(given)
    np.testing.assert_allclose(found["y"], 2 * given["x"] @ WEIGHTS, rtol=1e-6)
    assert loaded.batches == pieces


def test_a_file_of_one_fixed_batch_is_computed_whole_however_large_that_is():
    driver = Driver()
    loaded = Loaded(driver, batch=6)
    engine = TensorRtEngine(Engine(loaded), TRT, driver, LARGEST)
    given = inputs(6)
    np.testing.assert_allclose(engine.run(given)["y"], 2 * given["x"] @ WEIGHTS, rtol=1e-6)
    assert loaded.batches == [6]


def test_an_input_that_is_not_contiguous_or_of_another_type_arrives_as_it_is_meant(opened):
    engine, _, _ = opened
    x = np.arange(6, dtype=np.float64).reshape(3, 2).T
    np.testing.assert_allclose(engine.run({"x": x, "scale": np.array([1.0])})["y"], x @ WEIGHTS)


def test_a_shape_that_the_engine_was_not_built_for_is_named(opened):
    engine, _, _ = opened
    with pytest.raises(HealthError, match=r"takes no input 'x' of shape \[1, 5\]"):
        engine.run({"x": np.zeros((1, 5), np.float32), "scale": np.array([1], np.float32)})


def test_a_failed_run_is_told(opened):
    engine, loaded, _ = opened
    loaded.fails = True
    with pytest.raises(HealthError, match="fails to run its engine"):
        engine.run(inputs(1))


def test_closing_gives_all_memory_back_once_the_run_in_flight_is_done():
    driver, hold = Driver(), threading.Event()
    loaded = Loaded(driver, hold=hold)
    engine = TensorRtEngine(Engine(loaded), TRT, driver, LARGEST)
    assert len(driver.memory) == 3
    found, given = [], inputs(2)
    asking = threading.Thread(target=lambda: found.append(engine.run(given)["y"]))
    asking.start()
    while not engine._lock.locked():
        pass
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert len(driver.memory) == 3
    hold.set()
    for thread in (asking, closing):
        thread.join(10)
        assert not thread.is_alive()
    np.testing.assert_allclose(found[0], 2 * given["x"] @ WEIGHTS, rtol=1e-6)
    assert driver.memory == {}
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.run(inputs(1))

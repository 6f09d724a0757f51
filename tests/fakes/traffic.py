"""Live requests to what runs models under the agent."""

import threading

import numpy as np

X = np.random.default_rng(5).normal(size=(1, 64)).astype(np.float32)


class Traffic:
    """Asks the host all the time, and remembers what failed."""

    def __init__(self, serving, inputs=None):
        self.serving, self.errors, self.answers = serving, [], 0
        self.inputs = inputs or {"image": X}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self):
        while not self._end.wait(0.002):
            host = self.serving.host
            if host is None:  # nothing serves yet
                continue
            try:
                self.ask(host)
                self.answers += 1
            except Exception as error:  # noqa: BLE001  # whatever fails is what the test looks for
                self.errors.append(error)

    def ask(self, host):
        host.run(self.inputs)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()

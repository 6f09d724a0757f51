"""LiteRT's delegates: a real one that is compiled here, and what does not load or fails, with the processor serving."""

import logging
import shutil
import subprocess

import numpy as np
import pytest
from fakes.engine_files import CONTRACT, WEIGHTS, write

from edgekit.device_profiles import RuntimeSettings
from edgekit.runtime import open_variant
from edgekit.runtime.backends import EngineOptions, tflite

pytest.importorskip("ai_edge_litert.interpreter", reason="LiteRT is not installed")
IMAGE = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)

DELEGATE = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* TfLiteDelegate of tensorflow/lite/core/c/common.h */
struct Delegate {
  void* data;
  int (*Prepare)(void* context, struct Delegate* self);
  void *CopyFromBufferHandle, *CopyToBufferHandle, *FreeBufferHandle;
  int64_t flags;
  void* opaque_delegate_builder;
};

static int prepare(void* context, struct Delegate* self) {
  FILE* told = fopen(PREPARED, "a");
  fputs("prepared\n", told);
  fclose(told);
  return RESULT; /* 0 takes no node, and that is well; 1 is an error */
}

void* tflite_plugin_create_delegate(char** keys, char** values, size_t count, void (*report)(const char*)) {
  if (RESULT == 2) {
    report("no device is plugged in");
    return NULL;
  }
  struct Delegate* made = calloc(1, sizeof(struct Delegate));
  made->Prepare = prepare;
  return made;
}

void tflite_plugin_destroy_delegate(void* delegate) { free(delegate); }
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("litert")
    return folder, write("tflite", folder)


def compiled(folder, result):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler makes the delegate of this test")
    (folder / "delegate.c").write_text(DELEGATE)
    library = folder / f"libdelegate{result}.so"
    flags = ["-shared", "-fPIC", f'-DPREPARED="{folder}/prepared"', f"-DRESULT={result}"]
    subprocess.run([compiler, *flags, "-o", library, folder / "delegate.c"], check=True, capture_output=True)
    return str(library)


def opened(written, delegate):
    return open_variant(*written, CONTRACT, EngineOptions(threads=1, runtime=RuntimeSettings(delegate=delegate)))


def computes(session):
    np.testing.assert_allclose(session.run({"image": IMAGE})["scores"], IMAGE @ WEIGHTS, rtol=1e-4, atol=1e-4)


def test_the_delegate_of_the_class_is_loaded_and_asked(written, tmp_path, monkeypatch):
    monkeypatch.setitem(tflite.LIBRARIES, "gpu", compiled(tmp_path, 0))
    with opened(written, "gpu") as session:
        assert session.engine.startswith("ai-edge-litert")
        assert session.engine.endswith(" gpu")
        assert (tmp_path / "prepared").read_text() == "prepared\n"
        computes(session)


@pytest.mark.parametrize("fails", [(1, "edgetpu: "), (2, "no device is plugged in")])
def test_a_delegate_that_fails_leaves_the_processor_with_a_warning(fails, written, tmp_path, monkeypatch, caplog):
    result, says = fails
    monkeypatch.setitem(tflite.LIBRARIES, "edgetpu", compiled(tmp_path, result))
    with caplog.at_level(logging.WARNING), opened(written, "edgetpu") as session:
        assert "XNNPACK (edgetpu: " in session.engine
        computes(session)
    assert says in caplog.text
    assert "model.tflite is not served by a delegate" in caplog.text


def test_a_library_that_is_missing_or_is_none_leaves_the_processor(written, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(tflite.log, "warning", lambda text, *names: told.append(text % names))
    (tmp_path / "libbroken.so").write_bytes(b"\x7fELF and then nothing" * 40)
    for library in ("libedgetpu-nowhere.so.1", str(tmp_path / "libbroken.so"), "libm.so.6"):
        monkeypatch.setitem(tflite.LIBRARIES, "edgetpu", library)
        with opened(written, "edgetpu") as session:
            assert f"XNNPACK (edgetpu: {library}: " in session.engine
            computes(session)
        assert library in told[-1]


def test_no_delegate_is_asked_where_the_class_names_none(written, tmp_path, monkeypatch):
    monkeypatch.setitem(tflite.LIBRARIES, "gpu", compiled(tmp_path, 0))
    with opened(written, "") as session:
        assert session.engine.endswith(" XNNPACK")
    assert not (tmp_path / "prepared").exists()

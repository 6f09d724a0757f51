"""Asks a server what schemathesis makes of the Open Inference Protocol's own REST document: no failure, no 500.

    curl -LO https://raw.githubusercontent.com/kserve/open-inference-protocol/main/specification/protocol/open_inference_rest.yaml
    edgekit serve BUNDLE --port 8080 &
    .venv/bin/python checks/open_inference.py open_inference_rest.yaml http://127.0.0.1:8080 MODEL [VERSION]

Two things are set right before: the document writes ${NAME} where OpenAPI wants {NAME}, and knows no answer for a model
that is not there, so that MODEL and VERSION (default 1) stand in its paths. A request that is valid by the document may
still not fit the model, whose tensors are no part of it: that it is refused is no failure. Exit code 0 where all holds.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

EXAMPLES = 200


def about(document: dict[str, Any], model: str, version: str) -> dict[str, Any]:
    paths = {}
    for path, item in document["paths"].items():
        for holder in (item, *(one for one in item.values() if isinstance(one, dict))):
            if "parameters" in holder:
                holder["parameters"] = [
                    p for p in holder["parameters"] if p["name"] not in ("MODEL_NAME", "MODEL_VERSION")
                ]
        paths[path.replace("${MODEL_NAME}", model).replace("${MODEL_VERSION}", version)] = item
    return {**document, "paths": paths}


def main(document: str, url: str, model: str, version: str = "1") -> int:
    start = "from schemathesis.cli import schemathesis; schemathesis()"
    flags = ["--max-examples", str(EXAMPLES), "--exclude-checks", "positive_data_acceptance", "--seed", "1"]
    with tempfile.TemporaryDirectory() as scratch:
        told = Path(scratch, "document.yaml")
        told.write_text(
            yaml.safe_dump(about(yaml.safe_load(Path(document).read_text("utf-8")), model, version)), "utf-8"
        )
        Path(scratch, "schemathesis.toml").touch()  # else one of a folder above would be taken
        command = [sys.executable, "-c", start, "run", str(told), "--url", url, "--no-color", *flags]
        return subprocess.run(command, check=False, cwd=scratch).returncode


if __name__ == "__main__":
    if not 4 <= len(sys.argv) <= 5:  # as the first lines say
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))

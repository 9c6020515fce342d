"""Coverage-guided fuzzing of everything that is parsed: `python tests/faults/fuzz.py TARGET`.

Needs atheris, in an environment of its own that sees the others (`--system-site-packages` or
PYTHONPATH). Further arguments are those of libFuzzer, such as -max_total_time=600. A target may
raise the errors that end a command in one line; anything else is a finding.
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["shards", "pipelines.runtime.strict_yaml"]):
    import yaml

    from pipelines.runtime.strict_yaml import load_typed_yaml, load_yaml
    from shards.images.files import ImageRule, open_image
    from shards.manifest import read_manifest
    from shards.sample import DataError

FOLDER = Path(tempfile.mkdtemp())


def fuzz_manifest(data: bytes) -> None:
    (FOLDER / "index.json").write_bytes(data)
    with contextlib.suppress(DataError):
        read_manifest(FOLDER)


def fuzz_yaml(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    for load in (load_yaml, load_typed_yaml):
        with contextlib.suppress(yaml.YAMLError):
            load(text)


def fuzz_image(data: bytes) -> None:
    with contextlib.suppress(DataError):
        open_image(data, "x", ImageRule())


TARGETS = {"manifest": fuzz_manifest, "yaml": fuzz_yaml, "image": fuzz_image}

if __name__ == "__main__":
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
    atheris.Fuzz()

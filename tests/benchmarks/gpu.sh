#!/usr/bin/env bash
# GPU benchmark on a machine without network: installs wheels from a folder, then runs gpu.py.
#
#   tests/benchmarks/gpu.sh --out DIR [FLAGS OF gpu.py]
#   WHEELS=FOLDER PYTHON=/path/to/python3 tests/benchmarks/gpu.sh --out DIR
#
# WHEELS: default .whl in the checkout; empty if everything is installed already.
#
# Requires Python 3.12, torch with CUDA, numpy, pillow, accelerate, torchmetrics, safetensors,
# huggingface-hub, fsspec, tqdm, jinja2, pyyaml, scipy, timm, torchvision, psutil, requests, click,
# protobuf, packaging, xxhash, anyio, httpx, pytest with pytest-timeout and pytest-xdist, a C
# compiler and Python.h; 8 GB in $TMPDIR, 2 GiB in /dev/shm (an image of 20,000 x 20,000 passes
# through it). It measures the first GPU. Everything else is shipped as wheels (26 MB), which this
# command downloads into .whl on a machine with network (wandb and below: for its tracker; the last
# one: a peer):
#
#   python -m pip download --dest .whl --no-deps --only-binary=:all: --python-version 3.12 \
#       --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
#       --platform manylinux2014_x86_64 --constraint launch/constraints.txt \
#       webdataset braceexpand msgspec typing-extensions simplejpeg \
#       wandb platformdirs pydantic pydantic-core annotated-types typing-inspection cwevals distro \
#       sniffio googleapis-common-protos opentelemetry-api opentelemetry-sdk opentelemetry-proto \
#       opentelemetry-semantic-conventions opentelemetry-exporter-otlp-proto-http \
#       opentelemetry-exporter-otlp-proto-common opentelemetry-exporter-otlp-common \
#       opentelemetry-exporter-http-transport segmentation-models-pytorch
#
# Results: DIR/gpu.md, gpu.json and gpu.log. tests/benchmarks/README.md explains them.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
wheels=${WHEELS-$root/.whl}
if [ -n "$wheels" ] && [ -d "$wheels" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --target "$site" "$wheels"/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
elif [ -n "$wheels" ] && [[ " $* " != *" --rehearse "* ]]; then
  echo "WHEELS: $wheels does not exist; download the wheels, or set WHEELS= if all is installed:" >&2
  sed -n '/^#   python -m pip download/,/[^\\]$/s/^#   //p' "$0" >&2
  exit 2
fi
"$python" "$root/tests/benchmarks/gpu.py" "$@"

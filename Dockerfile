# Container image of the tool, for one machine or a cluster. BASE is any Debian or Ubuntu image with
# Python 3.11 or newer and its venv module:
#
#   docker build -t unet .                                    default base, with CUDA (not tested)
#   docker build -t unet --build-arg BASE=python:3.11-slim .  pip installs the torch build it finds
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/data" unet train --data /data/SHARDS --run-dir /data/RUN
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/data" --entrypoint accelerate unet \
#       launch --multi_gpu --num_processes 8 --num_machines 1 --mixed_precision bf16 --dynamo_backend no \
#       -m pipelines.train --data /data/SHARDS --run-dir /data/RUN
#
# Expect: user 10001, who needs write access to the folder mounted at /data (or use
# --user "$(id -u)"). Workers pass batches through /dev/shm, for which Docker's default is 64 MB:
# hence --shm-size. Single stage: nothing is compiled, and the layer of dependencies, nearly all of
# the image, stays cached in registries and on nodes when only the code changes.
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
FROM ${BASE}

# --compile builds kernels at run time: Inductor with g++, Triton with a C compiler and Python.h.
# Runtime images lack some of these. A Python that apt did not install has its own headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && export DEBIAN_FRONTEND=noninteractive \
    && apt-get install -y --no-install-recommends g++ \
    && if [ ! -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; \
    then apt-get install -y --no-install-recommends python3-dev; fi \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/unet
# Dependencies first, without the files that change often: their layer stays cached.
COPY pyproject.toml launch/constraints.txt ./
RUN python3 -m venv --system-site-packages /opt/venv \
    && mkdir unet shards pipelines \
    && touch README.md LICENSE unet/__init__.py shards/__init__.py pipelines/__init__.py \
    && /opt/venv/bin/pip install --no-cache-dir "$(grep '^torch==' constraints.txt)" \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt '.[dask,s3,scipy,turbo]' \
    # Artefacts built from the empty files are newer than the real ones and would be reused.
    && rm -r build unet_shards.egg-info
COPY README.md LICENSE ./
COPY unet unet
COPY shards shards
COPY pipelines pipelines
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps --force-reinstall .

RUN useradd --uid 10001 --create-home unet && mkdir /data && chown unet /data
USER 10001
WORKDIR /data
ENV PATH=/opt/venv/bin:$PATH
ENTRYPOINT ["unet"]
CMD ["--help"]

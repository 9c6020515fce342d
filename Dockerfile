# A picture of the whole tool. BASE is any image with Python 3.11 or newer:
#
#   docker build -t unet .                                    on the default base, which has CUDA
#   docker build -t unet --build-arg BASE=python:3.11-slim .  without
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/data" unet train --data /data/SHARDS --run-dir /data/RUN
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
FROM ${BASE}

WORKDIR /opt/unet
# Dependencies first: they change seldom, and the layer is reused when only the code has changed.
COPY pyproject.toml README.md LICENSE launch/constraints.txt ./
RUN python3 -m venv --system-site-packages /opt/venv \
    && mkdir unet shards pipelines \
    && touch unet/__init__.py shards/__init__.py pipelines/__init__.py \
    && /opt/venv/bin/pip install --no-cache-dir "$(grep '^torch==' constraints.txt)" \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt .
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

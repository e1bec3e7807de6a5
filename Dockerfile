# CPU:  docker build -t antransformer .
# CUDA: docker build -t antransformer:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
#
#   docker run --rm --network none --user "$(id -u):$(id -g)" -v "$PWD:/work" antransformer train --data data/mine \
#       --out runs/mine
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" -v "$PWD:/work" --entrypoint torchrun \
#       antransformer:cuda --nproc-per-node 8 -m antransformer train --data data/mine --parallel fsdp --out runs/mine
#
# Any Debian image with Python 3.11 or newer can be the base. torch's wheels have their own CUDA libraries, so the host
# needs only the NVIDIA driver and container toolkit.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# torch.compile calls the C++ compiler at run time, on CPUs and on GPUs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 antransformer

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=analysis,data,gguf,hf,serve
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt ./
# A layer of its own: torch changes less often than this package.
RUN pip install --index-url "${TORCH_INDEX}" --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --constraint constraints.txt ".[${EXTRAS}]"

# Nothing is downloaded at run time. Remove these to stream data sets of the Hugging Face hub.
ENV HF_HUB_OFFLINE=1 WANDB_MODE=offline PYTHONUNBUFFERED=1
# For users without a home in the image (--user).
ENV MPLCONFIGDIR=/tmp/matplotlib
USER 1000
WORKDIR /work
ENTRYPOINT ["antransformer"]
CMD ["--help"]

# syntax=docker/dockerfile:1
# With CUDA, which PyPI's torch brings along; the host has NVIDIA's driver and container toolkit:
#   docker build -t scalelong .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" scalelong train digits-uvit
# For a CPU, in a fifth of the size; INDEX is the address of PyTorch's own index of builds for CPUs:
#   docker build -t scalelong:cpu --build-arg TORCH_INDEX=INDEX .
#   docker run --rm -v "$PWD:/work" scalelong:cpu train digits-uvit
ARG PYTHON=3.11

# g++ stays: Triton and torch.compile compile at run time.
FROM python:${PYTHON}-slim AS torch
ARG TORCH_INDEX=
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0

FROM torch AS wheel
RUN pip install --no-cache-dir -c constraints.txt setuptools wheel cmake
COPY . .
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheel .

FROM torch
ARG EXTRAS=train,scores
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir -c constraints.txt "$(echo /wheel/*.whl)[$EXTRAS]"
WORKDIR /work
ENTRYPOINT ["scalelong"]
CMD ["--help"]

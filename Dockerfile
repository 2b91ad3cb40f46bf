# isim with all that it needs, at the versions of constraints.txt; the project is mounted at /work.
#
#     docker build -t isim .                          # with CUDA: PyPI's torch; runs on CPU, too
#     docker build -t isim-cpu --build-arg DEVICE=cpu .
#
# and how it is run stands in docs/scale-out.md.
FROM python:3.12-slim-bookworm

# g++ stays: isim compiles its kernels on the machine that it runs on. DVC wants git.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY isim isim

# cuda: the libraries of NVIDIA come with torch, the host has the driver alone.
# cpu: torch of its own index, 3 GB smaller. Its versions end in +cpu, which the pins allow, but the
# libraries of CUDA and triton are not there, and so must not be asked for.
ARG DEVICE=cuda
RUN set -eu; \
    pip install --no-cache-dir -c constraints.txt Cython setuptools wheel; \
    if [ "$DEVICE" = cpu ]; then \
      pip install --no-cache-dir -c constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu \
        "$(grep '^torch==' constraints.txt)+cpu" "$(grep '^torchvision==' constraints.txt)+cpu"; \
    elif [ "$DEVICE" != cuda ]; then \
      echo "DEVICE is cuda or cpu, not $DEVICE" >&2; exit 1; \
    fi; \
    pip install --no-cache-dir -c constraints.txt --no-build-isolation ".[heic,onnx]"; \
    rm -rf /src

# A user of the host owns what is written: docker run --user "$(id -u):$(id -g)".
ENV HOME=/tmp PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
WORKDIR /work
CMD ["isim", "--help"]

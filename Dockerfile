# The two commands of the README without a GPU: `make demo` when the image is built, `make test` when it runs.
#
#     docker build -t goc_deploy .
#     docker run --rm goc_deploy
FROM python:3.12-slim
# g++: tests compile the GPU kernels for the host, and skip without a compiler
RUN apt-get update && apt-get install --yes --no-install-recommends make g++ && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /goc_deploy
COPY . .
# torch without CUDA libraries: PyPI has no such build for Linux
RUN python3 -m venv .venv && .venv/bin/pip install --index-url https://download.pytorch.org/whl/cpu "$(grep ^torch== constraints.txt)"
RUN make demo
CMD ["make", "test"]

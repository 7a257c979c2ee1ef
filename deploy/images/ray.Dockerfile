# Every Ray pod: the head, caption, frame and customization, and the pods of customization jobs. One image, because Ray wants the same
# Python, Ray and code in every node of a cluster.
# Build from the repository's root:
#   docker build -f deploy/images/ray.Dockerfile -t fabula/ray:0.1.0-gpu .
#   docker build -f deploy/images/ray.Dockerfile --build-arg LOCK=ray-cpu.lock -t fabula/ray:0.1.0-cpu .
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# ray-gpu.lock: torch's CUDA build and vLLM. ray-cpu.lock: their CPU builds.
ARG LOCK=ray-gpu.lock
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app
COPY requirements/cpu.lock requirements/ray-cpu.lock requirements/ray-gpu.lock requirements/
# torch goes first and with its own dependencies, which are the CUDA libraries where it is the CUDA build; the rest of the lock is
# complete and nothing is resolved. On an index that has both builds, pass the CPU one's address with PIP_EXTRA_INDEX_URL.
ARG PIP_EXTRA_INDEX_URL=
RUN python -m venv /opt/fabula \
    && /opt/fabula/bin/python -m pip install "$(grep -E '^torch==' requirements/${LOCK})" \
    && /opt/fabula/bin/python -m pip install --no-deps -r requirements/${LOCK} \
    && python -m venv /opt/compiler \
    && grep -E '^(grpcio|grpcio-tools|protobuf|setuptools|typing_extensions)==' requirements/cpu.lock > compiler.lock \
    && /opt/compiler/bin/python -m pip install --no-deps -r compiler.lock
COPY protos protos
RUN mkdir -p protos/gen \
    && /opt/compiler/bin/python -m grpc_tools.protoc -Iprotos --python_out=protos/gen --grpc_python_out=protos/gen \
       protos/fabula/*/v1/*.proto
COPY services/__init__.py services/
COPY services/runtime services/runtime
COPY services/models services/models
COPY services/caption services/caption
COPY services/frame services/frame
COPY services/customization services/customization
COPY training training
# Lets torchvision be imported where its compiled operators are missing; does nothing where they are there.
RUN /opt/fabula/bin/python services/runtime/torchvision_operators.py \
    && /opt/fabula/bin/python -m compileall -q services training protos/gen \
    && /opt/fabula/bin/python -m pip uninstall --yes pip

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="fabula/ray" \
      org.opencontainers.image.description="Fabula's caption, frame and customization services on Ray Serve, and training" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# A C compiler: Triton and torch compile kernels at run time. libnuma and OpenMP: vLLM's CPU build. OpenGL's and EGL's loaders: Skia
# links them, also where it only draws into memory.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev libnuma1 libgomp1 libgl1 libegl1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 fabula \
    && useradd --uid 10001 --gid fabula --home-dir /var/lib/fabula --create-home --shell /bin/bash fabula
COPY --from=build /opt/fabula /opt/fabula
COPY --from=build /app/protos/gen /app/protos/gen
COPY --from=build /app/services /app/services
COPY --from=build /app/training /app/training
WORKDIR /app
# Caches go to /tmp: the root file system is read-only at run time. No weights, data or telemetry travel.
ENV PATH=/opt/fabula/bin:$PATH \
    PYTHONPATH=/app:/app/protos/gen \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    FABULA_HOME=/var/lib/fabula/home \
    HF_HUB_OFFLINE=1 \
    HF_HOME=/tmp/cache/huggingface \
    XDG_CACHE_HOME=/tmp/cache \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    VLLM_CACHE_ROOT=/tmp/cache/vllm \
    VLLM_NO_USAGE_STATS=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    TOKENIZERS_PARALLELISM=false
USER 10001:10001
# For engines without probes of their own. Kubernetes uses the manifests' probes and ignores this.
HEALTHCHECK --interval=10s --timeout=5s --start-period=90s --retries=6 \
    CMD ["python", "-S", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8481/api/healthz', timeout=3)"]
# KubeRay writes the command of every Ray pod. Off Kubernetes, with RAY_AUTH_MODE=token:
# ray start --head --block --dashboard-agent-listen-port 8481
CMD ["ray", "--version"]

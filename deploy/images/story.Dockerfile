# The edge and orchestrator, and the migrations: no torch, no Ray, no model. Build from the repository's root:
#   docker build -f deploy/images/story.Dockerfile -t fabula/story:0.1.0 .
# Name the base by digest where your builds must repeat to the byte: --build-arg PYTHON_IMAGE=python@sha256:…
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app
COPY requirements/cpu.lock requirements/story.lock requirements/
# The lock is complete, so nothing is resolved. The protobuf compiler stays behind in this stage.
RUN python -m venv /opt/fabula \
    && /opt/fabula/bin/python -m pip install --no-deps -r requirements/story.lock \
    && python -m venv /opt/compiler \
    && grep -E '^(grpcio|grpcio-tools|protobuf|setuptools|typing_extensions)==' requirements/cpu.lock > compiler.lock \
    && /opt/compiler/bin/python -m pip install --no-deps -r compiler.lock
COPY protos protos
RUN mkdir -p protos/gen \
    && /opt/compiler/bin/python -m grpc_tools.protoc -Iprotos --python_out=protos/gen --grpc_python_out=protos/gen \
       protos/fabula/*/v1/*.proto
COPY services/__init__.py services/
COPY services/runtime services/runtime
COPY services/story services/story
# The root file system is read-only at run time, so bytecode is made now.
RUN /opt/fabula/bin/python -m compileall -q services protos/gen \
    && /opt/fabula/bin/python -m pip uninstall --yes pip

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="fabula/story" \
      org.opencontainers.image.description="Fabula's edge and orchestrator" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 fabula \
    && useradd --uid 10001 --gid fabula --home-dir /var/lib/fabula --create-home --shell /usr/sbin/nologin fabula
COPY --from=build /opt/fabula /opt/fabula
COPY --from=build /app/protos/gen /app/protos/gen
COPY --from=build /app/services /app/services
WORKDIR /app
ENV PATH=/opt/fabula/bin:$PATH \
    PYTHONPATH=/app:/app/protos/gen \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    FABULA_HOME=/var/lib/fabula/home
USER 10001:10001
EXPOSE 8470 8471
# For engines without probes of their own. Kubernetes uses the manifests' probes and ignores this.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-S", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('FABULA_PORT_BASE', '8470')}/livez\", timeout=3)"]
ENTRYPOINT ["python", "-m", "services.story"]

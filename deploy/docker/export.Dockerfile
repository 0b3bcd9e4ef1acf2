# Fills the model repository: PyTorch, the architectures with their trained weights, the export step. Run it as a Job
# (deploy/kubernetes/export); servers do not need it.
ARG BUILD_IMAGE=python:3.11-slim
ARG BASE_IMAGE=python:3.11-slim

FROM ${BUILD_IMAGE} AS build
# TORCH=torch==2.15.0+cpu with PIP_EXTRA_INDEX_URL of PyTorch's CPU builds makes the image five times smaller.
ARG TORCH=torch==2.15.0
ARG ONNXRUNTIME=onnxruntime==1.31.1
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
RUN python3 -m venv --without-pip /opt/rafaga
COPY pyproject.toml requirements/constraints.txt deploy/docker/requirements.py ./
RUN grep -v '^torch==' constraints.txt > chosen.txt \
    && python3 requirements.py export --replace "torch=${TORCH}" --replace "onnxruntime=${ONNXRUNTIME}" > requirements.txt \
    && python3 -m pip --python /opt/rafaga/bin/python install --no-cache-dir -c chosen.txt -r requirements.txt
COPY README.md LICENSE ./
COPY service service
RUN python3 -m pip --python /opt/rafaga/bin/python install --no-cache-dir --no-deps .

FROM ${BASE_IMAGE}
COPY --from=build /opt/rafaga /opt/rafaga
WORKDIR /app
COPY models models
COPY export export
# Only /scratch and the repository are writable: downloads, caches, temporary files.
RUN mkdir -m 1777 /scratch
# ONNX Runtime's builds report usage to Microsoft unless this is set before they are loaded.
ENV ORT_DISABLE_TELEMETRY=1 \
    PATH=/opt/rafaga/bin:$PATH \
    HOME=/scratch \
    TMPDIR=/scratch \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT ["python3", "-m", "export"]
CMD ["--list"]

# Fills the model repository: PyTorch, the architectures with their trained weights, the export step. Run it as a Job
# (deploy/kubernetes/export); servers do not need it. Name both images by digest for a build that can be repeated:
# --build-arg BASE_IMAGE=python:3.11-slim@sha256:... (docs/security.md).
ARG BUILD_IMAGE=python:3.11-slim
ARG BASE_IMAGE=python:3.11-slim

FROM ${BUILD_IMAGE} AS build
# TORCH='torch==2.15.0+cpu torchvision==0.29.2+cpu' with PIP_EXTRA_INDEX_URL of PyTorch's CPU builds makes the image five
# times smaller. Only the hashes of these two are then not checked.
ARG TORCH=
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
RUN python3 -m venv --without-pip /opt/rafaga
# pip refuses a file whose hash is not listed.
COPY requirements/images requirements
RUN python3 -m pip install --no-cache-dir --require-hashes --target build -r requirements/build.txt \
    && if [ -n "${TORCH}" ]; then \
         python3 -m pip --python /opt/rafaga/bin/python install --no-cache-dir --no-deps ${TORCH} \
         && sed -i -E '/^(torch|torchvision|triton|nvidia-.*|cuda-.*)==/d' requirements/export.txt; \
       fi \
    && python3 -m pip --python /opt/rafaga/bin/python install --no-cache-dir --no-deps --require-hashes -r requirements/export.txt
COPY README.md LICENSE pyproject.toml ./
COPY service service
RUN PYTHONPATH=/src/build python3 -m pip --python /opt/rafaga/bin/python install --no-cache-dir --no-deps --no-build-isolation .

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

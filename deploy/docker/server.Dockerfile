# The server: a Python, its packages, and nothing else. No torch, no compiler, no root, no writable file.
#
# By default for CPUs. For GPUs: --build-arg ONNXRUNTIME='onnxruntime-gpu[cuda,cudnn]==1.31.1', which contains the CUDA
# libraries; the base image needs none, and the node only the driver. TensorRT's libraries, some gigabytes more:
# --build-arg TENSORRT='tensorrt-cu13-libs<11' in addition.
#
# Both images must have the same Python at the same path; only the first needs pip.
ARG BUILD_IMAGE=python:3.11-slim
ARG BASE_IMAGE=python:3.11-slim

FROM ${BUILD_IMAGE} AS build
ARG ONNXRUNTIME=onnxruntime==1.31.1
ARG TENSORRT=
WORKDIR /src
RUN python3 -m venv --without-pip /opt/rafaga
# Packages before the source: they change less often.
COPY pyproject.toml requirements/constraints.txt deploy/docker/requirements.py ./
# `gpu` adds a few kilobytes for GPU metrics; --replace chooses the build of ONNX Runtime.
RUN python3 requirements.py server tracing gpu --replace "onnxruntime=${ONNXRUNTIME}" > requirements.txt \
    && python3 -m pip --python /opt/rafaga/bin/python install --no-cache-dir -c constraints.txt -r requirements.txt ${TENSORRT}
COPY README.md LICENSE ./
COPY service service
RUN python3 -m pip --python /opt/rafaga/bin/python install --no-cache-dir --no-deps . \
    # Packages' own tests are a tenth of the size.
    && find /opt/rafaga/lib -type d -name tests -prune -exec rm -r {} +

FROM ${BASE_IMAGE}
COPY --from=build /opt/rafaga /opt/rafaga
# ONNX Runtime's builds report usage to Microsoft unless this is set before they are loaded.
ENV ORT_DISABLE_TELEMETRY=1 \
    PATH=/opt/rafaga/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# A number, so that Kubernetes can check that it is not root.
USER 65532:65532
WORKDIR /
EXPOSE 50051 8080
ENTRYPOINT ["rafaga"]
CMD ["serve", "--repository=/models", "--host=::"]

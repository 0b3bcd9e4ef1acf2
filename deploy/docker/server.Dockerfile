# The server: a Python, its packages, and nothing else. No torch, no compiler, no root, no writable file.
#
# By default for CPUs. For GPUs: --build-arg REQUIREMENTS=server-gpu, which contains the CUDA libraries; the base image
# needs none, and the node only the driver. TensorRT's libraries, some gigabytes more, and without checked hashes:
# --build-arg TENSORRT='tensorrt-cu13-libs<11' in addition.
#
# Both images must have the same Python at the same path; only the first needs pip. Name them by digest for a build that
# can be repeated: --build-arg BASE_IMAGE=python:3.11-slim@sha256:... (docs/security.md).
ARG BUILD_IMAGE=python:3.11-slim
ARG BASE_IMAGE=python:3.11-slim

FROM ${BUILD_IMAGE} AS build
ARG REQUIREMENTS=server
ARG TENSORRT=
WORKDIR /src
RUN python3 -m venv --without-pip /opt/rafaga
# Packages before the source: they change less often. pip refuses a file whose hash is not listed.
COPY requirements/images requirements
RUN python3 -m pip install --no-cache-dir --require-hashes --target build -r requirements/build.txt \
    && python3 -m pip --python /opt/rafaga/bin/python install --no-cache-dir --require-hashes -r "requirements/${REQUIREMENTS}.txt" \
    && if [ -n "${TENSORRT}" ]; then python3 -m pip --python /opt/rafaga/bin/python install --no-cache-dir "${TENSORRT}"; fi
COPY README.md LICENSE pyproject.toml ./
COPY service service
RUN PYTHONPATH=/src/build python3 -m pip --python /opt/rafaga/bin/python install --no-cache-dir --no-deps --no-build-isolation . \
    # Packages' own tests are a tenth of the size. Of OpenVINO, other devices and other formats than ONNX are not used.
    && find /opt/rafaga/lib -type d -name tests -prune -exec rm -r {} + \
    && find /opt/rafaga/lib -path '*/openvino/libs/*' \( -name '*_[gn]pu_plugin.so' -o -name cache.json -o -name '*_auto*_plugin.so' \
        -o -name '*_hetero_plugin.so' -o -name '*_frontend.so*' ! -name '*_onnx_*' ! -name '*_ir_*' \) -delete

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

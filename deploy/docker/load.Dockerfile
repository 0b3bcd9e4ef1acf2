# The load generator and the planner, for a Job in the servers' cluster (deploy/kubernetes/load) or any machine that takes
# part in a run. No ONNX Runtime, no models: requests are generated or mounted.
#
# Both images must have the same Python at the same path; only the first needs pip. Name them by digest for a build that
# can be repeated: --build-arg BASE_IMAGE=python:3.11-slim@sha256:... (docs/security.md).
ARG BUILD_IMAGE=python:3.11-slim
ARG BASE_IMAGE=python:3.11-slim

FROM ${BUILD_IMAGE} AS build
WORKDIR /src
RUN python3 -m venv --without-pip /opt/rafaga
# Packages before the source: they change less often. pip refuses a file whose hash is not listed.
COPY requirements/images requirements
RUN python3 -m pip install --no-cache-dir --require-hashes --target build -r requirements/build.txt \
    && python3 -m pip --python /opt/rafaga/bin/python install --no-cache-dir --require-hashes -r requirements/load.txt
COPY README.md LICENSE pyproject.toml ./
COPY service service
RUN PYTHONPATH=/src/build python3 -m pip --python /opt/rafaga/bin/python install --no-cache-dir --no-deps --no-build-isolation . \
    # Packages' own tests are a tenth of the size.
    && find /opt/rafaga/lib -type d -name tests -prune -exec rm -r {} +

FROM ${BASE_IMAGE}
COPY --from=build /opt/rafaga /opt/rafaga
ENV PATH=/opt/rafaga/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# A number, so that Kubernetes can check that it is not root.
USER 65532:65532
WORKDIR /
ENTRYPOINT ["rafaga"]
CMD ["load", "--help"]

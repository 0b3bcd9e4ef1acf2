# The load generator and the planner, for a Job in the servers' cluster (deploy/kubernetes/load) or any machine that takes
# part in a run. No ONNX Runtime, no models: requests are generated or mounted.
#
# Both images must have the same Python at the same path; only the first needs pip.
ARG BUILD_IMAGE=python:3.11-slim
ARG BASE_IMAGE=python:3.11-slim

FROM ${BUILD_IMAGE} AS build
WORKDIR /src
RUN python3 -m venv --without-pip /opt/rafaga
# Packages before the source: they change less often.
COPY pyproject.toml requirements/constraints.txt deploy/docker/requirements.py ./
RUN python3 requirements.py load > requirements.txt \
    && python3 -m pip --python /opt/rafaga/bin/python install --no-cache-dir -c constraints.txt -r requirements.txt
COPY README.md LICENSE ./
COPY service service
RUN python3 -m pip --python /opt/rafaga/bin/python install --no-cache-dir --no-deps . \
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

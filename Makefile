# Start here: `make demo` demonstrates the service, `make test` runs its tests.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt
PROTOS := .venv-protos
TRITON := .venv-triton
SUPPLY := .venv-supply

REPOSITORY ?= repository
MODELS     ?= lenet5-mnist lstm-co2

# Uses data next to the checkout if there is any; otherwise public data is downloaded.
ifneq ($(wildcard ../shared/data),)
export RAFAGA_DATA ?= $(abspath ../shared/data)
endif

ifneq ($(wildcard ../shared/bench/triton_peer.sh),)
export RAFAGA_PEERS ?= $(abspath ../shared/bench)
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test coverage test-grpcio test-gpu tools browser images hashes sbom audit nightly lint format docs bench bench-gpu protos protos-check clean

help:  ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# PyTorch for Linux contains CUDA. TORCH=cpu takes the smaller builds without it, and leaves out the extra `gpu`.
# TORCH_INDEX: the address of PyTorch's CPU index; PyTorch's installation page names it (pip, Linux, CPU).
ifeq ($(TORCH),cpu)
ifndef TORCH_INDEX
$(error TORCH=cpu needs TORCH_INDEX, the address of PyTorch's CPU index: see PyTorch's installation page)
endif
EXTRAS := dev
else
EXTRAS := dev,gpu
endif

setup: $(READY)  ## A virtual environment with everything in it, about 5 GB; with TORCH=cpu TORCH_INDEX=... far less

$(READY): pyproject.toml requirements/constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, {v[0]}.{v[1]} found: make PYTHON=python3.11 ...")'
	@echo "Setting up $(VENV): a few minutes, most of them PyTorch's download."
	@$(PYTHON) -m venv $(VENV)
	$(if $(filter cpu,$(TORCH)),@$(INSTALL) --no-deps --index-url '$(TORCH_INDEX)' torch torchvision)
	@$(INSTALL) -e '.[$(EXTRAS)]'
	@touch $@

demo: setup  ## Export the trained models, serve them, send requests, show the answers, say how to go on
	@$(BIN)/python -m demo

serve: setup  ## Export MODELS into REPOSITORY where they are missing, and serve it until Ctrl-C
	@for model in $(MODELS); do \
	  test -d $(REPOSITORY)/$$model || $(BIN)/python -m export $$model --output $(REPOSITORY) || exit 1; \
	done
	$(BIN)/rafaga serve $(REPOSITORY)

# One worker per core. All tests of a file run in one worker, so that their shared fixtures are made once.
PYTEST = $(BIN)/python -m pytest --durations 25
WORKERS = -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: setup $(TRITON)  ## All tests but the nightly and the GPU ones
	$(PYTEST) $(WORKERS) -m "not nightly and not gpu"

coverage: setup $(TRITON)  ## The same; fails if too little of service/ is covered
	$(PYTEST) $(WORKERS) -m "not nightly and not gpu" --cov

nightly: coverage  ## Those and the long tests, one after the other: some of them measure
	$(PYTEST) -m "nightly and not gpu" --timeout 3600

# The oldest version that the generated stubs run with, and the oldest that the transport knows.
GRPCIO_OLDEST := 1.80.0
GRPCIO_FIRST  := 1.68.1
SMOKE         := tests/integration/test_answers.py tests/integration/test_health.py tests/integration/test_deadlines.py

build/grpcio-%: setup
	@$(BIN)/python -m pip install --quiet --no-deps --target $@ grpcio==$* grpcio-health-checking==$* \
	  grpcio-reflection==$* $(if $(filter $*,$(GRPCIO_FIRST)),'protobuf<7')

test-grpcio: build/grpcio-$(GRPCIO_FIRST) build/grpcio-$(GRPCIO_OLDEST)  ## Smoke tests on old grpcio and on its public API
	PYTHONPATH=build/grpcio-$(GRPCIO_FIRST) $(BIN)/python -m pytest -W default -k 'not public' \
	  tests/unit/server/transport/test_completion_queue.py
	PYTHONPATH=build/grpcio-$(GRPCIO_OLDEST) $(BIN)/python -m pytest $(SMOKE)
	$(BIN)/python -m pytest --public-grpcio $(SMOKE)

tools:  ## As root on Debian: programs that some tests need; without them those tests are skipped
	@apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -qq -y --no-install-recommends nginx-light prometheus kubernetes-client openssl > /dev/null

# Separate, because it is larger than all other tools together.
browser:  ## As root on Debian: headless Chromium, to test the pages with plots
	@apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core > /dev/null

# Takes minutes and 20 GB of disk. readelf (binutils) lists the libraries that the image for GPUs needs.
images: setup  ## As root on Debian: build the images, without a registry or a daemon, and run what is in them
	@apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -qq -y --no-install-recommends buildah debootstrap binutils kubernetes-client > /dev/null
	$(BIN)/python -m pytest -s tests/deploy/test_image_build.py

# What goes into the images: by image, the extras and the build of ONNX Runtime; `build` builds the package itself.
IMAGES := server server-gpu export load
ORT    := $(shell sed -n 's/^onnxruntime-gpu==//p' requirements/constraints.txt)
WHAT_server     := server tracing gpu openvino --replace onnxruntime=onnxruntime==$(ORT)
WHAT_server-gpu := server tracing gpu --replace 'onnxruntime=onnxruntime-gpu[cuda,cudnn]==$(ORT)'
WHAT_export     := export openvino --replace onnxruntime=onnxruntime==$(ORT)
WHAT_load       := load
# One line for each package, with the hashes of all its files; no address of an index.
LOCK = $(SUPPLY)/bin/uv pip compile --quiet --system-certs --generate-hashes --no-header --no-annotate --no-emit-index-url \
  --python-version 3.11 --python-platform x86_64-manylinux_2_28 -c requirements/constraints.txt \
  --output-file $(SUPPLY)/locked.txt $(SUPPLY)/wanted.txt \
  && sed -E ':a; /\\$$/ { N; s/ *\\\n */ /; ba }' $(SUPPLY)/locked.txt > requirements/images/$(1).txt && rm $(SUPPLY)/locked.txt

$(SUPPLY): requirements/supply.txt
	@$(PYTHON) -m venv $@
	@$(SUPPLY)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

hashes: $(SUPPLY)  ## Lock what goes into the images: requirements/images, from pyproject.toml and the constraints
	@$(foreach image,$(IMAGES),$(PYTHON) deploy/docker/requirements.py $(WHAT_$(image)) > $(SUPPLY)/wanted.txt \
	  && $(call LOCK,$(image)) || exit 1;)
	@echo hatchling > $(SUPPLY)/wanted.txt && $(call LOCK,build)

sbom: $(SUPPLY)  ## List what goes into the images: build/sbom, CycloneDX
	@mkdir -p build/sbom
	@$(foreach image,$(IMAGES),PYTHONWARNINGS=ignore $(SUPPLY)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
	  --output-file build/sbom/$(image).json requirements/images/$(image).txt || exit 1;)

audit: $(SUPPLY)  ## Look for known vulnerabilities of what goes into the images; needs the network
	@$(foreach image,$(IMAGES),$(SUPPLY)/bin/pip-audit --strict --disable-pip --require-hashes -r requirements/images/$(image).txt || exit 1;)

# Triton's client, for tests of the server. If it cannot be installed, only those tests are skipped.
$(TRITON): requirements/tritonclient.txt
	@$(PYTHON) -m venv $(TRITON)
	@$(TRITON)/bin/python -m pip install --quiet --disable-pip-version-check -r $< && touch $@ || \
	  { rm -rf $(TRITON); echo "Triton's client could not be installed: its tests will be skipped"; }

lint: setup protos-check  ## Style, types, and that the stubs match the protos
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: setup  ## The documentation as a site in build/site; to read it: python -m http.server -d build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: setup  ## Measure on this machine: about 75 minutes, tables and build/bench.json
	@$(BIN)/python -m bench

# On the machine with the GPU: the virtual environment, or a Python that has PyTorch and GPU_PACKAGES (docs/gpu.md).
GPU_PYTHON   ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_PACKAGES ?= $(if $(wildcard $(BIN)/python),,build/gpu-packages)
GPU_ENV       = PYTHONPATH="service:.:$(GPU_PACKAGES):$$PYTHONPATH"

test-gpu:  ## The tests that need a GPU; without one they are skipped
	$(GPU_ENV) $(GPU_PYTHON) -m pytest -m gpu tests/gpu

bench-gpu:  ## Raw and served throughput on a GPU: tables and build/bench.json
	$(GPU_ENV) $(GPU_PYTHON) -m bench gpu --blocks 3

GPU_MODELS = resnet50 vgg16 googlenet
build/gpu-bench: setup  ## The models that bench-gpu measures, small enough to copy to the GPU machine
	$(BIN)/python -m export $(GPU_MODELS) --weights random --precisions fp32,fp16 --output $@-repository
	$(BIN)/python -m bench.packed $@-repository $@

# Every bundle of the catalogue with all its variants, for test-gpu: slow to export, small to copy. Models with shipped
# weights are trained; the others need no download, because their large weights are left out anyway.
SHIPPED = $(basename $(notdir $(wildcard models/weights/*.safetensors)))
build/gpu-catalogue: setup
	$(BIN)/python -m export $(SHIPPED) --output build/gpu-repository
	$(BIN)/python -m export --all --weights random --output build/gpu-repository
	$(BIN)/python -m bench.packed build/gpu-repository $@

# The packages that are needed in addition to Python 3.12, PyTorch, grpcio, onnx and onnxruntime-gpu, as files to copy.
build/gpu-packages: requirements/constraints.txt
	$(PYTHON) -m pip install --quiet --target $@ --python-version 3.12 --only-binary=:all: --no-deps \
	  -c $< msgspec pillow prometheus-client python-json-logger grpcio-health-checking grpcio-reflection \
	  googleapis-common-protos nvidia-ml-py hdrhistogram rich pygments markdown-it-py mdurl pbr \
	  starlette uvicorn anyio click h11 idna psutil pytest pytest-timeout pluggy iniconfig packaging
	$(PYTHON) -m pip install --quiet --target $@ --no-deps .

# ONNX Runtime for CUDA in pieces, if it cannot be copied as one file; docs/gpu.md says how to join them.
build/gpu-onnxruntime: requirements/constraints.txt
	@rm -rf $@ && mkdir -p $@
	$(PYTHON) -m pip download --quiet --dest $@ --python-version 3.12 --platform manylinux_2_28_x86_64 \
	  --only-binary=:all: --no-deps -c $< onnxruntime-gpu
	cd $@ && split --bytes 60000000 *.whl piece. && ls *.whl > NAME && rm *.whl && sha256sum piece.* > SHA256SUMS

PROTO_FILES := $(wildcard protos/rafaga/*/*.proto)
PROTOC = PATH="$(PROTOS)/bin:$$PATH" $(PROTOS)/bin/python -m grpc_tools.protoc -Iprotos \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTO_FILES)

$(PROTOS): requirements/protos.txt
	@$(PYTHON) -m venv $(PROTOS)
	@$(PROTOS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

protos: $(PROTOS)  ## Generate the stubs in service/rafaga
	@$(call PROTOC,service)

protos-check: $(PROTOS)
	@rm -rf build/protos && mkdir -p build/protos
	@$(call PROTOC,build/protos)
	@same=yes; for package in $(notdir $(wildcard protos/rafaga/*)); do \
	  diff -r -x __init__.py -x __pycache__ build/protos/rafaga/$$package service/rafaga/$$package || same=no; \
	done; test $$same = yes || { echo "the stubs do not match the protos: run 'make protos'"; exit 1; }

clean:
	rm -rf $(VENV) $(PROTOS) $(TRITON) $(SUPPLY) build demo-output

"""PyTorch to verified ONNX bundles: `python -m export`."""

import os
import sys

# ONNX Runtime's Linux builds report usage to Microsoft unless this is set before they are loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# OpenVINO reports that it is imported, unless it does not find this package.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

"""PyTorch to verified ONNX bundles: `python -m export`."""

import os

# ONNX Runtime's Linux builds report usage to Microsoft unless this is set before they are loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

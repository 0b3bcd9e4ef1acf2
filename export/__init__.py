"""PyTorch to verified ONNX bundles: `python -m export`."""

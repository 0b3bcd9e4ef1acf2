"""The inference server: `app.serve(config)` runs it; `app` draws the whole object graph."""

import os

# ONNX Runtime's Linux builds report usage to their maker unless told not to before they are loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

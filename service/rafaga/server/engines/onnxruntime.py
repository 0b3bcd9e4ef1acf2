"""Sessions of ONNX Runtime on the CPU, and the options of all sessions."""

from __future__ import annotations

import onnxruntime as ort

from rafaga import int8

NO_FILES = "/proc/self/fdinfo"
"""A folder where no file can be created."""


def session_options(threads: int, spinning: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # it plans memory per batch size, and sizes vary
    # Bytes may be a file of two formats at once: what was checked is the one of ONNX.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # Models with tensors in other files are refused before. If the check misses one, ONNX Runtime must not find its
    # file in the working directory.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", NO_FILES)
    # Spinning threads take cores from the transport and the decoders.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    int8.configure(options)
    options.log_severity_level = 3
    return options


def create_session(model: bytes, threads: int, spinning: bool = False) -> ort.InferenceSession:
    """A CPU session. The model comes as bytes, so that exactly the hashed bytes run."""
    return ort.InferenceSession(model, session_options(threads, spinning), providers=["CPUExecutionProvider"])

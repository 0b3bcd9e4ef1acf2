"""`rafaga serve` on a terminal: text that fits, addresses, and a command to try."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np

from rafaga.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests import plain
from tests.integration import open_inference
from tests.integration.serving import PATIENCE_S, connected

COLUMNS = 76


def test_a_terminal_gets_text_and_a_banner(tmp_path: Path) -> None:
    """Of a server of one ONNX file, which is asked."""
    file = plain.publish(tmp_path, "net", plain.scaled(2)).rename(tmp_path / "my net.onnx")
    terminal, inside = os.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    command = [sys.executable, "-m", "rafaga", "serve", file.name, "--grpc-port", "0", "--http-port", "0"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAFAGA_")}
    with subprocess.Popen(command, stderr=inside, env=kept, cwd=tmp_path) as server:
        os.close(inside)
        try:
            printed = ""
            while "Ctrl-C stops the server." not in printed:
                printed += os.read(terminal, 65536).decode()
            assert max(map(len, printed.splitlines())) <= COLUMNS
            assert "{" not in printed
            assert re.search(r"^\d\d:\d\d:\d\d device chosen: ", printed, re.MULTILINE)
            assert "WARNING: model ready, UNVERIFIED" in printed
            (grpc,) = re.findall(r"^  gRPC   (localhost:\d+)\r$", printed, re.MULTILINE)
            (http,) = re.findall(r"^  HTTP   (http://localhost:\d+)\r$", printed, re.MULTILINE)
            assert f"  curl {http}/v2/models/my-net\r\n" in printed
            with connected(grpc) as channel:
                request = open_inference.request("my-net", x=np.ones((1, 3), np.float32))
                answer = GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=PATIENCE_S)
            np.testing.assert_array_equal(open_inference.arrays(answer)["y"], np.full((1, 3), 2))
            server.send_signal(signal.SIGINT)
            assert server.wait(PATIENCE_S) == 0
        finally:
            server.kill()
            os.close(terminal)

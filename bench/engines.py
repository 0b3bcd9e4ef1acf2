"""ONNX Runtime and OpenVINO in every precision, alone and served, and what the server chooses by itself.

Alone: one engine with all cores, in its best batch. OpenVINO's own benchmark_app, in that batch and its throughput mode
(several streams), is the outside referee. Servers choose the number of instances. Large models have random weights, so
the server does not choose a precision for them whose loss is unknown: those are served by name.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from bench.blocks import Blocks, Cells, Figures, Plan, column, parts, ratios
from bench.clients import closed_loop
from bench.models import FPN, INT8, LARGE, LENET, LSTM_BUNDLE, SSD, file
from bench.raw import RawModel, RawOpenVino, random_inputs
from bench.servers import Target, rafaga
from bench.tables import Table, spread
from rafaga import Client
from rafaga.server.engines.cpu_count import available_cores

MODELS = (*LARGE, FPN, SSD, LSTM_BUNDLE, LENET)
_BF16 = (*LARGE, FPN, LENET)
_OF = {"fp32": MODELS, "bf16": (*_BF16, SSD), "int8": INT8}
_ORT, _OPENVINO, _REFEREE, _AUTO = "onnxruntime", "openvino", "benchmark_app", "auto"
_SERVED = "served "
_WARM_UP_S = 0.1
_CALLERS = 16  # of an instance, at least
# Without the package that reports its use.
_APP = "import sys; sys.modules['openvino_telemetry'] = None; from openvino.tools.benchmark.main import main; main()"
_FORCED = ((_ORT, "fp32", MODELS), (_OPENVINO, "bf16", _BF16), (_ORT, "int8", LARGE), (_OPENVINO, "int8", LARGE))


@contextmanager
def cells(plan: Plan) -> Iterator[Cells]:
    """Half the time for engines alone. What the server chooses is measured once, if it is also served by name."""
    threads, alone_s = available_cores(), plan.seconds / 2
    measures: dict[str, Callable[[], Figures]] = {}
    with ExitStack() as stack:
        rows = {}
        for precision, models in _OF.items():
            for model in models:
                path = file(plan.repository, model, precision)
                raws: dict[str, Callable[[], RawModel]] = {_OPENVINO: partial(RawOpenVino, path, threads, precision)}
                if precision != "bf16":
                    raws[_ORT] = partial(RawModel, path, threads)
                for engine, raw in raws.items():
                    rows[model, precision, engine] = best = raw().best_rows()
                    measures[f"{model}/{precision}/{engine}"] = partial(_alone, raw, best, alone_s)
                best = rows[model, precision, _OPENVINO]
                referee = partial(benchmark_app, path, precision, best, alone_s)
                measures[f"{model}/{precision}/{_REFEREE}"] = referee
        for engine, precision, models in (*_FORCED, (_AUTO, _AUTO, MODELS)):
            options = ["--device", "cpu", "--engine", engine, "--precision", precision, "--instances", "auto"]
            # Callers in a closed loop wait: refusals would only add requests.
            target = stack.enter_context(rafaga(plan.repository, models, *options, "--max-queue-wait-ms", "60000"))
            with Client(target.address) as client:
                for model in models:
                    found = client.model(model)
                    # One full batch waits for each instance while another runs.
                    callers = found.instances * max(_CALLERS, 2 * rows[model, found.precision, found.engine])
                    cell = f"{model}/{found.precision}/{_SERVED}{found.engine}"
                    if engine == _AUTO:
                        measures[f"{model}/{_AUTO}/{found.engine} {found.precision}"] = dict
                    if cell not in measures:
                        measures[cell] = partial(_served, target, model, callers, found.instances, plan.seconds)
        yield {name: measures[name] for name in sorted(measures, key=lambda name: MODELS.index(name.split("/")[0]))}


def _served(target: Target, model: str, callers: int, instances: int, seconds: float) -> Figures:
    return closed_loop(target, model, callers, seconds) | {"instances": instances, "cores": available_cores()}


def _alone(opened: Callable[[], RawModel], rows: int, seconds: float) -> Figures:
    """Loaded for each measurement: all models in all engines do not fit into memory beside the servers."""
    raw = opened()
    raw.measure(rows, _WARM_UP_S)
    return raw.measure(rows, seconds)


def benchmark_app(path: Path, precision: str, rows: int, seconds: float) -> Figures:
    """OpenVINO's own load generator, in its throughput mode, with the inputs of the raw measurements.

    Raises RuntimeError when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs, shapes = [], []
        for name, array in random_inputs(RawModel(path, 1).session, rows).items():
            np.save(Path(folder) / f"{name}.npy", array)
            inputs.append(f"{name}:{folder}/{name}.npy")
            shapes.append(f"{name}{list(array.shape)}".replace(" ", ""))
        command = [sys.executable, "-c", _APP, "-m", str(path), "-d", "CPU"]
        command += ["-hint", "throughput", "-t", str(math.ceil(seconds))]
        command += ["-infer_precision", "bf16" if precision == "bf16" else "f32"]
        command += ["-data_shape", ",".join(shapes), "-i", ",".join(inputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    found = [re.search(pattern, done.stdout) for pattern in (r"Count:\s+(\d+)", r"Duration:\s+([\d.]+) ms")]
    if done.returncode or not all(found):
        raise RuntimeError(f"benchmark_app failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    runs, duration_ms = (float(match[1]) for match in found if match)
    return {"rate": 1e3 * rows * runs / duration_ms, "rows": rows}


def tables(blocks: Blocks) -> list[Table]:
    return [_rates(blocks), _compared(blocks), _chosen(blocks)]


def _rates(blocks: Blocks) -> Table:
    columns = (_ORT, _OPENVINO, _REFEREE, f"{_SERVED}{_ORT}", f"{_SERVED}{_OPENVINO}")
    rows = [
        (f"{model} {precision}", *(spread(column(blocks, f"{model}/{precision}/{what}", "rate")) for what in columns))
        for model in parts(blocks, 0)
        for precision in _OF
        if model in _OF[precision]
    ]
    return Table(("rows/s", *columns), rows)


def _compared(blocks: Blocks) -> Table:
    """Each engine against ONNX Runtime in fp32, alone and served; and served against alone, also as if the client,
    which runs on the same cores, used none of their time."""
    rows = []
    for model in parts(blocks, 0):
        for precision in (precision for precision in _OF if model in _OF[precision]):
            for engine in (_ORT, _OPENVINO):
                raw, served = (f"{model}/{precision}/{how}{engine}" for how in ("", _SERVED))
                pairs = ((raw, f"{model}/fp32/{_ORT}"), (served, f"{model}/fp32/{_SERVED}{_ORT}"), (served, raw))
                if raw in blocks[0] and (engine, precision) != (_ORT, "fp32"):
                    shown = (spread(ratios(blocks, *pair), 2) for pair in pairs)
                    without_client = spread(_without_client(blocks, served, raw), 2)
                    instances = blocks[0].get(served, {}).get("instances", "–")
                    rows.append((f"{model} {precision} {engine}", *shown, without_client, str(instances)))
    titles = (
        "alone ÷ fp32 onnxruntime",
        "served ÷ that, served",
        "served ÷ alone",
        "less the client's CPU",
        "instances",
    )
    return Table(("", *titles), rows)


def _without_client(blocks: Blocks, served: str, raw: str) -> list[float]:
    """Empty if it is not served."""
    pairs = [(block[served], block[raw]) for block in blocks if served in block]
    return [s["rate"] / r["rate"] * s["cores"] / (s["cores"] - s["client_cores"]) for s, r in pairs]


def _chosen(blocks: Blocks) -> Table:
    rows = []
    for cell in (name for name in blocks[0] if name.split("/")[1] == _AUTO):
        model, _, chosen = cell.split("/")
        engine, precision = chosen.split()
        served = f"{model}/{precision}/{_SERVED}{engine}"
        bases = (f"{model}/fp32/{_SERVED}{_ORT}", f"{model}/{precision}/{engine}")
        shown = (spread(ratios(blocks, served, base), 2) for base in bases)
        rows.append((model, chosen, spread(column(blocks, served, "rate")), *shown))
    return Table(("chosen by the server", "", "rows/s", "÷ fp32 onnxruntime served", "÷ alone"), rows)

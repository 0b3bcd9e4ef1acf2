"""The demonstration, step by step. Exit code 0: every step succeeded with the expected accuracy."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from demo import batches, bundles, co2, digits
from demo.bundles import ROOT, ExportFailed
from demo.page import Page, bars, drawings
from demo.server import ServerFailed, ServerProcess
from rafaga import Client, ModelNotFound, RafagaError
from rafaga.addresses import GRPC_PORT, HTTP_PORT
from rafaga.cli._banner import demo_commands
from rafaga.cli._demo import FOLDER

MODELS = (digits.MODEL, co2.MODEL)
DRAWN = 3  # digits that fit into 80 columns


class UnexpectedAnswer(Exception):
    """An answer is worse than expected."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description="From trained weights to served answers.")
    parser.add_argument("--repository", type=Path, default=ROOT / "repository", help="folder of bundles (%(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output", help="folder for pictures (%(default)s)")
    args = parser.parse_args()
    page = Page()
    with tempfile.TemporaryDirectory(prefix="rafaga-demo-") as temporary:
        server = ServerProcess(args.repository, Path(temporary) / "server.log")
        try:
            export(page, args.repository)
            serve(page, server)
            with Client(server.address) as client:
                classify(page, client)
                refuse(page, client)
                forecast(page, client, args.output / "co2-forecast.png")
            show_batches(page, server)
            stop(page, server)
            go_on(page, args.repository)
        except (ExportFailed, ServerFailed, UnexpectedAnswer, RafagaError, OSError) as error:
            page.failure(f"{type(error).__name__}: {error}")
            if log := server.last_log_lines():
                print(f"\nThe server's log ended with:\n{log}", file=sys.stderr)
            return 1
        finally:
            server.kill()
    return 0


def export(page: Page, repository: Path) -> None:
    page.section("Export: PyTorch weights become verified ONNX bundles")
    missing = [name for name in MODELS if bundles.published(repository, name) is None]
    if missing:
        page.line(f"$ python -m export {' '.join(missing)} --output {_relative(repository)}")
        bundles.export(repository, missing)
    for name in MODELS:
        found = bundles.published(repository, name)
        if found is None:
            raise ExportFailed(f"{name} is missing in {repository}")
        variant = found.variants[0]
        measured = ", ".join(f"{m.name} {m.value:.4g} on {m.dataset}" for m in variant.metrics[:1])
        error = f"{variant.parity.max_absolute_error:.1e}"
        page.line(f"{name} v{found.version}: {found.parameters} parameters, {measured}; max error to PyTorch {error}")


def serve(page: Page, server: ServerProcess) -> None:
    page.section("Serve: every bundle is verified and warmed up before the port opens")
    server.start()
    with Client(server.address) as client:
        client.wait_until_ready(60)
        for model in client.models():
            page.line(f"{model!r}")
    page.line(f"gRPC on {server.address}, metrics on {server.metrics_url}")


def classify(page: Page, client: Client) -> None:
    data = digits.load()
    page.section(f"Classify: {len(data)} digits, one request each, {digits.CALLERS} concurrent callers")
    answers = digits.ask(client, data)
    accuracy = answers.accuracy(data)
    page.line(f"{data.source}\n")
    shown = _worth_showing(data, answers)
    captions = [f"is {data.labels[i]}, answer {answers.indices[i]}" for i in shown]
    page.line(drawings(data.images[shown, 2:-2, 2:-2], captions))
    page.line()
    right = int((answers.indices == data.labels).sum())
    page.line(f"correct:    {right} of {len(data)} = {accuracy:.2%}")
    percentiles = ", ".join(f"p{p:g} {answers.latency_ms(p):.1f} ms" for p in (50, 90, 99))
    page.line(f"latency:    {percentiles}, measured by the callers")
    page.line(f"throughput: {answers.per_second:.0f} requests/s, callers on the same machine")
    if accuracy < data.required_accuracy:
        raise UnexpectedAnswer(f"expected {data.required_accuracy:.0%} correct, got {accuracy:.2%}")


def refuse(page: Page, client: Client) -> None:
    page.section("Request an unknown model: the error is typed and says what to do")
    try:
        client.classify(b"no image", model="lenet-6")
    except ModelNotFound as error:
        page.line(f"ModelNotFound: {error}")
    else:
        raise UnexpectedAnswer("an unknown model gave an answer")


def forecast(page: Page, client: Client, picture: Path) -> None:
    outlook = co2.ask(client)
    result = outlook.forecast
    page.section(f"Forecast: CO2 at Mauna Loa, {result.horizon} months after the end of the input")
    lower, upper = result.interval(0.8)
    month = co2.months(len(outlook.history) + result.horizon)[-result.horizon :]
    page.line(f"{'month':8} {'median':>8}  {'80 % interval':>16}  {'truth':>8}")
    for step in sorted({0, 5, 11, 17, 23} & set(range(result.horizon))):
        interval = f"{lower[step]:.1f} to {upper[step]:.1f}"
        page.line(f"{month[step]:8} {result.median[step]:8.1f}  {interval:>16}  {outlook.truth[step]:8.1f}")
    page.line()
    page.line(
        f"median off by {outlook.error_ppm:.2f} ppm on average; last year repeated: {outlook.naive_error_ppm:.2f}"
    )
    page.line(f"truth inside the 80 % interval in {outlook.inside} of {result.horizon} months")
    co2.draw(outlook, picture)
    page.line(f"drawn to {_relative(picture)}")
    if outlook.error_ppm >= outlook.naive_error_ppm:
        raise UnexpectedAnswer("the forecast is worse than repeating the last year")


def show_batches(page: Page, server: ServerProcess) -> None:
    page.section(f"Batches: rafaga_batch_size of {digits.MODEL}, from /metrics")
    sizes = batches.read(batches.scrape(server.metrics_url), digits.MODEL)
    page.line(bars([(f"{label} rows", count, f"{count} batches") for label, count in sizes.labelled()]))
    page.line(f"\n{sizes.rows} rows in {sizes.batches} batches, {sizes.mean:.1f} on average")


def stop(page: Page, server: ServerProcess) -> None:
    page.section("Stop: SIGTERM, accepted requests are answered first")
    code = server.stop()
    page.line(f"the server ended with exit code {code}")
    if code != 0:
        raise ServerFailed(f"expected exit code 0, got {code}")


def go_on(page: Page, repository: Path) -> None:
    page.section("Go on: serve the models again, until Ctrl-C")
    program, http = str(_relative(Path(sys.executable).parent / "rafaga")), f"http://localhost:{HTTP_PORT}"
    usual = repository.resolve() == ROOT / "repository"
    page.line("$ make serve" if usual else f"$ {program} serve {_relative(repository)}")
    page.line(f"\nThen open {http}/ in a browser, or paste into another terminal:")
    for command in demo_commands(FOLDER, f"localhost:{GRPC_PORT}", http, program):
        page.line(f"$ {command}")


def _worth_showing(data: digits.Digits, answers: digits.DigitAnswers) -> list[int]:
    """Some digits with correct answers, and one with a wrong answer if there is one."""
    wrong = [int(i) for i in (answers.indices != data.labels).nonzero()[0][:1]]
    right = [int(i) for i in (answers.indices == data.labels).nonzero()[0][: DRAWN - len(wrong)]]
    return right + wrong


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main())

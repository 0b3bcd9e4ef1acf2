"""Three replicas are updated one by one under constant load, then one of them is killed: no call fails, no answer is
wrong, whichever way the callers reach them."""

from __future__ import annotations

import asyncio
import shutil
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from socketserver import BaseRequestHandler, UDPServer

import grpc
import numpy as np
import pytest

from rafaga import AsyncClient, Classification, Client, InvalidImage, Keepalive
from rafaga.v1 import vision_pb2
from tests import bundles
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import PATIENCE_S, Stubs, connected, eventually, free_port
from tests.process.nginx import nginx
from tests.process.running import Process

_TYPE_A = 1
_FLAGS = 0x8580  # an answer, authoritative, no error
_POINTER_TO_THE_QUESTION = 0xC00C

IMAGES = [messages.random_digits(seed) for seed in range(8)]
EXPECTED = [bundles.classify(image)[0] for image in IMAGES]
# Long enough for balancers to be told by hand.
DRAIN_DELAY_S = 0.5
ACCEPTED = 20

HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
"""All of 127.0.0.0/8 is this machine, so replicas can share a port, as the pods behind one name do."""


class Replica:
    """One place where a server runs, and runs again."""

    def __init__(self, host: str, port: int, arguments: Sequence[str]) -> None:
        self.address = f"{host}:{port}"
        self._arguments = ("--host", host, "--grpc-port", str(port), "--threads", "1", *arguments)
        self.process = Process(*self._arguments)

    def start_again(self) -> None:
        """On the port it had before. Returns once it serves."""
        self.process = Process(*self._arguments)
        self.process.wait_for("serving")


@contextmanager
def fleet(repository: Path, *arguments: str, replicas: int = len(HOSTS)) -> Iterator[list[Replica]]:
    """So many that serve."""
    port = free_port()
    places = [Replica(host, port, ("--repository", str(repository), *arguments)) for host in HOSTS[:replicas]]
    try:
        for place in places:
            place.process.wait_for("serving")
        yield places
    finally:
        for place in places:
            place.process.end(signal.SIGKILL)


class Load:
    """`callers` threads, each of which asks `calls_per_s` times a second, whatever became of the call before.

    `ask` gets the number of the caller, and returns whether the answer was right. `outcomes`: "OK", "WRONG" or the
    error, of every call so far.
    """

    def __init__(self, ask: Callable[[int], bool], *, callers: int = 4, calls_per_s: float = 3.0) -> None:
        self.outcomes: list[str] = []
        self._ask = ask
        self._callers = callers
        self._interval_s = 1 / calls_per_s
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(callers)

    def __enter__(self) -> Load:
        for number in range(self._callers):
            self._pool.submit(self._run, number)
        self.go_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    def go_on(self) -> None:
        """Returns when every caller may have asked several times more."""
        enough = len(self.outcomes) + 3 * self._callers
        eventually(lambda: len(self.outcomes) >= enough, "the load goes on")

    def _run(self, number: int) -> None:
        due = time.monotonic() + number * self._interval_s / self._callers
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due += self._interval_s
            try:
                self.outcomes.append("OK" if self._ask(number) else "WRONG")
            except Exception as error:
                self.outcomes.append(repr(error))


@contextmanager
def naming(addresses: Sequence[str]) -> Iterator[str]:
    """Answers every question with `addresses` (those of type A) or with nothing. Gives what gRPC clients connect to,
    without the port."""

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            query, socket = self.request
            end = query.index(b"\0", 12) + 5  # a header of 12 bytes, the name, type and class
            (kind,) = struct.unpack(">H", query[end - 4 : end - 2])
            found = addresses if kind == _TYPE_A else ()
            records = [
                struct.pack(">HHHIH", _POINTER_TO_THE_QUESTION, _TYPE_A, 1, 0, 4) + IPv4Address(ip).packed
                for ip in found
            ]
            header = query[:2] + struct.pack(">HHHHH", _FLAGS, 1, len(found), 0, 0)
            socket.sendto(header + query[12:end] + b"".join(records), self.client_address)

    with UDPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"dns://127.0.0.1:{server.server_address[1]}/rafaga.test"
        server.shutdown()
        thread.join()


def right(answer: Classification, number: int) -> bool:
    found = {p.index: p.probability for p in answer.predictions}
    return np.allclose([found[i] for i in range(bundles.CLASSES)], EXPECTED[number % 8], atol=1e-5)


def by(client: Client) -> Callable[[int], bool]:
    return lambda number: right(client.classify(IMAGES[number % 8][0], model="digits", top_k=10), number)


@contextmanager
def by_asyncio(address: str) -> Iterator[Callable[[int], bool]]:
    """One client and its event loop, shared by all callers."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    client = AsyncClient(address)

    def ask(number: int) -> bool:
        call = client.classify(IMAGES[number % 8][0], model="digits", top_k=10)
        return right(asyncio.run_coroutine_threadsafe(call, loop).result(PATIENCE_S), number)

    try:
        yield ask
    finally:
        asyncio.run_coroutine_threadsafe(client.close(), loop).result(PATIENCE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def by_plain_grpc(channel: grpc.Channel) -> Callable[[int], bool]:
    """As generated stubs ask: no refusal is tried again."""
    requests = [messages.classify(image).SerializeToString() for image in IMAGES]
    method = channel.unary_unary("/rafaga.v1.Vision/Classify")

    def ask(number: int) -> bool:
        reply = vision_pb2.ClassifyResponse.FromString(method(requests[number % 8], timeout=PATIENCE_S))
        return np.allclose(messages.probabilities(reply)[0], EXPECTED[number % 8], atol=1e-5)

    return ask


def stop_with_work_to_do(replica: Replica) -> None:
    """Calls for the slow model wait in its queue: it drains for a while, and answers them."""
    with connected(replica.address) as channel:
        method = channel.unary_unary("/rafaga.v1.Vision/Classify")
        request = messages.classify(IMAGES[0], "slow").SerializeToString()
        accepted = [method.future(request, timeout=PATIENCE_S) for _ in range(ACCEPTED)]
        eventually(lambda: accepted[0].done(), "it works on them")
        assert replica.process.end() == 0
        assert [call.code() for call in accepted] == [grpc.StatusCode.OK] * ACCEPTED


def test_neither_an_update_nor_a_crash_fails_a_call(slow_repository: Path, tmp_path: Path) -> None:
    """1. Each replica in turn gets SIGTERM, drains, ends, and starts again on its port. 2. One gets SIGKILL, and starts
    again: clients without the SDK may notice. Clients send requests throughout."""
    settings = ("--drain-delay-s", str(DRAIN_DELAY_S), "--max-queue-wait-ms", "60000")
    with ExitStack() as stack:
        replicas = stack.enter_context(fleet(slow_repository, *settings))
        addresses = [replica.address for replica in replicas]
        listed = ",".join(addresses)
        hosts, ports = zip(*(address.split(":") for address in addresses), strict=True)
        name = stack.enter_context(naming(hosts))

        def client(address: str) -> Client:
            return stack.enter_context(Client(address))

        by_the_sdk = {
            # So many that three tries in a row would sometimes hit the draining one.
            "list": Load(by(client(listed)), callers=12),
            "asyncio": Load(stack.enter_context(by_asyncio(listed))),
            "dns": Load(by(client(f"{name}:{ports[0]}"))),
        }
        loads = by_the_sdk
        rotated = None
        if shutil.which("nginx"):
            by_the_sdk["nginx"] = Load(by(client(stack.enter_context(nginx(tmp_path / "fixed", addresses)).address)))
            rotated = stack.enter_context(nginx(tmp_path / "rotated", addresses))
            plain = Load(by_plain_grpc(stack.enter_context(grpc.insecure_channel(rotated.address))))
            loads = by_the_sdk | {"nginx with updated addresses, without the SDK": plain}
        for load in loads.values():
            stack.enter_context(load)

        def rotate(*over: str) -> None:
            if rotated is not None:
                rotated.balance(over)

        def all_go_on(ways: dict[str, Load]) -> None:
            for way, load in ways.items():
                load.go_on()
                assert set(load.outcomes) == {"OK"}, way

        for replica in replicas:
            rotate(*(other for other in addresses if other != replica.address))
            stop_with_work_to_do(replica)
            replica.start_again()
            rotate(*addresses)
        all_go_on(loads)
        replicas[1].process.end(signal.SIGKILL)
        all_go_on(by_the_sdk)
        replicas[1].start_again()
        all_go_on(by_the_sdk)
    if rotated is None:
        pytest.skip("nginx (Debian: nginx) is not installed: only the SDK's ways were tested")


def test_nginx_lets_large_messages_and_streams_through(repository: Path, tmp_path: Path) -> None:
    """More than a megabyte, where nginx stops unless told otherwise, in one message and in many of one stream."""
    with (
        fleet(repository, replicas=1) as (replica,),
        nginx(tmp_path / "nginx", [replica.address]) as before,
        Client(before.address) as client,
        connected(before.address) as channel,
    ):
        with pytest.raises(InvalidImage):  # the server's word, not nginx's
            client.classify(bytes(2_000_000), model="digits")
        requests = [oip.images(np.concatenate([image] * 100)) for image in IMAGES] * 2
        assert sum(len(request.SerializeToString()) for request in requests) > 2**20
        replies = list(oip.stub(Stubs(channel)).ModelStreamInfer(iter(requests), timeout=PATIENCE_S))
        assert [bool(reply.error_message) for reply in replies] == [False] * len(requests)


def test_a_replica_that_hangs_is_left(repository: Path) -> None:
    """A process that stands still neither answers nor closes its connections: keepalive finds out."""
    with (
        fleet(repository, replicas=2) as (frozen, other),
        Client(f"{frozen.address},{other.address}", timeout_s=30, keepalive=Keepalive(1.0, 1.0)) as client,
    ):
        ask = by(client)
        assert all(ask(number) for number in range(10)), "both are connected"
        frozen.process.send(signal.SIGSTOP)
        assert all(ask(number) for number in range(10))

"""`python -m dpcomm info --group`: under torchrun on one host and on two, without it, with ranks that fail or do not
come. How it reads for many ranks: test_group_report.py."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import cases
import pytest
import stand_in
import torch
import torch.distributed as dist
from networks import Hosts, network

import dpcomm
from dpcomm import board, chosen, group_info
from dpcomm.__main__ import main
from dpcomm.errors import ArgumentError, CommTimeoutError, Error, InternalError, PeerLostError, UnsupportedError
from dpcomm.group_report import Report

INFO = ("-m", "dpcomm", "info", "--group")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
START_S = 40.0  # for Python and torch, several at a time on few cores
LIMIT_S = 30.0
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}

pytestmark = pytest.mark.timeout(150)


class Ended:
    """What became of some processes."""

    def __init__(self, processes: list[subprocess.Popen[str]], limit_s: float) -> None:
        until = time.monotonic() + limit_s
        self.status: list[int] = []
        self.out: list[str] = []
        self.err: list[str] = []
        try:
            for process in processes:
                out, err = process.communicate(timeout=max(until - time.monotonic(), 0.1))
                self.status.append(process.returncode)
                self.out.append(out)
                self.err.append(err)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def start(command: tuple[str, ...], env: dict[str, str]) -> subprocess.Popen[str]:
    outer = {name: value for name, value in os.environ.items() if name not in board.VARIABLES}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env={**outer, **NO_GPU, **env}, stdout=pipe, stderr=pipe, text=True)


def torchrun(ranks: int, *options: str) -> Ended:
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node", str(ranks))
    return Ended([start((*launcher, *INFO, "--timeout", f"{LIMIT_S:g}", *options), {})], START_S + LIMIT_S)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def processes(
    nranks: int,
    ranks: dict[int, dict[str, str]],
    *options: str,
    limit_s: float = LIMIT_S,
    program: tuple[str, ...] = INFO,
) -> Ended:
    """Some ranks of nranks, started by hand: rank 0 keeps the store."""
    port = str(free_port())
    fixed = {"WORLD_SIZE": str(nranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = (sys.executable, *program, "--timeout", f"{limit_s:g}", *options)
    started = [start(command, {**fixed, "RANK": str(r), "LOCAL_RANK": str(r), **env}) for r, env in ranks.items()]
    return Ended(started, START_S + limit_s)


# --- under torchrun --------------------------------------------------------------------------------------------------


def test_four_ranks_of_one_host_share_memory() -> None:
    done = torchrun(4)
    assert done.status == [0], done.err
    (page,) = done.out
    assert page.startswith("4 ranks on 1 host, data on cpu; dpcomm ")
    for rank in range(4):
        others = chosen.spans(r for r in range(4) if r != rank)
        assert len(re.findall(rf"^ +{rank}  \S+ +\d+  cpu .* shared memory: {others}$", page, re.MULTILINE)) == 1
    for row in ("        0123", "rank 0  -SSS", "rank 1  S-SS", "rank 2  SS-S", "rank 3  SSS-", "S: shared memory"):
        assert page.splitlines().count(row) == 1
    assert page.count("choice: communicator #1 of 4 ranks: engine shm on ") == 1
    assert "the sum of 1000 float32 values is right on every rank" in page
    assert re.search(r"^  shm        in use$", page, re.MULTILINE)
    assert re.search(r"^  p2p        no: CUDA not available", page, re.MULTILINE)
    assert re.search(r"^  two_level  no: needs several hosts, and this is one$", page, re.MULTILINE)
    assert re.search(r"^  gloo       usable where asked for: engine='gloo'$", page, re.MULTILINE)


def test_json_says_the_same() -> None:
    done = torchrun(2, "--json", "--device", "cpu")
    assert done.status == [0], done.err
    made = json.loads(done.out[0])  # of one rank: a second would make it no JSON
    assert (made["nranks"], made["device"], made["hosts"], made["engine"]) == (2, "cpu", [[0, 1]], "shm")
    assert made["links"] == ["-S", "S-"]
    assert made["legend"] == {"S": "shared memory"}
    assert made["said"].startswith("communicator #1 of 2 ranks: engine shm on ")
    assert made["why"] in made["said"]
    assert made["error"] is None
    assert made["notes"] == []
    assert set(made["engines"]) == {"shm", "p2p", "gloo", "two_level", "torch", "nccl"}
    first, second = made["ranks"]
    assert first["pid"] != second["pid"]
    assert first["how"] == ["own", "shared memory"]
    assert first["processors"] == sorted(os.sched_getaffinity(0))
    assert first["versions"] == {"dpcomm": dpcomm.__version__, "torch": torch.__version__, "NCCL": "none"}


@pytest.fixture(scope="module")
def net() -> Iterator[Hosts]:
    with network(2) as made:
        yield made


def on_two_hosts(net: Hosts, per_host: tuple[int, int], *options: str) -> str:
    """What is printed, by one rank: these are namespaces of this machine, with its name and boot id."""
    started = []
    for host, ranks in enumerate(per_host):
        where = ("--nnodes", "2", "--node-rank", str(host), "--master-addr", net.address(0), "--master-port", "29500")
        launcher = (*net.command(host), *TORCHRUN, *where, "--nproc-per-node", str(ranks))
        started.append(start((*launcher, *INFO, "--timeout", f"{LIMIT_S:g}", *options), {}))
    done = Ended(started, START_S + LIMIT_S)
    assert done.status == [0, 0], done.err
    (page,) = [out for out in done.out if out]
    return page


def test_two_hosts_are_told_apart_though_they_have_one_name(net: Hosts) -> None:
    """Two ranks on host 0, one on host 1."""
    page = on_two_hosts(net, (2, 1))
    name = socket.gethostname()
    assert page.startswith("3 ranks on 2 hosts, data on cpu; ")
    pairs = [re.search(rf"{name}/(\d) .* cpu .*  (\S.*)$", line) for line in page.splitlines() if f"{name}/" in line]
    assert sorted(pair.group(1) for pair in pairs if pair) == ["1", "1", "2"]
    # torchrun decides which host has rank 0.
    if "rank 0  -SN" in page:
        rows = ("rank 0  -SN", "rank 1  S-N", "rank 2  NN-")
    else:
        rows = ("rank 0  -NN", "rank 1  N-S", "rank 2  NS-")
    for row in rows:
        assert row in page.splitlines()
    assert "S: shared memory; N: network" in page
    text = " ".join(page.split())
    assert "choice: communicator #1 of 3 ranks: engine two_level between 2 hosts (" in text
    assert "no shared memory between rank 0 on " in text
    assert "gloo is for hosts with one rank each" in text
    assert "shm no: needs one host, and these are 2" in text


def test_two_ranks_on_each_of_two_hosts_take_two_levels(net: Hosts) -> None:
    made = json.loads(on_two_hosts(net, (2, 2), "--json"))
    assert (made["nranks"], made["engine"], made["hosts"]) == (4, "two_level", [[0, 1], [2, 3]])
    assert made["links"] == ["-SNN", "S-NN", "NN-S", "NNS-"]
    assert made["said"].startswith("communicator #1 of 4 ranks: engine two_level between 2 hosts (")
    assert made["notes"] == []
    verdicts = made["engines"]
    assert verdicts["two_level"] == "in use"
    assert verdicts["shm"] == "no: needs one host, and these are 2"
    assert verdicts["gloo"] == "usable where asked for: engine='gloo'"


def test_one_rank_on_each_of_two_hosts_takes_gloo(net: Hosts) -> None:
    made = json.loads(on_two_hosts(net, (1, 1), "--json"))
    assert (made["nranks"], made["engine"], made["hosts"]) == (2, "gloo", [[0], [1]])
    assert made["links"] == ["-N", "N-"]
    assert "two_level ranks that share one" in made["said"]
    assert made["engines"]["gloo"] == "in use"
    assert made["engines"]["two_level"] == "no: needs ranks that share a host, and here each has its own"


def test_what_torchrun_started_and_cannot_have_is_said_once() -> None:
    done = torchrun(2, "--device", "cuda")
    assert done.status != [0]
    said = "[dpcomm:ARGUMENT] rank 0, stage 'validate': device='cuda:0': CUDA not available"
    assert (done.out[0] + done.err[0]).count(said) == 1
    assert done.out[0].startswith("2 ranks on 1 host, data on cuda; ")  # what was found before
    assert "no GPU" in done.out[0]
    assert "choice:" not in done.out[0]


# As INFO, in a process that takes the extension of stand_in.py.
ON_STAND_IN = """
import os, sys
from rank_process import take_stand_in
take_stand_in(os.environ["STAND_IN_NATIVE"])
from dpcomm.__main__ import main
sys.argv[1:1] = ["info", "--group"]
main()
"""


@pytest.mark.timeout(900)  # it may wait for the compiler
@pytest.mark.skipif(bool(stand_in.WHY_NOT), reason=stand_in.WHY_NOT)
@pytest.mark.parametrize(("machine", "how", "letter"), [("", "ipc", "P"), ("peers=none", "pinned host memory", "H")])
def test_gpus_are_taken_where_every_rank_has_one(machine: str, how: str, letter: str) -> None:
    """Three ranks on two GPUs of the stand-in."""
    env = {**stand_in.environment(machine), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = processes(3, dict.fromkeys(range(3), env), "--json", program=("-c", ON_STAND_IN))
    assert done.status == [0] * 3, done.err
    made = json.loads("".join(done.out))
    assert (made["device"], made["engine"], made["hosts"]) == ("cuda", "p2p", [[0, 1, 2]])
    assert made["links"] == [f"-{letter}{letter}", f"{letter}-{letter}", f"{letter}{letter}-"]
    assert made["ranks"][0]["how"] == ["own", how, how]
    assert [rank["device"].split()[0] for rank in made["ranks"]] == ["cuda:0", "cuda:1", "cuda:0"]
    assert "engine p2p on " in made["said"]
    assert [("Pinned host memory is used" in note) for note in made["notes"]] == [True] * (letter == "H")


# --- ranks that fail, or do not come ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_a_rank_that_fails_ends_all_and_is_said_once(options: tuple[str, ...]) -> None:
    began = time.monotonic()
    done = processes(3, {0: {}, 1: {"DPCOMM_ARENA_MB": "zero"}, 2: {}}, *options)
    assert time.monotonic() - began < START_S
    assert done.status == [1, 1, 1], done.err
    (page,) = [out for out in done.out if out]
    if options:
        error = json.loads(page)["error"]
        assert error["code"] == "ARGUMENT"
        assert "DPCOMM_ARENA_MB" in error["message"]
    else:
        assert page.startswith("3 ranks on 1 host")
        (line,) = [line for err in done.err for line in err.splitlines() if "[dpcomm:" in line]
        assert "[dpcomm:ARGUMENT]" in line
        assert "DPCOMM_ARENA_MB" in line


@pytest.mark.parametrize(
    ("present", "words"), [(0, "ranks [1] of 2 did not come to step 'hello'"), (1, "no store at ")]
)
def test_without_one_rank_it_ends_in_time(present: int, words: str) -> None:
    began = time.monotonic()
    done = processes(2, {present: {"LOCAL_RANK": "0"}}, limit_s=5.0)
    assert time.monotonic() - began < START_S
    assert done.status == [1]
    (line,) = [line for line in done.err[0].splitlines() if "[dpcomm:" in line]
    assert line.startswith("[dpcomm:TIMEOUT] ")
    assert words in line


HANGS = "import sys, time; from dpcomm import group_info, __main__; group_info.connect = lambda *_: time.sleep(100); {}"


def test_what_waits_in_a_library_is_ended() -> None:
    begin = "sys.argv = ['dpcomm', 'info', '--group', '--timeout', '5']; __main__.main()"
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = Ended([start((sys.executable, "-c", HANGS.format(begin)), env)], START_S)
    assert done.status == [1]
    assert "info --group did not end in 5 s" in done.err[0]


def together(work: list[Callable[[], Any]]) -> list[Any]:
    """What each returned or raised, each in a thread of its own."""
    results: list[Any] = [None] * len(work)

    def run(at: int) -> None:
        try:
            results[at] = work[at]()
        except Error as error:
            results[at] = error

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
        assert not thread.is_alive()
    return results


def boards(nranks: int, seconds: float = 5.0) -> list[board.Board]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    return [board.Board(store, rank, nranks, time.monotonic() + seconds) for rank in range(nranks)]


def test_all_ranks_learn_a_steps_values_or_its_first_error() -> None:
    all_three = boards(3)

    def fail() -> None:
        raise UnsupportedError("not this one")

    def stumble() -> None:
        raise KeyError("no dpcomm error") from None

    good = together([lambda b=b: b.share("one", lambda: {"rank": b.rank}) for b in all_three])  # type: ignore[misc]
    assert good == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3
    works = [lambda: 0, fail, fail]
    bad = together([lambda b=b, w=w: b.share("two", w) for b, w in zip(all_three, works, strict=True)])  # type: ignore[misc]
    assert [type(one) for one in bad] == [UnsupportedError] * 3
    assert {str(one) for one in bad} == {"[dpcomm:UNSUPPORTED] not this one"}
    with pytest.raises(KeyError):  # a fault of this program stays one
        all_three[0].share("three", stumble)
    assert [b.first("speaker") for b in all_three] == [True, False, False]


def test_ranks_that_do_not_come_to_a_step_are_named() -> None:
    first, _, third = boards(3, seconds=2.0)
    results = together([lambda: first.share("one", lambda: 0), lambda: third.share("one", lambda: 2)])
    for error in results:
        assert isinstance(error, CommTimeoutError)
        assert error.waiting_for == (1,)
        assert "ranks [1] of 3 did not come to step 'one'" in str(error)


def test_a_store_that_goes_away_is_a_lost_peer() -> None:
    class Gone:
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("connection reset")

    with pytest.raises(PeerLostError, match=r"rank 1: the torch store failed at step 'one': connection reset"):
        board.Board(Gone(), 1, 2, time.monotonic() + 5.0).share("one", lambda: 0)


# --- the command line ------------------------------------------------------------------------------------------------


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["dpcomm", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_without_torchrun_it_says_how_to_start_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in board.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    said = refused(monkeypatch, capsys, "info --group")
    assert "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set, which torchrun sets" in said
    assert "\n  torchrun --standalone --nproc-per-node 2 -m dpcomm info --group\n" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("info --device cpu", "options of info --group"),
        ("info --timeout 5", "options of info --group"),
        ("info --group --timeout 1", "expected 5 seconds or more"),
        ("info --group --timeout -1", "expected more than 0"),
        ("info --group --timeout nan", "expected more than 0"),
        ("info --group --device tpu", "invalid choice"),
    ],
)
def test_bad_options_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    assert words in refused(monkeypatch, capsys, arguments)


GOOD = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_torchruns_environment_is_read() -> None:
    assert board.place(GOOD) == (1, 2, 1, "node0", 29500, False, "0")
    more = {**GOOD, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3"}
    assert board.place(more)[5:] == (True, "3")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"RANK": "2"}, "RANK=2, WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two': expected a number"),
        ({"RANK": "-1"}, "RANK='-1': expected a number"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR not set"),
    ],
)
def test_an_environment_that_is_no_torchruns_is_refused(wrong: dict[str, str], words: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(words)):
        board.place({**GOOD, **wrong})


# --- what it finds ---------------------------------------------------------------------------------------------------


def test_a_wrong_sum_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    (alone,) = cases.local(1)
    with alone:
        assert "right on every rank" in group_info._check(alone)
        monkeypatch.setattr(alone, "allreduce", lambda x: x.add_(1))
        with pytest.raises(InternalError, match=r"rank 0: the sum of 1000 numbers over all ranks is wrong"):
            group_info._check(alone)


def test_a_host_whose_memory_cannot_be_shared_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UnsupportedError("no memory")

    monkeypatch.setattr(group_info, "_communicator", refuse)
    report = Report(3, hosts=[[0, 1], [2]])
    (first, _, third) = boards(3)
    assert group_info._hows(first, report, {"engine": "gloo"}, "cpu") == ["own", "network", "network"]
    assert report.notes == ["engine shm among ranks 0 1: [dpcomm:UNSUPPORTED] no memory"]
    assert group_info._hows(third, report, {"engine": "gloo"}, "cpu") == ["network", "network", "own"]
    assert len(report.notes) == 1  # a rank alone on its host has nothing to try
    # Of those that engine two_level has, memory is known to be shared.
    between = {"engine": "two_level", "hosts": [[0, 1], [2]]}
    assert group_info._hows(first, report, between, "cpu") == ["own", "shared memory", "network"]
    assert group_info._hows(third, report, between, "cpu") == ["network", "network", "own"]
    peers = ["own", "ipc", "pinned host memory"]
    assert group_info._hows(first, report, {"engine": "p2p", "peers": peers}, "cuda") == peers

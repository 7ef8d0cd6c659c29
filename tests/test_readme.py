"""The pages run: each Python block of README.md and docs/ prints what stands below it, and what they name exists.

A block follows `<!-- run: N -->`: it is run by N processes, under torchrun if N is more than one. `<!-- run: 2 ddp -->`
puts the two names that the page leaves to the reader in front; `gpu` takes a GPU for each process.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

import dpcomm
from dpcomm import environment

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(r"<!-- run: (\d+)( ddp| gpu)? -->\n```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.S)
BEFORE_DDP = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Linear(64, 1))

def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        model(torch.full((4, 8), 1.0 + dist.get_rank())).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
"""
BEFORE_GPU = """
import torch

net = torch.nn.Linear(8, 1)
"""
AFTER_DDP = """
dpcomm.verify(model)
assert hook.stats()["calls"] >= 3
assert hook.last_error is None
"""


@dataclass(frozen=True)
class Block:
    """A Python block of a page, and what it must print (in any order of ranks)."""

    page: str
    nprocs: int
    code: str
    output: str
    gpu: bool = False  # one for each process


def blocks() -> list[Block]:
    found = []
    for page, name in zip(PAGES, NAMES, strict=True):
        for nprocs, kind, code, output in BLOCK.findall(page.read_text()):
            whole = {"": code, " ddp": BEFORE_DDP + code + AFTER_DDP, " gpu": BEFORE_GPU + code}[kind]
            found.append(Block(name, int(nprocs), whole, output, kind == " gpu"))
    return found


def run(block: Block, folder: Path) -> list[str]:
    """The lines that the block prints, those of all ranks together in order of the alphabet."""
    script = folder / "block.py"
    script.write_text(block.code)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(block.nprocs)]
    torchrun += ["--redirects", "1", "--log-dir", str(folder)]  # lines of two ranks in one pipe may run into each other
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *(torchrun if block.nprocs > 1 else []), str(script)],
        env={"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = [file.read_text() for file in folder.rglob("stdout.log")] if block.nprocs > 1 else [done.stdout]
    return sorted(line for text in printed for line in text.splitlines())


def named(block: Block) -> object:
    marks = [pytest.mark.gpu] if block.gpu else []
    return pytest.param(block, marks=marks, id=f"{block.page}-{block.nprocs}procs{'-gpu' * block.gpu}")


@pytest.mark.parametrize("block", [named(block) for block in blocks()])
def test_python_blocks_print_what_the_page_says(block: Block, tmp_path: Path) -> None:
    if block.gpu and torch.cuda.device_count() < block.nprocs:
        pytest.skip(f"{block.nprocs} GPUs are needed, and torch sees {torch.cuda.device_count()}")
    assert run(block, tmp_path) == sorted(block.output.splitlines())


def test_every_python_block_is_run() -> None:
    written = sum(page.read_text().count("```python\n") for page in PAGES)
    assert len(blocks()) == written
    assert {b.page for b in blocks()} >= {"README.md", "docs/numerics.md"}


def test_a_block_that_fails_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ValueError: planted"):
        run(Block("none", 1, "raise ValueError('planted')", ""), tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_links_and_named_tests_exist(name: str) -> None:
    page = ROOT / name
    text = page.read_text()
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [path for path, _, _ in links if path and not (page.parent / path).exists()]
    for path, _, anchor in links:
        target = page.parent / path if path else page
        if anchor and target.exists() and anchor not in anchors(target.read_text()):
            missing.append(f"{path}#{anchor}")
    for file, test in re.findall(r"`((?:tests|csrc|dpcomm|docs|benchmarks|examples)/[\w./*]+)(?:::(\w+))?`", text):
        files = list(ROOT.glob(file))
        if not files or (test and f"def {test}(" not in files[0].read_text()):
            missing.append(f"{file}::{test}" if test else file)
    assert not missing, f"{name} names what does not exist: {missing}"


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_tables_of_variables_and_errors_are_complete() -> None:
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^\| `(DPCOMM_\w+)` \|", text, re.M)) == set(environment.KNOWN)
    listed = dict(re.findall(r"^\| `(\w+Error)` \| ([A-Z0-9_]+) \|", text, re.M))
    assert listed == {kind.__name__: code for code, kind in dpcomm.errors.CLASSES.items()}


def test_the_picture_is_what_its_script_draws() -> None:
    assert load(ROOT / "docs" / "pictures.py").picture() == (ROOT / "docs" / "step.svg").read_text()


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

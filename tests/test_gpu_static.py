"""benchmarks/gpu_static.py without a compiler: what it reads, on recorded lines; its comparison; its formulas."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import gpu_code
import gpu_sass
import gpu_static
from gpu_code import KERNELS, Kernel, Usage
from gpu_sass import Moved
from gpu_static import SMS, Rows, Traffic

DIRECT = "_ZN6dpcomm3p2pINS_4cuda4Fp16INS1_7Float32EEELNS_9AlgorithmE1EEEvNS_7P2pCallE"
WHOLE = "_ZN6dpcomm3p2pINS_4cuda4NoneINS1_5WholeIlEEEELNS_9AlgorithmE3EEEvNS_7P2pCallE"
FP16 = Kernel("fp16", "float32", "direct")

# nvcc 13.0, -Xptxas=-v
LOG = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{DIRECT}' for 'sm_90'
ptxas info    : Function properties for {DIRECT}
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 121 registers, used 1 barriers, 64 bytes smem
ptxas info    : Compile time = 902.011 ms
ptxas info    : Compiling entry function '{WHOLE}' for 'sm_120'
ptxas info    : Function properties for {WHOLE}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 140 registers, used 1 barriers, 2816 bytes cmem[0]
"""

PTX = f"""\
.version 9.0
.visible .entry {DIRECT}(
\t.param .align 8 .b8 P[8]
)
.maxntid 512, 1, 1
{{
\tld.v4.f32 \t{{%f1, %f2, %f3, %f4}}, [%rd1];
\t@%p1 ld.f32 \t%f5, [%rd1+16];
\tld.v4.u64 \t{{%rd2, %rd3, %rd4, %rd5}}, [%rd1];
\tst.v2.f64 \t[%rd2], {{%fd1, %fd2}};
\tret;
}}
.visible .entry {WHOLE}(
)
{{
\tret;
}}
"""

# nvdisasm 13, shortened: a put of codec fp16. The values are read for the exponent (whole: two loads, else one by one),
# then once more if the group is not finite, then encoded. An outer loop goes round it.
SASS = f"""\
\t.section\t.text.{DIRECT},"ax",@progbits
{DIRECT}:
.text.{DIRECT}:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.64.STRONG.SYS R2, desc[UR6][R2.64] ;
.L_x_1:
        /*0020*/                   LD.E.64 R4, desc[UR6][R2.64] ;
.L_x_2:
        /*0030*/               @P1 BRA `(.L_x_3) ;
        /*0040*/                   LD.E R40, desc[UR6][R64.64] ;
        /*0050*/              @!P2 LD.E R41, desc[UR6][R64.64+0x4] ;
        /*0060*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*0070*/                   LD.E.128 R40, desc[UR6][R64.64] ;
        /*0080*/                   LD.E.128 R44, desc[UR6][R64.64+0x10] ;
.L_x_4:
        /*0090*/                   REDUX.MAX.S32 UR4, R41 ;
        /*00a0*/              @!P4 BRA `(.L_x_5) ;
        /*00b0*/                   ATOM.E.ADD.64.STRONG.GPU P4, RZ, desc[UR6][R30.64+0x100], R40 ;
        /*00c0*/                   LD.E.128 R40, desc[UR6][R64.64] ;
.L_x_5:
        /*00d0*/                   ST.E.128 desc[UR6][R44.64], R40 ;
        /*00e0*/               @P3 ST.E.U8 desc[UR6][R46.64], R91 ;
        /*00f0*/              @!P4 BRA P5, `(.L_x_2) ;
        /*0100*/               @P0 BRA `(.L_x_1) ;
        /*0110*/                   EXIT ;
.L_x_6:
        /*0120*/                   BRA `(.L_x_6);
//--------------------- .nv.shared.reserved.0 --------------------------
"""


def test_names_of_all_kernels() -> None:
    assert len(KERNELS) == len(set(map(str, KERNELS))) == 27
    assert gpu_code.parse_name(DIRECT) == FP16
    assert gpu_code.parse_name(WHOLE) == Kernel("none", "int64", "ring")
    with pytest.raises(ValueError, match="not a p2p kernel"):
        gpu_code.parse_name(DIRECT.replace("3p2p", "4pass"))


def test_reads_ptxas() -> None:
    assert gpu_code.parse_usage(LOG) == {
        ("90", FP16): Usage(8, 16, 121, 64),
        ("120", Kernel("none", "int64", "ring")): Usage(0, 0, 140, 0),
    }


def test_reads_ptx() -> None:
    parts = gpu_code.parse_ptx(PTX)
    assert parts.keys() == {FP16, Kernel("none", "int64", "ring")}
    ops = gpu_code.opcodes(parts[FP16])
    assert ops == {"ld.v4.f32": 1, "ld.f32": 1, "ld.v4.u64": 1, "st.v2.f64": 1, "ret": 1}
    assert (gpu_code.whole(ops, "ld"), gpu_code.whole(ops, "st")) == (3, 1)
    assert gpu_code.whole(ops, "ld", "u") == 2


def read_sass(text: str) -> gpu_sass.Code:
    ((name, body),) = gpu_sass.functions(text)
    assert gpu_code.parse_name(name) == FP16
    return gpu_sass.read_code(body, FP16.element_bytes)


def test_reads_machine_code() -> None:
    code = read_sass(SASS)
    assert code.code_bytes == 0x130
    assert (code.loads16, code.stores16, code.small_loads, code.small_stores) == (3, 1, 3, 1)
    assert code.loops == [Moved(read=32, written=16, narrow=2)]  # not 48: that way is for groups with a NaN


def test_machine_code_with_a_second_look_at_the_values_says_so() -> None:
    again = SASS.replace(".L_x_5:\n", ".L_x_5:\n        /*00c8*/                   LD.E.128 R40, desc[UR6][R64.64] ;\n")
    assert read_sass(again).loops == [Moved(read=48, written=16, narrow=2)]


def test_narrowed_machine_code_is_seen() -> None:
    code = read_sass(SASS.replace("ST.E.128", "ST.E.64"))
    assert (code.stores16, code.small_stores) == (0, 2)
    assert code.loops == [Moved(read=32, written=0, narrow=2)]


# --- comparison ------------------------------------------------------------------------------------------------------


def one_row() -> Rows:
    code = read_sass(SASS)
    row = gpu_static.make_row(FP16, "90", Usage(0, 0, 121, 0), gpu_code.parse_ptx(PTX)[FP16], code)
    return {"90": {str(FP16): row}}


def test_equal_tables_are_not_worse() -> None:
    rows = one_row()
    assert gpu_static.compare(rows, json.loads(json.dumps(rows))) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"registers": 121 + 9}, "registers 121 -> 130"),
        ({"spill_bytes": 4}, "spill_bytes 4"),
        ({"stack_bytes": 8}, "stack_bytes 8"),
        ({"shared_bytes": 16}, "shared_bytes 0 -> 16"),
        ({"ctas_an_sm": 0}, "ctas_an_sm 1 -> 0"),
        ({"loads16": 2, "small_loads": 5}, "loads16 3 -> 2, small_loads 3 -> 5"),
        ({"stores16": 0, "small_stores": 2}, "stores16 1 -> 0, small_stores 1 -> 2"),
        ({"code_bytes": 400}, "code_bytes 304 -> 400"),
        ({"loops": [[48, 16, 2]]}, "loop 1 (read, written, narrow) [32, 16, 2] -> [48, 16, 2]"),
        ({"loops": [[32, 16, 3]]}, "loop 1 (read, written, narrow) [32, 16, 2] -> [32, 16, 3]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_worse_is_named(changes: dict[str, object], line: str) -> None:
    was = json.loads(json.dumps(one_row()))
    now = copy.deepcopy(was)
    now["90"][str(FP16)].update(changes)
    assert gpu_static.compare(was, now) == [f"sm_90 fp16-float32-direct: {line}"]


@pytest.mark.parametrize(
    "changes", [{"registers": 121 + 8}, {"registers": 90}, {"loads16": 2}, {"loops": [[16, 16, 2]]}], ids=str
)
def test_slack_and_what_is_better_pass(changes: dict[str, object]) -> None:
    was = json.loads(json.dumps(one_row()))
    now = copy.deepcopy(was)
    now["90"][str(FP16)].update(changes)
    assert gpu_static.compare(was, now) == []


def test_kernels_do_not_come_or_go_unnoticed() -> None:
    rows = one_row()
    assert gpu_static.compare(rows, {"90": {}}) == ["sm_90 fp16-float32-direct: gone"]
    assert gpu_static.compare({}, rows) == ["sm_90 fp16-float32-direct: new, --update takes it in"]


def test_committed_table_is_whole() -> None:
    """Every kernel on every architecture, no spills, and the Markdown is made of it."""
    document = json.loads(gpu_static.RESULTS.read_text())
    assert list(document["rows"]) == list(gpu_code.ARCHITECTURES)
    for rows in document["rows"].values():
        assert list(rows) == list(map(str, KERNELS))
        assert not any(row["spill_bytes"] or row["stack_bytes"] for row in rows.values())
        assert all(row["ctas_an_sm"] >= 1 and row["loops"] for row in rows.values())
    assert gpu_static.RESULTS.with_suffix(".md").read_text() == gpu_static.to_markdown(document)


# --- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("registers", "threads", "architecture", "ctas"),
    [
        (128, 512, "90", 1),  # the whole register file
        (129, 512, "90", 0),
        (64, 512, "90", 2),
        (32, 512, "90", 4),  # 2048 threads
        (32, 512, "120", 3),  # 1536
        (168, 256, "100", 1),  # 12 warps
        (16, 32, "90", 32),
        (16, 32, "120", 24),
    ],
)
def test_ctas_an_sm(registers: int, threads: int, architecture: str, ctas: int) -> None:
    assert gpu_static.ctas_an_sm(registers, threads, SMS[architecture]) == ctas


def played(kernel: Kernel, nranks: int) -> Traffic:
    """The same by going through the schedule of rank 0, a chunk at a time, as csrc/core does."""
    scaled = kernel.codec == "fp16"
    user = float(kernel.element_bytes)
    code = kernel.code_bytes + (1 / 256 if scaled else 0)
    moved = dict.fromkeys(Traffic._fields, 0.0)

    def move(part: float, **counts: int) -> None:
        for name, n in counts.items():
            moved[name] += part * n * (user if name.startswith("user") else code)

    part = 1 / nranks
    if kernel.algorithm == "direct":
        for owner in range(nranks):  # give
            if owner != 0:
                move(part, user_read=1, peers_written=1)
            elif scaled:
                move(part, user_read=1, slots_written=1)
        for r in range(nranks):  # reduce: my values from user memory, unless the codec loses bits
            move(part, **({"slots_read": 1} if r != 0 or scaled else {"user_read": 1}))
        move(part, user_written=1, peers_written=nranks - 1)
        for _ in range(nranks - 1):  # take
            move(part, slots_read=1, user_written=1)
    elif kernel.algorithm == "oneshot":
        for r in range(nranks):  # put, and the same for the sum
            if r != 0:
                move(1, user_read=1, peers_written=1)
            elif scaled:
                move(1, user_read=1, slots_written=1)
            move(1, **({"slots_read": 1} if r != 0 or scaled else {"user_read": 1}))
        move(1, user_written=1)
    else:
        for turn in range(2 * nranks - 1):
            move(part, peers_written=int(turn < 2 * nranks - 2), slots_read=int(turn > 0))
            move(part, user_read=int(turn < nranks), user_written=int(turn >= nranks - 1))
    return Traffic(**moved)


@pytest.mark.parametrize("nranks", [2, 3, 4, 8])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_bytes_by_formula_are_those_of_the_schedule(kernel: Kernel, nranks: int) -> None:
    assert gpu_static.traffic(kernel, nranks) == pytest.approx(played(kernel, nranks))


@pytest.mark.parametrize(("registers", "status", "words"), [(121, 0, "nothing is worse"), (130, 1, "121 -> 130")])
def test_the_command_fails_where_something_is_worse(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    registers: int,
    status: int,
    words: str,
) -> None:
    now = {a: one_row()["90"] for a in gpu_code.ARCHITECTURES}
    was = {a: {str(k): now[a][str(FP16)] for k in KERNELS} for a in now}
    monkeypatch.setattr(gpu_code, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(gpu_static, "find_nvdisasm", lambda: "nvdisasm")
    monkeypatch.setattr(gpu_static, "version_of", lambda tool: "13")
    monkeypatch.setattr(gpu_code, "compile_all", lambda: gpu_code.Compiled({}, {}, {}, {}))
    monkeypatch.setattr(gpu_static, "make_rows", lambda compiled: copy.deepcopy(was))
    table = tmp_path / "table.json"
    assert gpu_static.main(["--update", "--json", str(table)]) == 0
    was["90"][str(FP16)] = {**was["90"][str(FP16)], "registers": registers}
    assert gpu_static.main(["--json", str(table)]) == status
    assert words in capsys.readouterr().out


def test_a_unit_is_compiled_again_when_what_it_includes_changes() -> None:
    found = {path.name for path in gpu_code.included_by(gpu_code.CSRC / "cuda" / "p2p_fp16.cu")}
    assert {"p2p_fp16.cu", "p2p_kernels.cuh", "p2p_call.h", "portable.h", "codec_fp16.h", "ring.h"} <= found
    assert not found & {"p2p_half.cu", "p2p_engine.h"}


def test_without_a_disassembler_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_code, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(gpu_static, "find_nvdisasm", lambda: None)
    assert gpu_static.main([]) == 2
    assert "pip install nvidia-cuda-nvdisasm" in capsys.readouterr().err


def test_without_a_compiler_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_code, "find_nvcc", lambda: None)
    assert gpu_static.main([]) == 2
    assert "set CUDA_HOME" in capsys.readouterr().err

"""Constants of cpu.py, fitted to measurements. Written by `python benchmarks/plan_fit.py`; do not edit.

GLOO: 188 rows of benchmarks/results, network.json.
SHM: 240 rows of benchmarks/results, python-2ranks.json, python-4ranks.json, python-8ranks.json.
"""

from dpcomm.plan.cpu import Carried, Gloo, Shm

GLOO = Gloo(
    ours=Carried(call_us=101, message_us=221, sent_us=562, coded_us=357),
    native=Carried(call_us=167, message_us=435, sent_us=670, coded_us=1060),
    overlap=2.49,
    crowding=0.684,
)
SHM = Shm(
    call_us=2.16,
    handover_us=0.794,
    wake_us=18.5,
    cached_us=14,
    memory_us=25.3,
    coded_us=20.8,
    cache_mib=23.4,
    crowding=1.49,
)
# Nine tenths of those rows are predicted to within this.
GLOO_ERROR = 0.17
SHM_ERROR = 0.38

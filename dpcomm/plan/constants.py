"""Constants of cpu.py, fitted to measurements. Written by `python benchmarks/plan_fit.py`; do not edit.

GLOO: 416 rows of benchmarks/results, network.json.
SHM: 240 rows of benchmarks/results, python-2ranks.json, python-4ranks.json, python-8ranks.json.
"""

from dpcomm.plan.cpu import Carried, Gloo, Shm

GLOO = Gloo(
    ours=Carried(message_us=125, sent_us=467, coded_us=155),
    native=Carried(message_us=222, sent_us=491, coded_us=798),
    header_us=105,
    call_us=203,
    wake_us=737,
    inside=2.01,
    overlap=2.49,
)
SHM = Shm(
    call_us=2.16,
    handover_us=0.794,
    wake_us=18.5,
    cached_us=14,
    memory_us=25.3,
    coded_us=20.7,
    cache_mib=23.4,
    crowding=1.49,
)
# Nine tenths of those rows are predicted to within this.
GLOO_ERROR = 0.18
SHM_ERROR = 0.38

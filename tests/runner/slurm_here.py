"""A SLURM of one node on the loopback interface, from Debian's `slurmctld` and `slurmd`.

Where they are only unpacked (`dpkg -x`), SLURM_ROOT names the folder.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIG = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort=46817
SlurmdPort=46818
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=300
SchedulerParameters=bf_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120 MaxTime=60 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def found() -> bool:
    """Whether SLURM's programs are here, and this process may start them."""
    return bool(_program("slurmctld")) and os.geteuid() == 0


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start SLURM; yield the environment in which its commands find it."""
    root = Path(os.environ.get("SLURM_ROOT", "/"))
    (library,) = (root / "usr/lib").glob("*/slurm-wlm")
    config = folder / "slurm.conf"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = platform.node()
    config.write_text(CONFIG.format(host=host, plugins=library, folder=folder))
    paths = os.pathsep.join([str(root / "usr/bin"), os.environ["PATH"]])
    libraries = os.pathsep.join(map(str, (library.parent, library)))
    env = {**os.environ, "SLURM_CONF": str(config), "PATH": paths, "LD_LIBRARY_PATH": libraries}
    step = _program("slurmstepd")
    commands = [[_program("slurmctld"), "-D"], [_program("slurmd"), "-D", "-d", step]]
    with (folder / "log").open("w") as log:
        daemons = [subprocess.Popen(c, env=env, stdout=log, stderr=log) for c in commands]
        try:
            _wait_for_node(env)
            yield env
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(30)


def _program(name: str) -> str:
    root = os.environ.get("SLURM_ROOT", "/")
    places = os.pathsep.join([os.environ["PATH"], "/usr/sbin", str(Path(root, "usr/sbin"))])
    return shutil.which(name, path=places) or shutil.which(f"{name}-wlm", path=places) or ""


def _wait_for_node(env: dict[str, str]) -> None:
    for _ in range(120):
        told = subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True)
        if "idle" in told.stdout:
            return
        time.sleep(0.5)
    raise AssertionError("SLURM does not come up")

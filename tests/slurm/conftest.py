"""A real SLURM of two nodes on this host, with a partition whose jobs push those of the other one out."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsvlm.train.launch import free_port

SLURM = Path(__file__).resolve().parents[2] / "slurm"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol")
LIMIT = 240  # seconds that a state is waited for
CONF = """
ClusterName=dsvlm-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""  # cred_expire is also how long a requeued job has to wait before it starts again


class Cluster:
    """Its daemons, and the commands of its users."""

    def __init__(self, directory: Path):
        self.directory, self.daemons = directory, []
        (directory / "state").mkdir()
        conf = directory / "slurm.conf"
        ports = [free_port() for _ in range(3)]
        conf.write_text(CONF.format(host=socket.gethostname(), directory=directory, ports=ports))
        self.environ = dict(os.environ) | {
            "SLURM_CONF": str(conf), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        self.daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.daemon("slurmd", "-D", "-N", node)
        self.wait(lambda: self.run("sinfo", "-h", "-o", "%D %t") == "2 idle", "two idle nodes")

    def daemon(self, *command: str) -> None:
        with (self.directory / "daemons.log").open("a") as log:
            self.daemons.append(subprocess.Popen(command, env=self.environ, stdout=log, stderr=log))

    def run(self, *command: str) -> str:
        """A command's output; its errors only when it has none, as while the controller starts."""
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, cwd=self.directory)
        return (done.stdout or done.stderr).strip()

    def submit(self, script: str, *arguments: str, options=(), environ=None) -> str:
        command = ["sbatch", "--parsable", *options, str(SLURM / script), *arguments]
        environ = self.environ | (environ or {})
        return subprocess.check_output(command, env=environ, cwd=self.directory, text=True).strip()

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number)))

    def wait(self, condition, what: str) -> None:
        end = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < end, f"no {what} within {LIMIT} s:\n{self.log()}"
            time.sleep(0.1)

    def log(self) -> str:
        return "\n".join(f"{p.name}:\n{p.read_text()[-3000:]}" for p in sorted(self.directory.glob("*.out")))

    def close(self) -> None:
        self.run("scancel", "--user=root")
        end = time.monotonic() + 30
        while self.run("squeue", "-h") and time.monotonic() < end:
            time.sleep(0.1)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            daemon.wait(30)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurmctld slurmd slurm-client")
    if os.getuid():
        pytest.skip("slurmd runs jobs of other users, so this test must run as root")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()

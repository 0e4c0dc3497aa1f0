"""Tests of sweep.sh as an array job of a real Slurm, which a fixture starts in a temporary folder."""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

import records
import runs

pytestmark = pytest.mark.slurm
ROOT = Path(runs.__file__).parent
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
EPOCHS = 30


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(what: str, condition, seconds: float = 300):
    """Return the first true value of `condition()`; fail the test if there is none within `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    pytest.fail(f"in vain for {seconds:.0f} s: {what}")


@pytest.fixture(scope="module")
def cluster():
    """Yield the environment variables for Slurm's commands while munged, slurmctld and slurmd run."""
    if missing := [
        tool for tool in TOOLS if not shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    ]:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install slurm-wlm munge")
    if os.geteuid():
        pytest.skip("needs root, as Slurm's daemons do")
    home = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    home.chmod(0o755)
    munge = pwd.getpwnam("munge")
    (home / "munge").mkdir(mode=0o755)
    key = home / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for path in (home / "munge", key):
        os.chown(path, munge.pw_uid, munge.pw_gid)
    (home / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={home}/munge/socket,cred_expire=5
SlurmUser=root
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=1
MailProg=/bin/true
KillWait=30
NodeName=node NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    environment = os.environ | {"SLURM_CONF": str(home / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    environment["PATH"] += ":/usr/sbin:/sbin"
    files = [
        f"--{name}={home}/munge/{name.split('-')[0]}"
        for name in ("key-file", "socket", "pid-file", "log-file")
    ]
    as_munge = ["setpriv", f"--reuid={munge.pw_uid}", f"--regid={munge.pw_gid}", "--clear-groups"]
    daemons = []

    def daemon(*command: str) -> None:
        log = open(home / f"{len(daemons)}.log", "w")  # noqa: SIM115, the daemon writes to it
        daemons.append(
            subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        )

    def answers(*command: str) -> bool:
        return not subprocess.run(command, env=environment, capture_output=True).returncode

    try:
        daemon(*as_munge, "munged", "--foreground", "--force", f"--seed-file={home}/munge/seed", *files)
        wait_for("munged", lambda: (home / "munge" / "socket").exists(), 20)
        daemon("slurmctld", "-D", "-i")
        wait_for("slurmctld", lambda: answers("scontrol", "ping"), 20)
        daemon("slurmd", "-D", "-N", "node")
        wait_for("slurmd", lambda: "idle" in slurm(environment, "sinfo", "--noheader", "--format=%T"), 60)
        yield environment
    except BaseException:
        for log in sorted(home.glob("*.log")):
            print(f"{log.name}: {log.read_text()[-2000:]}")
        raise
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
        for process in reversed(daemons):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)


def slurm(environment: dict, *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def epochs_trained(log: str) -> list[int]:
    return [int(epoch) for epoch in re.findall(rf"epoch (\d+)/{EPOCHS} ", log)]


def test_an_array_job_runs_a_cell_per_task_and_resumes_when_requeued(cluster, tiny_folder, tmp_path):
    prepared, out = tiny_folder.parent / "prepared", tmp_path / "runs"
    options = ["--data", str(tiny_folder), "--data-dir", str(prepared), "--out", str(out), "--device", "cpu"]
    options += ["--batch-size", "32", "--epochs", str(EPOCHS), "--milestones", "20", "--no-compile"]
    grid = {"ARCHS": "resnet8", "MODES": "bn_only random", "SEEDS": "0 1"}
    submit = [
        "sbatch",
        "--parsable",
        "--array=0-3",
        f"--output={tmp_path}/%a.out",
        ROOT / "sweep.sh",
        *options,
    ]
    array = slurm(cluster | grid, *map(str, submit)).strip()

    def field(task: int, name: str) -> str:
        shown = slurm(cluster, "scontrol", "show", "job", f"{array}_{task}")
        return re.search(rf"\b{name}=(\S+)", shown)[1]

    def epochs(task: int) -> int:
        folders = sorted(out.glob(f"*-{('bn_only', 'random')[task // 2]}-s{task % 2}-*"))
        return len(list(records.read_epochs(folders[0]))) if folders else 0

    # Slurm sends SIGTERM to a requeued job, and SIGUSR1 to a job near its time limit, which requeues itself.
    for task, command in ((0, ["scontrol", "requeue"]), (3, ["scancel", "--batch", "--signal=USR1"])):
        wait_for(f"task {task} to train", lambda task=task: epochs(task) > 2)
        slurm(cluster, *command, f"{array}_{task}")
        wait_for(f"task {task} to be queued again", lambda task=task: field(task, "Restarts") == "1", 60)
    for task in range(4):
        state = wait_for(
            f"task {task} to end",
            lambda task=task: (
                (state := field(task, "JobState")) not in ("PENDING", "RUNNING", "COMPLETING") and state
            ),
            600,
        )
        output = (tmp_path / f"{task}.out").read_text()
        assert state == "COMPLETED", output

        mode, seed = ("bn_only", "random")[task // 2], task % 2
        (folder,) = out.glob(f"*-{mode}-s{seed}-*")
        assert runs.Run(folder).status == "done"
        restarted = task in (0, 3)
        assert field(task, "Restarts") == str(int(restarted))
        started = re.findall(r"^started (\S+)$", output, re.MULTILINE)
        assert started == [folder.name] * (1 + restarted), "a task runs its own cell, and no other"
        log = (out / "logs" / f"{folder.name}.log").read_text()
        trained = epochs_trained(log)  # the signal may have prevented the line of a saved epoch
        assert sorted(set(trained)) == trained, "no epoch is trained twice"
        assert [row.epoch for row in records.read_epochs(folder)] == list(range(1, EPOCHS + 1))
        assert ("continuing" in log) == restarted


def test_a_task_past_the_grid_is_refused(cluster, tiny_folder, tmp_path):
    submit = [
        "sbatch",
        "--wait",
        "--parsable",
        "--array=27",
        f"--output={tmp_path}/%a.out",
        str(ROOT / "sweep.sh"),
    ]
    ended = subprocess.run(submit, env=cluster, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "there is no cell 27 in the grid: give --array=0-26" in (tmp_path / "27.out").read_text()

"""Runs of a training script, each in processes of its own that need not import anything again.

Started as a program it reads one job a line, forks a process for each rank, and answers with the
exit codes and what was printed: libraries take ten seconds to import, a tiny run takes one.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Runs:
    """A program that forks runs; use as a context."""

    def __enter__(self):
        self.program = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_):
        self.program.stdin.close()
        self.program.wait(60)

    def __call__(self, script, *argv, processes=1, kill=None, **environment):
        """Exit codes and prints of the ranks.

        `kill` = (signal, ranks, seconds after the output folder holds losses.csv).
        """
        job = {"script": script, "argv": [str(arg) for arg in argv], "processes": processes,
               "kill": kill, "environment": environment}
        self.program.stdin.write(json.dumps(job) + "\n")
        self.program.stdin.flush()
        return json.loads(self.program.stdout.readline())


def fork(modules, job, rank, port, log):
    pid = os.fork()
    if pid:
        return pid
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    if job["processes"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                       "WORLD_SIZE": str(job["processes"]), "MASTER_PORT": str(port)}
    os.environ |= {"ACCELERATE_USE_CPU": "true"} | job["environment"]
    code = 1
    try:
        sys.argv = [job["script"], *job["argv"]]
        modules[job["script"]].main(job["argv"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(modules, job, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [(folder / f"{rank}.log").open("w+") for rank in range(job["processes"])]
    pids = [fork(modules, job, rank, port, log) for rank, log in enumerate(logs)]
    codes = {}

    def collect(block):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, 0 if block else os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        return len(codes) == len(pids)

    if job["kill"]:
        number, ranks, seconds = job["kill"]
        output = Path(job["argv"][job["argv"].index("--output") + 1])
        while not (output / "losses.csv").exists() and not collect(False):
            time.sleep(0.005)
        time.sleep(seconds)
        collect(False)
        for pid in {pids[rank] for rank in ranks} - set(codes):
            os.kill(pid, number)
    collect(True)
    printed = []
    for log in logs:
        log.seek(0)
        printed.append(log.read())
    return {"codes": [codes[pid] for pid in pids], "printed": printed}


def main():
    sys.path[:0] = [str(ROOT / "unit1"), str(ROOT / "unit2")]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                # libraries print where they like
    import finetune_model
    import train_unconditional
    modules = {"train_unconditional": train_unconditional, "finetune_model": finetune_model}
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            answer = run(modules, json.loads(line), Path(folder))
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

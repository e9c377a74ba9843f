"""Start drivers of a study that have imported everything already: a line of JSON in, a process id and its end out."""

import json
import os
import sys
from pathlib import Path

from counterstain.processes import ExecutorConfig
from counterstain.study.config import load_study
from counterstain.study.run import run_study


def main():
    say("ready")
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            study = load_study(Path(order["study"]))
            run_study(study, Path(order["out"]), executor=ExecutorConfig(processes=order["processes"]))
            os._exit(0)
        say(pid)
        say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def say(word):
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Run a study on a Ray cluster of two nodes of this machine; kill one when some cells are done, if asked to."""

import os
import sys
import threading
import time
from pathlib import Path

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # all on the loopback interface
import ray
from ray.cluster_utils import Cluster

from counterstain.processes import ExecutorConfig
from counterstain.study.config import load_study
from counterstain.study.run import run_study


def main(study, out, kill_after_cells):
    head = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": 10**8}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second = cluster.add_node(num_cpus=1, object_store_memory=10**8)
    if kill_after_cells:
        threading.Thread(target=kill, args=(cluster, second, out, kill_after_cells), daemon=True).start()
    run_study(load_study(study), out, executor=ExecutorConfig(kind="ray", address=cluster.address))
    assert not ray.is_initialized()
    sys.stdout.flush()
    cluster.shutdown()


def kill(cluster, node, out, cells):
    while len(list(out.glob("cells/*/cell.json"))) < cells:
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)
    sys.stdout.write("killed\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

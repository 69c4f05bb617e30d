"""A Ray cluster of two nodes on the loopback interface: `python two_nodes.py`. Prints its address; ends when its input does."""

from __future__ import annotations

import os
import sys

NODE = {"node_ip_address": "127.0.0.1", "num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}


def main() -> None:
    # read by Ray when it is imported: every port on the loopback interface only
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(**NODE, include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=0)
    cluster.add_node(**NODE)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()

"""Takes the picture of Ray's dashboard for the docs, while a quickstart trains: python -m scripts.dashboard_picture."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from scripts.markdown import ROOT

PICTURE = ROOT / "docs" / "images" / "dashboard.png"
RUN = "experiment=quickstart run.name=quickstart train.epochs=60 train.patience=60 resources.cpus_per_fold=1"


def main() -> None:
    """Starts a cluster of two nodes and a run on it, and opens the page of a fold in Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("chromium is missing, so the picture stays as it was: apt-get install chromium")
    # A page that asks for a token shows nothing else. Ray reads the variable when it is imported.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True, "dashboard_port": 8299}
    )
    try:
        cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "raycv.run", *RUN.split()]
            environment = {**os.environ, "RAY_ADDRESS": cluster.address}
            with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL) as run:
                runs = Path(folder) / "runs" / "quickstart"
                while run.poll() is None and not all((runs / f"fold_{fold}" / "state").exists() for fold in range(2)):
                    time.sleep(1)
                flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1500,760"]
                flags += ["--virtual-time-budget=30000", f"--screenshot={PICTURE}"]
                listed = urllib.request.urlopen(f"http://{cluster.webui_url}/api/v0/actors?detail=1", timeout=60)
                actors = json.load(listed)["data"]["result"]["result"]
                shown = next(actor["actor_id"] for actor in actors if actor["repr_name"] == "quickstart/fold_0")
                page = f"http://{cluster.webui_url}/#/actors/{shown}"
                subprocess.run([chromium, *flags, page], check=True, capture_output=True, timeout=300)
                run.terminate()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()

"""Four hospitals on this machine: SuperLink, four SuperNodes, TLS, keys, and a table at the end.

    python run.py --out DIR [--methods fedmerge,fedavg,local] [--rounds 10]

Every method is a run of its own on the same federation. Started again, a run goes on where its
state folder stands.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fedmerge.deploy.local import LocalFederation
from fedmerge.errors import FedmergeError

HERE = Path(__file__).resolve().parent
HOSPITALS = ("Cleveland", "Hungary", "Switzerland", "VA Long Beach")


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description="Heart disease in four hospitals, on Flower")
    parser.add_argument("--out", type=Path, required=True, help="folder for states and logs")
    parser.add_argument("--methods", default="fedmerge,fedavg,local")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1800, help="longest time for a run")
    given = parser.parse_args()
    out = given.out.resolve()
    # What a hospital remembers, for methods where it does; each has its own file there.
    memory = str(out / "client-state")
    nodes = {
        name.lower().replace(" ", "-"): {"hospital": name, "client-state": memory}
        for name in HOSPITALS
    }
    try:
        with LocalFederation(out / "flower", nodes) as federation:
            for method in given.methods.split(","):
                state = out / method.replace(":", "-")
                options = {"state": str(state), "method": method, "rounds": given.rounds}
                run = federation.run(HERE, {f"fedmerge.{k}": v for k, v in options.items()})
                print(f"{method}: run {run}; watch it with `fedmerge status {state} --watch`")
                ended = federation.wait(run, given.seconds)
                if ended != "finished:completed":
                    raise FedmergeError(f"{method}: {ended}; {federation.tail('superlink')}")
                show(state)
    except FedmergeError as error:
        print(f"hospitals: {error}", file=sys.stderr)
        return 1
    print(f"The hospitals' models are in {out}/*/models")
    return 0


def show(state: Path) -> None:
    """Print accuracy and area under the ROC curve of each hospital, on its own test patients."""
    clients: list[dict[str, Any]] = json.loads((state / "status.json").read_text())["clients"]
    for client in sorted(clients, key=lambda one: str(one["label"])):
        found = client["figures"]["merged"]["test"]
        patients = client["sizes"]["test"]
        print(
            f"  {client['label']:<15} {patients:>4} test patients   "
            f"accuracy {found['accuracy']:.3f}   AUC {found['auc']:.3f}"
        )


if __name__ == "__main__":
    sys.exit(main())

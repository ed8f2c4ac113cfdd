"""A whole federation on this machine: SuperLink, SuperNodes and runs, each a process of its own.

For examples and tests, with TLS and keys as between machines. It ends what it has started, each by
its process id.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from ..errors import ConfigError, FedmergeError
from ..flower.require import require_flower
from .credentials import make_credentials

CONNECTION = "federation"


class FederationError(FedmergeError):
    """A process of the federation that did not start, or ended."""


class LocalFederation:
    """A SuperLink and its SuperNodes on the loopback interface.

    Args:
        folder: for credentials, database, logs; made if needed, kept afterwards.
        nodes: each site's name and the config of its SuperNode.
        environment: added to that of the processes.
        database: keep the SuperLink's state in a file, so that it survives a restart.
        warm: whether SuperNodes start their clients from a process with torch loaded.

    The names of log files: superlink.log, NAME.log.
    """

    def __init__(
        self,
        folder: Path | str,
        nodes: Mapping[str, Mapping[str, Any]],
        *,
        environment: Mapping[str, str] | None = None,
        database: bool = True,
        warm: bool = True,
    ) -> None:
        require_flower()
        self.folder = Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.nodes = {name: dict(config) for name, config in nodes.items()}
        self.port = free_port()
        self._ports = {name: free_port() for name in nodes}
        self._database = self.folder / "superlink.db" if database else None
        self._warm = warm
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._logged: dict[str, int] = {}
        scripts = str(Path(sys.executable).parent)
        self.environment = {
            **os.environ,
            # Flower starts its parts by name.
            "PATH": scripts + os.pathsep + os.environ.get("PATH", ""),
            "FLWR_HOME": str(self.folder / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
            **(environment or {}),
        }
        self.credentials = self.folder / "credentials"
        make_credentials(self.credentials, ["127.0.0.1", "localhost"], list(nodes))

    # -- all of it ---------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self.start_superlink()
            self.register(self.nodes)
            for name in self.nodes:
                self.start_node(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process that was started here, SuperNodes first."""
        for name in reversed(list(self._processes)):
            self.stop(name)
        # What Flower has started in turn ends by itself, but for what is killed at a bad moment.
        for pid in self.descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # -- its parts ---------------------------------------------------------------------------------

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it answers.

        Raises:
            FederationError: it does not.
        """
        files = [self.credentials / name for name in ("ca.crt", "server.crt", "server.key")]
        command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)]
        for option, file in zip(
            ("--ssl-ca-certfile", "--ssl-certfile", "--ssl-keyfile"), files, strict=True
        ):
            command += [option, str(file)]
        command += ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        if self._database is not None:
            command += ["--database", str(self._database)]
        self._start("superlink", command)
        home = Path(self.environment["FLWR_HOME"])
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{files[0]}"\n'
        )
        end = time.monotonic() + 120
        while not answers(self.port):
            if time.monotonic() > end or self._processes["superlink"].poll() is not None:
                raise FederationError(f"the SuperLink did not start: {self.tail('superlink')}")
            time.sleep(0.2)

    def register(self, names: Sequence[str] | Mapping[str, Any]) -> None:
        """Let the sites `names` in by their public keys."""
        for name in names:
            key = self.credentials / f"{name}.key.pub"
            self.flwr("supernode", "register", str(key), CONNECTION, "--name", name)

    def start_node(self, name: str) -> None:
        """Start the SuperNode of a site; it connects when it can."""
        pairs = [f"{key}={_toml(value)}" for key, value in self.nodes[name].items()]
        command = ["fedmerge", "deploy", "node"] if self._warm else ["flower-supernode"]
        command += ["--superlink", f"127.0.0.1:{self.port}"]
        command += ["--root-certificates", str(self.credentials / "ca.crt")]
        command += ["--auth-supernode-private-key", str(self.credentials / f"{name}.key")]
        command += ["--port", str(self._ports[name])]
        if pairs:
            command += ["--node-config", " ".join(pairs)]
        self._start(name, command)

    def run(self, app: Path | str, options: Mapping[str, Any] | None = None) -> int:
        """Begin a run of `app` with these run-config options; return its id.

        Raises:
            FederationError: Flower did not take it.
        """
        command = ["run", str(app), CONNECTION, "--format", "json"]
        if options:
            command += ["--run-config", " ".join(f"{k}={_toml(v)}" for k, v in options.items())]
        found = re.search(r'"run-id": "?(\d+)', self.flwr(*command))
        if found is None:
            raise FederationError("Flower gave no id for the run")
        return int(found[1])

    def status(self, run: int) -> str:
        """What Flower says of a run: "running", "finished:completed", "finished:failed: why"."""
        text = self.flwr("ls", CONNECTION, "--run-id", str(run), "--format", "json")
        (found,) = json.loads(text)["runs"]
        status, why = str(found["status"]), found["status-details"]
        return f"{status}: {why}" if status == "finished:failed" else status

    def said(self, run: int) -> str:
        """What the ServerApp of a run has written so far."""
        return self.flwr("log", str(run), CONNECTION, "--show")

    def wait(self, run: int, seconds: float) -> str:
        """Wait until a run has ended; return its status, with the reason if it failed.

        Raises:
            FederationError: it has not within `seconds`.
        """
        end = time.monotonic() + seconds
        ended = re.compile(rf"(Finished|Failed|Stopped|Expired)[^\n]* of run {run}\b")
        looked = time.monotonic()
        while time.monotonic() < end:
            # Asking Flower starts a process: its log says as much, but for a run that it lost.
            if ended.search(self.log("superlink")) or time.monotonic() - looked > 20:
                looked = time.monotonic()
                status = ""
                with contextlib.suppress(FederationError):  # a SuperLink too busy to answer
                    status = self.status(run)
                if status.startswith("finished"):
                    return status
            time.sleep(0.5)
        raise FederationError(f"run {run} has not ended within {seconds:g} s")

    def kill(self, name: str) -> None:
        """Kill a part with all its children (-9), as a power cut would."""
        self._signal(name, signal.SIGKILL)
        self._processes.pop(name).wait()

    def stop(self, name: str) -> None:
        """End a part, kindly at first."""
        process = self._processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        # Also what it has left behind: it was started as the leader of a group of its own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def descendants(self, program: str = "") -> list[int]:
        """Processes that work for this federation's SuperLink or SuperNodes, by their addresses.

        Args:
            program: part of the command's name, such as "flwr-serverapp"; all if empty.
        """
        ports = [str(self.port), *map(str, self._ports.values())]
        addresses = {f"127.0.0.1:{port}".encode() for port in ports}
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (path / "cmdline").read_bytes().split(b"\0")
                named = any(program.encode() in part for part in command[:2])
                if named and addresses & set(command):
                    found.append(int(path.name))
        return found

    def alive(self, name: str) -> bool:
        """Whether a part is running."""
        return name in self._processes and self._processes[name].poll() is None

    def pid(self, name: str) -> int:
        """The process of a part that was started."""
        return self._processes[name].pid

    def connected(self, name: str) -> bool:
        """Whether a SuperNode has been let in since it was last started."""
        return "SuperNode ID:" in self.log(name)[self._logged[name] :]

    def log(self, name: str) -> str:
        """What a part has written."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def tail(self, name: str) -> str:
        """The last lines of that, as one."""
        return " | ".join(self.log(name).strip().splitlines()[-5:])

    def flwr(self, *arguments: str) -> str:
        """Run a `flwr` command; return what it printed.

        Raises:
            FederationError: it failed.
        """
        done = subprocess.run(
            ["flwr", *arguments],
            env={**self.environment, "COLUMNS": "400"},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        if done.returncode or '"success": false' in done.stdout:
            text = " ".join((done.stdout + done.stderr).split())
            raise FederationError(f"flwr {arguments[0]} {arguments[1]}: {text[-600:]}")
        return done.stdout

    def _start(self, name: str, command: Sequence[str]) -> None:
        program = shutil.which(command[0], path=self.environment["PATH"])
        if program is None:
            raise ConfigError(f'"{command[0]}" is not installed: pip install "fedmerge[flower]"')
        self._logged[name] = len(self.log(name))
        log: IO[bytes]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [program, *command[1:]],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _signal(self, name: str, what: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._processes[name].pid, what)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def answers(port: int, host: str = "127.0.0.1") -> bool:
    """Whether anything listens on a port."""
    with socket.socket() as caller:
        caller.settimeout(1.0)
        return caller.connect_ex((host, port)) == 0


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else f'"{value}"'

"""Kernels of notebooks that start as forks of one process, which has imported their libraries.

A new kernel spends some five seconds on importing torch, seaborn and scikit-learn, and the book has
twenty. A fork shares these imports and nothing else.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import EntryPoint
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

from jupyter_client.provisioning.factory import KernelProvisionerFactory
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

CAN_FORK = sys.platform == "linux"  # elsewhere a fork of a process that has imported torch can fail
IMPORTED = (
    "ipykernel.kernelapp",
    "sklearn.datasets",
    "swdlib.lab.plots",
    "torchvision",
)


def share_imports() -> None:
    """Start each kernel of this process as such a fork from now on."""
    if CAN_FORK:
        # Matplotlib reads it at its import, and a new kernel would have set it before.
        os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        get_context("forkserver").set_forkserver_preload(list(IMPORTED))
        factory = KernelProvisionerFactory.instance()
        entry = EntryPoint("forked", f"{__name__}:ForkedKernel", factory.GROUP_NAME)
        factory.provisioners[entry.name] = entry
        factory.default_provisioner_name = entry.name


class ForkedKernel(LocalProvisioner):
    """Starts a kernel as a fork, where jupyter_client would start a program."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        """Start the kernel of the command line `cmd` and return its connection."""
        file = cmd[cmd.index("-f") + 1]
        self.process: Any = Child(file, kwargs["env"], str(kwargs.get("cwd") or os.getcwd()))
        self.pid = self.pgid = self.process.pid
        return self.connection_info


class Child:
    """The fork, with the methods of subprocess.Popen that jupyter_client uses."""

    stdin = stdout = stderr = None

    def __init__(self, file: str, env: dict[str, str], folder: str) -> None:
        self.process = get_context("forkserver").Process(target=serve, args=(file, env, folder))
        self.process.start()
        self.pid = self.process.pid or 0

    def poll(self) -> int | None:
        """Return the exit status, or None while the kernel runs."""
        return self.process.exitcode

    def wait(self) -> int | None:
        """Wait for the end of the kernel and return its exit status."""
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal to the kernel."""
        os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask the kernel to end."""
        self.process.terminate()

    def kill(self) -> None:
        """End the kernel."""
        self.process.kill()


def serve(file: str, env: dict[str, str], folder: str) -> None:
    """Run as the kernel of the connection `file`, with these variables, in this folder."""
    os.setsid()  # so that an interrupt reaches the processes that the kernel has started
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    forget()
    Thread(target=follow, daemon=True).start()
    from ipykernel.kernelapp import launch_new_instance

    try:
        # Its parent is the fork server: `follow` watches the process that asked for the kernel. At
        # a lower level, a kernel warns that its connection, which stays local, is not encrypted.
        options = ["--IPKernelApp.parent_handle=1", "--IPKernelApp.log_level=ERROR"]
        launch_new_instance(argv=["-f", file, *options])
    finally:
        atexit._run_exitfuncs()  # a fork runs none at its end, such as those of temporary folders


def forget() -> None:
    """Reset sys.path to that of a new process, and forget this package."""
    asked = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    sys.path[:] = json.loads(subprocess.run(asked, capture_output=True, check=True).stdout)
    for name in [name for name in sys.modules if name.split(".")[0] == __package__]:
        del sys.modules[name]


def follow() -> None:
    """Exit when the process that started this kernel has ended."""
    if parent := parent_process():
        parent.join()
        os._exit(1)

"""Kernels forked by a host (nbutils/batch/kernel_host.py), for jupyter_client. A fresh process where none can be.

jupyter_client starts, signals and ends a kernel through a provisioner; this one differs from its LocalProvisioner in
where the process comes from.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from jupyter_client import KernelManager
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import LocalProvisioner

from nbutils.batch.hosting import host_in_use, message_socket, own_host, receive, send
from nbutils.foundation.processes import end_with_parent

HOST_SECONDS = 180  # a host answers when it has imported, on a busy machine
END_SECONDS = 5  # a killed kernel ends at once, but for the writing of gigabytes
_log = logging.getLogger(__name__)


class HostUnavailable(Exception):
    """The host forks no kernel; the message says why."""


def provisioner(manager: KernelManager) -> LocalProvisioner | None:
    """What starts `manager`'s kernel; None, which is jupyter_client's own, where no host is used."""
    host = host_in_use()
    if host is None:
        return None
    warm = WarmProvisioner(kernel_id=str(uuid4()), kernel_spec=manager.kernel_spec, parent=manager)
    warm.host = host
    return warm


def exit_code(provisioner: Any) -> int:
    """How the process of an ended kernel ended, also where jupyter_client has forgotten it; -N: by signal N."""
    process = provisioner.process or getattr(provisioner, "started", None)
    return process.returncode if process else -signal.SIGKILL


def peak_memory_mib(provisioner: Any) -> float | None:
    """What the process of an ended kernel had taken at most, as the system counted; None where no host forked it."""
    kernel = getattr(provisioner, "kernel", None)
    if kernel is None:
        return None
    try:
        kernel.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    return kernel.peak_memory_mib


class WarmKernel:
    """A kernel forked by the host, with as much of subprocess.Popen as LocalProvisioner uses."""

    stdin = stdout = stderr = None

    def __init__(
        self, host: Path, arguments: Sequence[str], environment: Mapping[str, str], folder: str, output: Sequence[int]
    ) -> None:
        """Raises HostUnavailable where the host has ended or refuses."""
        self.returncode: int | None = None
        self.peak_memory_mib: float | None = None  # once it has ended
        self._connection = message_socket()
        try:
            self._connection.settimeout(HOST_SECONDS)
            self._connection.connect(str(host))
            request = {"arguments": list(arguments), "environment": dict(environment), "folder": folder}
            send(self._connection, request, output)
            answer, _ = receive(self._connection)
            if "process" not in answer:
                raise HostUnavailable(answer.get("refused") or f"its child ended ({answer})")
        except (OSError, EOFError) as error:
            self._connection.close()
            raise HostUnavailable(f"it does not answer ({error})") from None
        except BaseException:
            self._connection.close()
            raise
        self.pid: int = answer["process"]

    def poll(self) -> int | None:
        """The exit code, -N where signal N ended the kernel, None while it runs."""
        return self._end(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        code = self._end(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("kernel", timeout)
        return code

    def _end(self, seconds: float | None) -> int | None:
        if self.returncode is None:
            self._connection.settimeout(seconds)
            try:
                ended, _ = receive(self._connection)
                self.returncode, self.peak_memory_mib = ended["exit_code"], ended["peak_memory_mib"]
            except (BlockingIOError, TimeoutError):
                return None
            except (OSError, EOFError):
                self.returncode = -signal.SIGKILL  # the host was killed, and with it its kernels
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the kernel has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class WarmProvisioner(LocalProvisioner):
    """Takes the kernel from the host, or one of the runner's own; starts a process as ever where neither gives one."""

    host: Path
    kernel: WarmKernel | None = None
    started: WarmKernel | subprocess.Popen | None = None

    async def launch_kernel(self, cmd: list[str], **settings: Any) -> KernelConnectionInfo:
        """Start the kernel that `cmd` would: an ipykernel with these arguments."""
        environment = settings["env"] | {"JPY_PARENT_PID": str(os.getpid())}  # as jupyter_client's launcher does
        folder = str(settings.get("cwd") or Path.cwd())
        arguments = cmd[cmd.index("ipykernel_launcher") :]
        try:
            self.kernel = self._from_a_host(arguments, environment, folder)
        except (HostUnavailable, OSError) as reason:
            _log.warning("What this kernel starts may outlive a runner that is killed: it has no host (%s).", reason)
            info = await super().launch_kernel(cmd, **settings, preexec_fn=end_with_parent(os.getpid()))
            self.started = self.process
            return info
        self.process = self.started = self.kernel
        self.pid = self.pgid = self.process.pid
        self.cwd = folder
        return self.connection_info

    def _from_a_host(self, arguments: Sequence[str], environment: Mapping[str, str], folder: str) -> WarmKernel:
        """Forked by the batch's host, else by one that has imported nothing. Raises HostUnavailable, OSError."""
        try:
            return WarmKernel(self.host, arguments, environment, folder, (1, 2))
        except HostUnavailable as reason:
            _log.warning("This kernel imports for itself: the kernel host forks none, because %s.", reason)
            host = own_host()
            if host is None:
                raise
        return WarmKernel(host, arguments, environment, folder, (1, 2))

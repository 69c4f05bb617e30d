"""Looks at the machine that it runs on.

A cluster's nodes get this module by value, so that a node without Tunesmith, or with another one, can be asked too: it
imports Python's own library alone, psutil where it is needed, and nothing of ours. It answers with plain values.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import resource
import shutil
import socket
import stat
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PATIENCE_S = 60
TORCH_PATIENCE_S = 180
"""Importing it takes a minute where the disk is slow."""
GPU_COLUMNS = ("uuid", "name", "memory.total", "memory.used", "driver_version", "ecc.errors.uncorrected.volatile.total")
RAY_PROGRAMS = ("gcs_server", "raylet")
RAY_SCRIPTS = ("/ray/dashboard/", "/ray/_private/", "ray::")
EXTENSION = "#include <Python.h>\n#include <vector>\nint entry() { return (int)std::vector<int>(3).size(); }\n"
ASK_TORCH = """
import json, torch
from torch.utils import cpp_extension
cuda = torch.version.cuda
nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda and torch.distributed.is_nccl_available() else None
print(json.dumps({"cuda": cuda, "devices": torch.cuda.device_count(), "nccl": nccl,
                  "cuda_home": cpp_extension.CUDA_HOME if cuda else None}))
"""


def look(name: str, libraries: Sequence[str], folder: str, session: str) -> dict[str, Any]:
    """Everything about this machine, as the fields of `facts.Machine`.

    Args:
        libraries: whose versions are asked for.
        folder: where runs are written; it need not exist.
        session: the Ray session whose listeners are meant; of every Ray here when empty.
    """
    devices = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    gpus, driver_error = gpus_of_driver() if devices or shutil.which("nvidia-smi") else ([], "")
    token = os.environ.get("RAY_AUTH_TOKEN_PATH") or str(Path.home() / ".ray" / "auth_token")
    compiler = os.environ.get("CXX", "c++")
    return {
        "name": name,
        "python": platform.python_version(),
        "versions": {library: version_of(library) for library in libraries},
        "gpu_devices": devices,
        "gpus": gpus,
        "driver_error": driver_error,
        "torch": ask_torch() if devices or gpus else None,
        "disks": [
            disk("output", folder),
            disk("temporary", tempfile.gettempdir()),
            *([disk("shared memory", "/dev/shm")] if os.path.isdir("/dev/shm") else []),
        ],
        "compiler": compiler,
        "compiler_error": compile_extension(compiler),
        "ninja": shutil.which("ninja") is not None,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "auth_mode": os.environ.get("RAY_AUTH_MODE", ""),
        "token_path": token,
        "token_mode": os.stat(token).st_mode & 0o777 if os.path.isfile(token) else None,
        "token_open": os.path.isfile(token) and readable_by_others(Path(token)),
        "listeners": list(ray_listeners(session)),
    }


def readable_by_others(path: Path) -> bool:
    """Whether a file's permissions, and those of every folder above it, let its group or everybody read it."""
    mode, folders = path.stat().st_mode, [folder.stat().st_mode for folder in path.absolute().parents]
    ways = ((stat.S_IRGRP, stat.S_IXGRP), (stat.S_IROTH, stat.S_IXOTH))
    return any(mode & read and all(folder & search for folder in folders) for read, search in ways)


def version_of(library: str) -> str | None:
    """The installed version; None when there is none."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def gpus_of_driver() -> tuple[list[dict[str, Any]], str]:
    """What nvidia-smi says of each GPU, and why it says nothing."""
    try:
        rows = _nvidia_smi("--query-gpu=" + ",".join(GPU_COLUMNS))
        busy = _nvidia_smi("--query-compute-apps=gpu_uuid,process_name,pid")
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stdout", "") or getattr(error, "stderr", "") or str(error)
        return [], said.strip().partition("\n")[0]
    return [read_gpu(row, busy) for row in rows], ""


def read_gpu(row: Sequence[str], busy: Sequence[Sequence[str]]) -> dict[str, Any]:
    """One line of `--query-gpu` and all of `--query-compute-apps`, as the fields of `facts.Gpu`."""
    uuid, name, total, used, driver, ecc = row
    return {
        "uuid": uuid,
        "name": name,
        "memory_mib": float(total),
        "used_mib": float(used),
        "driver": driver,
        "ecc_errors": int(ecc) if ecc.isdigit() else None,  # [N/A] where it does not count
        "processes": [f"{process} (pid {pid})" for gpu, process, pid in busy if gpu == uuid],
    }


def _nvidia_smi(query: str) -> list[list[str]]:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout
    return list(csv.reader(told.splitlines(), skipinitialspace=True))


def ask_torch() -> dict[str, Any]:
    """What torch gets here, in a process of its own: Ray hides the GPUs from a worker that has reserved none."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", ASK_TORCH]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TORCH_PATIENCE_S, env=environment)
    except subprocess.TimeoutExpired:  # as where a driver hangs
        return {"error": f"no answer within {TORCH_PATIENCE_S} s"}
    if done.returncode:
        return {"error": (done.stderr.strip() or f"exit code {done.returncode}").rpartition("\n")[2]}
    answer = json.loads(done.stdout)
    return {**answer, "nvcc": nvcc_version(answer["cuda_home"])}


def nvcc_version(cuda_home: str | None) -> str | None:
    """Version of the CUDA compiler in a folder; None when it is not there."""
    nvcc = Path(cuda_home or os.devnull) / "bin" / "nvcc"
    if not nvcc.is_file():
        return None
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout
    return told.partition("release ")[2].partition(",")[0]


def disk(kind: str, path: str) -> dict[str, Any]:
    """The file system below a path, as the fields of `facts.Disk`."""
    there = Path(path)
    while not there.exists():
        there = there.parent
    usage = shutil.disk_usage(there)
    return {"kind": kind, "path": path, "total_bytes": usage.total, "free_bytes": usage.free}


def compile_extension(compiler: str) -> str:
    """Compiles a small extension of Python, as DeepSpeed does at first use; what the compiler said, or nothing."""
    if shutil.which(compiler) is None:
        return "there is none on the path"
    command = [compiler, "-x", "c++", "-shared", "-fPIC", f"-I{sysconfig.get_paths()['include']}", "-"]
    with tempfile.TemporaryDirectory() as folder:
        library = ["-o", f"{folder}/probe.so"]
        try:
            done = subprocess.run(
                command + library, input=EXTENSION, capture_output=True, text=True, timeout=PATIENCE_S
            )
        except subprocess.TimeoutExpired:
            return f"it has not compiled a small file within {PATIENCE_S} s"
    said = done.stderr.strip().partition("\n")[0]
    return said or f"exit code {done.returncode}" if done.returncode else ""


def ray_listeners(session: str) -> Iterator[dict[str, Any]]:
    """The ports that Ray's processes on this machine listen on, as far as this user may see them.

    Args:
        session: name of the Ray session that is meant; every Ray on this machine when empty.
    """
    import psutil

    for process in psutil.process_iter(["name"]):
        try:
            if not is_of_ray(process.cmdline()) or not is_of_session(process, session):
                continue
            found = process.net_connections("tcp")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it has ended meanwhile, or is somebody else's
        for connection in found:
            if connection.status == psutil.CONN_LISTEN:
                address, port = connection.laddr
                yield {"process": process.info["name"], "pid": process.pid, "address": address, "port": port}


def is_of_ray(words: Sequence[str]) -> bool:
    """Whether a command line is that of one of Ray's own processes."""
    return bool(words) and (
        os.path.basename(words[0]) in RAY_PROGRAMS or any(part in word for word in words[:4] for part in RAY_SCRIPTS)
    )


def is_of_session(process: Any, session: str) -> bool:
    """Whether a process, or what started it, names the session; workers themselves do not."""
    return any(session in " ".join(one.cmdline()) for one in (process, *process.parents()))


def read_and_answer(folder: str, nonce: str, answer: str) -> dict[str, Any]:
    """Reads what the driver wrote into a folder, writes `answer` beside it, and tries the lock that the driver holds."""
    import fcntl

    seen: dict[str, Any] = {"reads_ours": False, "sees_lock": None}
    try:
        seen["reads_ours"] = (Path(folder) / "driver").read_text() == nonce
        write_durably(Path(folder) / answer, answer.encode())
        with open(Path(folder) / "lock", "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                seen["sees_lock"] = False
            except BlockingIOError:
                seen["sees_lock"] = True
    except OSError as error:
        seen["error"] = f"{error.filename or folder}: {error.strerror or error}"
    return seen


def measure_storage(folder: str, name: str, size: int) -> dict[str, Any]:
    """Writes `size` bytes with an fsync, reads them back past this machine's cache, and removes them."""
    path, data = Path(folder) / f"speed-{name}", os.urandom(size)  # which no file system can compress
    try:
        began = time.perf_counter()
        write_durably(path, data)
        written = time.perf_counter()
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            started, left = time.perf_counter(), size
            while left and (part := os.read(descriptor, min(left, 2**20))):
                left -= len(part)
            read = time.perf_counter()
        finally:
            os.close(descriptor)
        path.unlink()
    except OSError as error:
        return {"error": f"{error.filename or path}: {error.strerror or error}"}
    if left:
        return {"error": f"{path}: {left} of {size} bytes written are not there"}
    return {"write_mb_s": size / (written - began) / 1e6, "read_mb_s": size / (read - started) / 1e6}


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file and fsyncs it."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class Witness:
    """What answers for one node, as a Ray actor."""

    def look(self, name: str, libraries: Sequence[str], folder: str, session: str) -> dict[str, Any]:
        return look(name, libraries, folder, session)

    def clock(self) -> float:
        return time.time()

    def read_and_answer(self, folder: str, nonce: str, answer: str) -> dict[str, Any]:
        return read_and_answer(folder, nonce, answer)

    def measure_storage(self, folder: str, name: str, size: int) -> dict[str, Any]:
        return measure_storage(folder, name, size)

    def free_port(self, address: str) -> int:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
            return probe.getsockname()[1]

    def all_reduce(self, backend: str, rank: int, world: int, meet: str, size: int, patience_s: float) -> float:
        """Seconds of one all-reduce of `size` bytes: the median of five, after one that is not counted."""
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        dist.init_process_group(
            backend, init_method=meet, rank=rank, world_size=world, timeout=timedelta(seconds=patience_s)
        )
        try:
            tensor = torch.ones(size // 4, device="cuda:0" if backend == "nccl" else "cpu")
            seconds = []
            for _ in range(6):
                tensor.fill_(1)
                dist.barrier()
                began = time.perf_counter()
                dist.all_reduce(tensor)
                if backend == "nccl":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
            if not bool((tensor == world).all()):
                raise RuntimeError(
                    f"an all-reduce of ones over {world} machines gave {tensor.min():g} to {tensor.max():g}"
                )
        finally:
            dist.destroy_process_group()
        return statistics.median(seconds[1:])

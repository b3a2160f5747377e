"""The machine: what it is, what it can do at the most, and whether anybody else is using it.

Its limits are measured by ``libmvlm_machine``, made from ``machine_limits.cpp`` and loaded with ctypes. Knows nothing
of models.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_LIBRARY_NAME = "libmvlm_machine.dylib" if sys.platform == "darwin" else "libmvlm_machine.so"

#: Flags of /proc/cpuinfo that decide which kernels run: x86's, then Arm's.
_FEATURES = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)

#: Bandwidth is read from this much, or from eight times the last cache: no cache may help.
_MIN_BUFFER_BYTES = 256 * 2**20
_MEASURED_SECONDS = 0.06
_MEASUREMENTS = 5


class MachineError(RuntimeError):
    """Something about the machine cannot be told; the message says what."""


# -- what it is -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What the numbers of a benchmark depend on.

    Attributes:
        cpu: model name.
        features: flags of the instruction sets that matter here.
        cores: that this process may use.
        governor: of the CPU's frequency, None where the system does not tell.
        last_cache_bytes: of the largest cache, None where the system does not tell.
        memory_bytes: all of the machine's.
        kernel: of the operating system, with its version.
        system: the distribution.
        architecture: ``x86_64``, ``aarch64``, …
        python: version.
    """

    cpu: str
    features: tuple[str, ...]
    cores: int
    governor: str | None
    last_cache_bytes: int | None
    memory_bytes: int
    kernel: str
    system: str
    architecture: str
    python: str


def describe_machine() -> Machine:
    """This machine."""
    cpuinfo = _read(Path("/proc/cpuinfo"))
    flags = set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features") or "").split())
    memory = re.search(r"^MemTotal:\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    name = _field(cpuinfo, "model name") or _field(cpuinfo, "Hardware") or _field(cpuinfo, "CPU part")
    try:
        system = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        system = platform.system()
    return Machine(
        cpu=name or platform.processor() or "unknown",
        features=tuple(feature for feature in _FEATURES if feature in flags),
        cores=usable_cores(),
        governor=_read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")).strip() or None,
        last_cache_bytes=_last_cache_bytes(Path("/sys/devices/system/cpu/cpu0/cache")),
        memory_bytes=1024 * int(memory[1]) if memory else 0,
        kernel=f"{platform.system()} {platform.release()}",
        system=system,
        architecture=platform.machine(),
        python=platform.python_version(),
    )


def usable_cores() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _field(cpuinfo: str, name: str) -> str | None:
    match = re.search(rf"^{name}\s*: (.+)$", cpuinfo, re.MULTILINE)
    return match[1].strip() if match else None


def _last_cache_bytes(folder: Path) -> int | None:
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [re.fullmatch(r"(\d+)([KMG])\s*", _read(path)) for path in folder.glob("index*/size")]
    return max((int(size[1]) * units[size[2]] for size in sizes if size), default=None)


# -- what it can do at the most ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MultiplyRate:
    """Multiply-adds per second, with the instructions that were fastest.

    Attributes:
        instructions: ``AVX2 vpmaddubsw, vpmaddwd``.
        per_second: multiply-adds of all threads together.
    """

    instructions: str
    per_second: float


@dataclass(frozen=True)
class Limits:
    """What a number of threads can do at the most.

    Attributes:
        threads: together.
        read_bytes_per_second: from memory, past all caches.
        multiply: bits of the weights (4 and 8, times 8 bits; 32 for float32) -> rate. All of them give exact sums.
    """

    threads: int
    read_bytes_per_second: float
    multiply: dict[int, MultiplyRate]

    def best(self, other: Limits) -> Limits:
        """The larger of two measurements: anything that disturbs one makes it smaller."""
        rates = {
            bits: max(rate, other.multiply[bits], key=lambda rate: rate.per_second)
            for bits, rate in self.multiply.items()
        }
        return Limits(self.threads, max(self.read_bytes_per_second, other.read_bytes_per_second), rates)


class LimitsLibrary:
    """The native library that measures limits.

    Raises:
        MachineError: it is not installed, or cannot be loaded.
    """

    def __init__(self, path: Path | None = None) -> None:
        path = path or _library_path()
        try:
            self._library = library = ctypes.CDLL(str(path))
        except OSError as error:
            raise MachineError(f"{path}: cannot be loaded: {error}") from error
        library.mvlm_kernel_name.restype = ctypes.c_char_p
        library.mvlm_multiply_add_rate.restype = ctypes.c_double
        library.mvlm_multiply_add_rate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
        library.mvlm_read_bandwidth.restype = ctypes.c_double
        library.mvlm_read_bandwidth.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_double]
        #: (number, instructions, bits of the weights) of each kernel that this CPU can run.
        self.kernels = [
            (kernel, library.mvlm_kernel_name(kernel).decode(), library.mvlm_kernel_weight_bits(kernel))
            for kernel in range(library.mvlm_kernel_count())
            if library.mvlm_kernel_runs_here(kernel)
        ]

    def measure(self, threads: int, buffer_bytes: int | None = None, seconds: float = _MEASURED_SECONDS) -> Limits:
        """Measures for about two seconds; of several attempts the best counts.

        Raises:
            MachineError: there is no memory for the buffer, or the threads cannot be started.
        """
        multiply: dict[int, MultiplyRate] = {}
        for kernel, name, bits in self.kernels:
            rate = self._best(lambda kernel=kernel: self._library.mvlm_multiply_add_rate(kernel, threads, seconds))
            if bits not in multiply or rate > multiply[bits].per_second:
                multiply[bits] = MultiplyRate(name, rate)
        size = buffer_bytes or _buffer_bytes()
        bandwidth = self._best(lambda: self._library.mvlm_read_bandwidth(threads, size, seconds))
        return Limits(threads, bandwidth, multiply)

    def _best(self, measure) -> float:
        rate = max(measure() for _ in range(_MEASUREMENTS))
        if rate <= 0:
            raise MachineError("the machine's limits cannot be measured: no memory, or no threads")
        return rate


def _library_path() -> Path:
    """As for mvlm.ops: an editable install has Python files and libraries in different folders."""
    folders = [Path(entry) for entry in sys.modules[__name__.rpartition(".")[0]].__path__]
    for folder in folders:
        if (folder / _LIBRARY_NAME).is_file():
            return folder / _LIBRARY_NAME
    searched = ", ".join(str(folder) for folder in folders)
    raise MachineError(
        f"{_LIBRARY_NAME} was not found; searched {searched}. It is built and installed with the package: run "
        "`pip install .` (or `pip install -e .`) in the repository."
    )


def _buffer_bytes() -> int:
    wanted = max(_MIN_BUFFER_BYTES, 8 * (_last_cache_bytes(Path("/sys/devices/system/cpu/cpu0/cache")) or 0))
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    return min(wanted, 1024 * int(available[1]) // 4) if available else wanted


# -- who else uses it -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CpuClock:
    """A moment: CPU seconds that the machine has spent so far, and that are ours.

    Attributes:
        when: seconds.
        busy: CPU seconds of everybody, None where the system does not tell.
        own: CPU seconds of this process, without its children.
    """

    when: float
    busy: float | None
    own: float

    @classmethod
    def now(cls) -> CpuClock:
        stat = _read(Path("/proc/stat"))
        return cls(
            time.monotonic(), busy_seconds(stat, os.sysconf("SC_CLK_TCK")) if stat else None, time.process_time()
        )


def busy_seconds(stat: str, ticks_per_second: int) -> float:
    """CPU seconds in use since the machine started, of all cores together, from the text of /proc/stat.

    Time that a hypervisor took away ("steal") counts: it disturbs as much as any other program.
    """
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.splitlines()[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / ticks_per_second


def cores_of_others(before: CpuClock, after: CpuClock, child_seconds: float) -> float:
    """Cores that neither this process nor the child it ran has used between two moments, on average.

    Args:
        before: the child was started.
        after: the child ended.
        child_seconds: CPU seconds of the child.
    """
    if before.busy is None or after.busy is None or after.when <= before.when:
        return 0.0
    others = after.busy - before.busy - (after.own - before.own) - child_seconds
    return max(0.0, others / (after.when - before.when))


def is_disturbed(others: float, wall_seconds: float, tolerance: float) -> bool:
    """Whether others used more than ``tolerance`` cores.

    /proc/stat counts in ticks of 10 ms, per core; in a short run that alone looks like other people's work, and three
    ticks are forgiven.
    """
    return others > tolerance + 0.03 / max(wall_seconds, 1e-3)


class QuietWaiter:
    """Waits until nobody else uses the machine, at most so long in all.

    Args:
        budget_seconds: for all waits together.
        tolerance: cores that others may use.
        say: is told what is waited for.
    """

    def __init__(self, budget_seconds: float, tolerance: float, say) -> None:
        self.left = budget_seconds
        self._tolerance = tolerance
        self._say = say

    def wait(self, look_seconds: float = 0.5) -> float:
        """Returns the cores that others use at the end."""
        said = False
        while True:
            before = CpuClock.now()
            time.sleep(look_seconds)
            others = cores_of_others(before, CpuClock.now(), 0.0)
            if not is_disturbed(others, look_seconds, self._tolerance) or self.left <= 0:
                return others
            if not said:
                self._say(f"other programs use {others:.1f} cores; waiting for at most {self.left:.0f} s")
                said = True
            self.left -= look_seconds


def warning_of_thread_counts(threads: Sequence[int], cores: int) -> str | None:
    """What is wrong with thread counts on this machine, if anything."""
    too_many = [count for count in threads if count > cores]
    if not too_many:
        return None
    return f"{_listed(too_many)} threads on {cores} cores get in each other's way"


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))

"""How long a person waits before anything happens: `import kvsim` and `kvsim --help`, in fresh processes.

Prints the median of ten runs and the ratio to an empty Python process measured in between.
Targets: import 0.3 s, --help 0.6 s.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "empty process": ["-c", "pass"],
    "import kvsim": ["-c", "import kvsim"],
    "kvsim --help": ["-m", "kvsim", "--help"],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(10):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    empty = statistics.median(times["empty process"])
    for name, samples in times.items():
        median = statistics.median(samples)
        print(f"{name:14} {median:.3f} s (fastest {min(samples):.3f}), {median / empty:.1f} x an empty process")


if __name__ == "__main__":
    main()

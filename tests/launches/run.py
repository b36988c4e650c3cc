"""Runs a program that computes on a GPU where there is none: what it would launch is logged, and nothing is computed.

The CUDA half of libtorch itself runs, above libraries that stand in for the CUDA runtime, the driver and cuBLAS. Memory of the
device is memory of the host, copies and `draw` (token 5, always) are made, every other kernel leaves its output as it is.
Captures of graphs are kept, and work that CUDA refuses within them is refused.

    python3 tests/launches/run.py --site SITE [--quiet] -- target/release/pacs-worker bench decode --device cuda --shape qwen2.5-0.5b

SITE is the `site-packages` of a Python with torch 2.11 (`pip install torch==2.11.0`; nothing of it is run). The log goes to
`target/launches/log`, a line each launch, copy, wait, allocation and graph; `--quiet` leaves it out, for times: what is left
is the time of the host.
"""

import argparse
import glob
import os
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
BUILD = HERE.parent.parent / "target" / "launches"
LIBRARIES = {"cudart": "libcudart.so.13", "cublas": "libcublas.so.13", "cublasLt": "libcublasLt.so.13", "cuda": "libcuda.so.1"}
# What the headers of the CUDA runtime take from a package that torch does not need.
HOST_DEFINES = """
#pragma once
#define __host__
#define __device__
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define __cudart_builtin__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __inline__ inline
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
"""


def exported(library: str) -> list[str]:
    lines = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    symbols = {line.split()[-1].split("@")[0] for line in lines.splitlines() if line.split()[-2] in "TW"}
    return sorted(symbol for symbol in symbols if re.fullmatch(r"\w+", symbol))


def driver_functions() -> list[str]:
    """What the bindings that the trainer calls the driver by look for."""
    bindings = glob.glob(os.path.expanduser("~/.cargo/registry/src/*/cudarc-*/src/driver/sys/mod.rs"))
    if not bindings:
        sys.exit("cudarc is not in ~/.cargo/registry: build the trainer first")
    text = pathlib.Path(sorted(bindings)[-1]).read_text()
    return sorted(set(re.findall(r"pub (?:unsafe )?fn (cu[A-Z]\w+)\(", text)))


def compile_library(name: str, symbols: list[str], include: list[str]) -> None:
    """A function of every name; those that the source next to this file does not have do nothing and succeed."""
    source = HERE / f"{name}.cpp"
    own = set(re.findall(r"^EXPORT .*?(\w+)\(", source.read_text(), re.MULTILINE))
    rest = BUILD / f"{name}_rest.c"
    functions = (f"long {symbol}() {{ return 0; }}\n" for symbol in symbols if symbol not in own)
    rest.write_text("".join(functions))
    soname = LIBRARIES[name]
    version = BUILD / f"{name}.map"
    version.write_text(f"{soname} {{ *; }};\n")
    objects = []
    for path, compiler in ((source, ["g++", "-std=c++17"]), (rest, ["gcc", "-fno-builtin"])):
        objects.append(str(BUILD / f"{path.stem}.o"))
        subprocess.run([*compiler, "-w", "-O1", "-fPIC", "-c", *include, "-o", objects[-1], path], check=True)
    script = [] if name == "cuda" else [f"-Wl,--version-script={version}"]
    command = ["g++", "-shared", f"-Wl,-soname,{soname}", *script, "-o", str(BUILD / soname), *objects, "-ldl"]
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", required=True, type=pathlib.Path, help="site-packages with torch 2.11 and its CUDA libraries")
    parser.add_argument("--quiet", action="store_true", help="log nothing")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    cuda = arguments.site / "nvidia" / "cu13"
    if not (arguments.site / "torch" / "lib" / "libtorch_cuda.so").exists() or not cuda.exists():
        parser.error(f"{arguments.site} has no torch with CUDA 13")
    (BUILD / "crt").mkdir(parents=True, exist_ok=True)
    for header in ("host_defines.h", "host_config.h"):
        (BUILD / "crt" / header).write_text(HOST_DEFINES)
    include = [f"-I{BUILD}", f"-I{cuda / 'include'}"]
    for name, soname in LIBRARIES.items():
        symbols = driver_functions() if name == "cuda" else exported(str(cuda / "lib" / soname))
        compile_library(name, symbols, include)
    log = BUILD / "log"
    log.unlink(missing_ok=True)
    folders = [BUILD, arguments.site / "torch" / "lib", *sorted((arguments.site / "nvidia").glob("*/lib"))]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(str(BUILD / soname) for soname in LIBRARIES.values()),
        "LD_LIBRARY_PATH": ":".join(map(str, folders)),
        "LAUNCH_LOG": "/dev/null" if arguments.quiet else str(log),
        # Segments that grow are mapped by functions of the driver that have no stand-in.
        "PYTORCH_ALLOC_CONF": "expandable_segments:False",
    }
    ended = subprocess.run(arguments.command, env=environment)
    if not arguments.quiet:
        print(f"log: {log}", file=sys.stderr)
    sys.exit(ended.returncode)


if __name__ == "__main__":
    main()

"""Small cases of every GPU kernel under compute-sanitizer: ``python -m tests.kernels.sanitize``.

memcheck and racecheck, for each backend a process. Where the tool is missing or cannot attach to the device, one
line says so and the exit code is 0; it is 1 when the tool found an error or the cases failed.
"""

import argparse
import os
import shutil
import subprocess
import sys

TOOL = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
BACKENDS = ("cuda", "triton")
FOUND = 9  # exit code when the tool found an error
SECONDS = 150  # of one process; kernels under the tool run tens of times slower
PROBE = "import torch; torch.ones(8, device='cuda').sum().item()"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=BACKENDS, help="run the cases of one backend, without the tool")
    args = parser.parse_args()
    if args.cases:
        run_cases(args.cases)
        return 0
    if shutil.which(TOOL) is None:
        print(f"{TOOL} is not on the PATH: skipped")
        return 0
    probe = sanitized("memcheck", ["-c", PROBE])
    if probe is None or probe.returncode:
        last = "it timed out" if probe is None else next(reversed(probe.stdout.strip().splitlines()), "no output")
        print(f"{TOOL} cannot attach here: skipped ({last})")
        return 0
    return max([check(tool, backend) for backend in BACKENDS for tool in TOOLS])


def sanitized(tool: str, command: list[str]) -> subprocess.CompletedProcess[str] | None:
    """Python with ``command`` under one of the tools; None when it took too long."""
    start = [TOOL, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "10", sys.executable, *command]
    # every tensor in an allocation of its own, or reads past its end would be inside a larger block
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        return subprocess.run(
            start, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return None


def check(tool: str, backend: str) -> int:
    """Exit code of one tool on one backend's cases; what it found is printed."""
    done = sanitized(tool, ["-m", "tests.kernels.sanitize", "--cases", backend])
    if done is None:
        print(f"{tool}, {backend}: stopped after {SECONDS} s, nothing found until then")
        return 0
    if done.returncode == 0:
        print(f"{tool}, {backend}: clean")
        return 0
    what = "errors" if done.returncode == FOUND else "the cases failed"
    print(f"{tool}, {backend}: {what}\n{done.stdout.rstrip()[-6000:]}")
    return 1


def run_cases(backend: str, device: str = "cuda") -> None:
    """Every op on ragged spans, with extents that fill no tile and extents that fill them; all results are finite."""
    import torch

    import saap_kernels as K

    spans = torch.tensor([[0, 64], [65, 66], [66, 149]], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for rows, columns in ((130, 150), (128, 256)):
            shapes = ((150, columns), (150, rows), (rows, columns))
            x, dy, w = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes)
            with K.use_backend(backend):
                results = [
                    op(x, dy, w, spans, axis=axis, unit_size=2)
                    for op in (K.weight_salience, K.coupled_salience)
                    for axis in ("out", "in")
                ]
                results.append(K.activation_salience(dy, dy, spans, unit_size=2))
                results.append(K.activation_statistics(x, spans, shift=torch.ones(columns, device=device)))
                results += K.activation_salience_statistics(x, x, spans)
            assert all(bool(torch.isfinite(result).all()) for result in results)
        run_products(backend, device, dtype, generator)


def run_products(backend, device, dtype, generator) -> None:
    """The inference ops: few rows of many columns, which several blocks share, rows that fill no tile, a GEMM."""
    import torch

    import saap_kernels as K

    for tokens, rows, columns in ((1, 33, 8200), (5, 200, 150), (16, 65, 300), (40, 131, 301)):
        sizes = (tokens, columns), (rows, columns)
        x, w = (torch.randn(*size, generator=generator).to(device, dtype) for size in sizes)
        for bits, group in ((16, None), (8, None), (4, 32)):
            both = K.pack(torch.stack([w, w]), bits=bits, group_size=group)
            with K.use_backend(backend):
                results = [
                    K.linear(x, K.pack(w, bits=bits, group_size=group)),
                    K.gated_linear(x, both, activation="silu"),
                    K.gated_mlp(x, both, K.pack(w.T, bits=bits, group_size=group), activation="silu"),
                ]
            assert all(bool(torch.isfinite(result).all()) for result in results)


if __name__ == "__main__":
    sys.exit(main())

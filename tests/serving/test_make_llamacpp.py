"""``make test-llamacpp``: the environment of llama.cpp is built when it lacks llama.cpp, and only then."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
# makes an environment of copies of itself; there llama.cpp can be imported once pip has run to its end
STUB = """#!/bin/sh
echo "$0 $*" >> "$LOG"
case "$*" in
    *"import llama_cpp"*) test -e "$0.built"; exit;;
    *"-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python";;
    *"pip install"*) test -z "$BROKEN" && touch "$0.built"; exit;;
    *pytest*) echo "cases use $LLAMACPP_PYTHON" >> "$LOG";;
esac
"""


def test_llama_cpp_is_built_once(tmp_path) -> None:
    main, llama, log = tmp_path / "main", tmp_path / "llama", tmp_path / "log"
    (main / "bin").mkdir(parents=True)
    (main / "bin/python").write_text(STUB)
    (main / "bin/python").chmod(0o755)
    (main / ".installed-a-b").touch()  # complete, and newer than all it is made from
    command = ["make", "test-llamacpp", "TORCH=a", "TRANSFORMERS=b", "LLAMACPP=llama", f"PYTHON={main}/bin/python"]
    command += [f"VENV={main}", f"LLAMACPP_VENV={llama}"]
    codes = []
    for broken in ("yes", "", ""):
        environment = os.environ | {"LOG": str(log), "BROKEN": broken}
        codes.append(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment).returncode)
    assert codes[0] != 0 and codes[1:] == [0, 0]
    asked = [line.replace(f"{tmp_path}/", "") for line in log.read_text().splitlines()]
    build = ["main/bin/python -m venv llama", "llama/bin/python -m pip install --quiet llama"]
    check = "llama/bin/python -c import llama_cpp.server.app"
    cases = [
        "main/bin/python -m pytest -q -s --durations=5 tests/serving/llamacpp_cases.py",
        "cases use llama/bin/python",
    ]
    assert asked == build + [check] + build + cases + [check] + cases

"""lit settings of this folder. `pytest tests/test_filecheck.py` runs it; by hand, with its output:
`.venv/bin/lit -v tests/filecheck/passes/some_pass.dlir`.
"""

import os
import sys

import lit.formats

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))

config.name = "dlbc"
config.test_format = lit.formats.ShTest()
config.suffixes = [".dlir"]
config.test_source_root = HERE
config.test_exec_root = lit_config.params.get("output") or os.path.join(ROOT, "build", "filecheck")

# The interpreter that runs lit runs the tools.
config.substitutions += [
    ("%dlbc-opt", f'"{sys.executable}" -m dlbc.opt'),
    ("%filecheck", f'"{sys.executable}" -m filecheck'),
]
config.environment["PYTHONPATH"] = os.pathsep.join([ROOT, os.path.join(ROOT, "runtime")])
config.environment["DLBC_DEBUG"] = "1"
config.environment["NO_COLOR"] = "1"
config.environment["COLUMNS"] = "200"
for name in ("DLBC_CACHE_DIR", "OMP_NUM_THREADS"):
    if name in os.environ:
        config.environment[name] = os.environ[name]

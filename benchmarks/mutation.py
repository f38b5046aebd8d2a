"""Breaks the code in many small ways, one at a time, and lists the changes that no test notices.

mutmut's operators make the mutants. mutmut's own runner is not used: it puts a trampoline in the place of each function,
which Dynamo would trace, and it omits most decorated functions. Here each mutant runs in a fork of a process that has imported
torch and transformers, but not deltakit: the fork loads the changed module instead of the one on disk, and runs tests that
execute the changed line until one fails. Those in `mutation_equivalents.md` change nothing that can be seen.
"""

import argparse
import ast
import collections
import contextlib
import hashlib
import importlib
import json
import os
import resource
import sys
import tempfile
import traceback
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# This folder's coverage.py would hide the package of that name.
sys.path.pop(0)
import coverage
import libcst as cst
import pytest
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ["core", "injection", "ops", "delta", "files"]
# Tests that start processes, which load the module on disk, and those of the docs and of the package's shape.
OMITTED = ["engines/test_compile.py", "engines/test_distributed.py", "engines/test_launchers.py"]
# `test_growth.py` counts lines, of which coverage runs some while it measures.
OMITTED += ["demo", "test_docs.py", "test_architecture.py", "test_growth.py"]
# No jaxtyping: its checks would kill mutants that no test notices.
OPTIONS = ["-m", "not slow", "--doctest-modules", "-x", "-q", "--assert=plain", "-oaddopts=", "-pno:cacheprovider"]
OPTIONS += [f"-c{ROOT}/pyproject.toml", *(f"--ignore={ROOT}/tests/{name}" for name in OMITTED)]
SHARE = 0.2  # the part of the suite's time that the tests of one mutant may take


class Mutants(cst.CSTVisitor):
    """All mutants of the file at `path`, in `found`: (this, name, line, node, its replacement)."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, path):
        super().__init__()
        self.path, self.lines, self.found = path, path.read_text().splitlines(), []
        self.wrapper = MetadataWrapper(cst.parse_module(path.read_text()))
        self.wrapper.visit(self)

    def on_visit(self, node):
        # Nothing reads annotations. Of messages, which have spaces, tests compare a part. The others fail at once.
        line, text = self.get_metadata(PositionProvider, node).start.line, self.wrapper.module.code_for_node
        message = isinstance(node, cst.SimpleString) and " " in node.value
        loud = isinstance(node, cst.Call) and text(node.func) in {"len", "isinstance"}
        if message or loud or isinstance(node, cst.Annotation | cst.Decorator | cst.Import | cst.ImportFrom):
            return False
        for kind, operator in mutation_operators:
            for new in operator(node) if isinstance(node, kind) else ():
                change = " ".join(f"`{text(node)}` to `{text(new)}` in `{self.lines[line - 1]}`".split())
                self.found.append((self, f"{self.path.relative_to(ROOT)}: {change}", line, node, new))
        return True


class Tests:
    """A pytest plugin: it runs the chosen tests in their order, or measures which lines each test executes."""

    def __init__(self, chosen=None, measured=None):
        self.chosen, self.measured, self.seconds = chosen, measured, collections.Counter()

    def pytest_collection_modifyitems(self, items):
        found = {item.nodeid: item for item in items}
        items[:] = items if self.chosen is None else [found[name] for name in self.chosen]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        if self.measured:
            self.measured.switch_context(item.nodeid)
        else:  # A loop without end meets a limit of processor time, a minute more than 20 times what the test took.
            used = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(used.ru_utime + used.ru_stime + 60 + 20 * self.chosen[item.nodeid])
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration


def fork(folder, work):
    """Calls work() in a new process, in a new folder, where `log` is its output. Its result is the exit status."""
    if pid := os.fork():
        return pid
    status = 99
    try:
        folder.mkdir()
        os.chdir(folder)
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
        log = os.open("log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def measure(folder):
    """Runs all tests, and writes down the seconds of each, the tests of each line, and the modules imported."""
    measured = coverage.Coverage(data_file=None, config_file=False, source=[f"{ROOT}/deltakit"])
    tests = Tests(measured=measured)
    measured.start()
    status = pytest.main([*OPTIONS, f"--basetemp={folder}/tmp", f"{ROOT}/tests", f"{ROOT}/deltakit"], [tests])
    measured.stop()
    data = measured.get_data()
    lines = {file: data.contexts_by_lineno(file) for file in data.measured_files()}
    ours = ("deltakit", "support", "conftest", "test_", "__main__")
    modules = [name for name in sys.modules if not name.startswith(ours)]
    (folder / "measured.json").write_text(json.dumps([tests.seconds, lines, modules]))
    return status


def run(folder, path, source, chosen):
    """Runs the chosen tests with `source` as the module at `path`."""
    if not chosen:
        return 0
    on_disk, changed = SourceFileLoader.get_code, compile(source, path, "exec")
    SourceFileLoader.get_code = lambda self, name: changed if self.path == str(path) else on_disk(self, name)
    files = sorted({f"{ROOT}/{name.split('::')[0]}" for name in chosen})
    return pytest.main([*OPTIONS, f"--basetemp={folder}/tmp", *files], [Tests(chosen)])


def tests_of(path, line, lines, seconds):
    """Tests that execute a line (for what runs at the import, any line of the file), with their seconds."""
    statements = (s for s in ast.walk(ast.parse(path.read_text())) if isinstance(s, ast.stmt))
    start = max(s.lineno for s in statements if s.lineno <= line <= s.end_lineno)
    names = next((set(lines[str(n)]) for n in range(line, start - 1, -1) if str(n) in lines), set())
    found = set().union(*lines.values()) - {""} if names == {""} else names - {""}
    # One case of each parametrized test, then a second one of each, and so on; the fastest first.
    cases, order = collections.Counter(), []
    for test in sorted(found, key=seconds.get):
        order.append((cases[test.split("[")[0]], seconds[test], test))
        cases[test.split("[")[0]] += 1
    left, chosen = SHARE * sum(seconds.values()), {}
    for _, spent, test in sorted(order):
        if spent <= left or not chosen:
            chosen[test], left = spent, left - spent
    return chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", default="0", help="another seed is another sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="only mutants with this text in their names")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    work = Path(tempfile.mkdtemp(prefix="mutation-"))
    print(f"measures the tests, for some minutes; logs in {work}", flush=True)
    if os.waitpid(fork(work / "measured", partial(measure, work / "measured")), 0)[1]:
        sys.exit("the tests fail without any mutant")
    seconds, lines, modules = json.loads((work / "measured/measured.json").read_text())
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    files = [path for room in ROOMS for path in sorted((ROOT / "deltakit" / room).rglob("[!_]*.py"))]
    mutants = [mutant for path in files for mutant in Mutants(path).found if options.only in mutant[1]]
    # In the order of digests: a change of one file leaves the sample of the others nearly as it is.
    mutants.sort(key=lambda mutant: hashlib.sha256(f"{options.seed}{mutant[1]}".encode()).digest())
    equivalent = Path(__file__).with_name("mutation_equivalents.md").read_text()
    counts, running = collections.defaultdict(collections.Counter), {}

    def wait():
        pid, status, usage = os.wait4(-1, 0)
        number, path, name, line = running.pop(pid)
        result = "killed" if status else "equivalent" if name in equivalent else "survived"
        if number:
            counts[path.relative_to(ROOT).parts[1]][result] += 1
        elif status:
            sys.exit(f"the tests fail in a fork without any mutant: see {work}/0/log")
        else:
            result = "passed"
        spent = f"exit status {status >> 8 or status}, {usage.ru_utime:.0f} s"
        print(f"{result} {number} ({spent}): line {line} of {name}", flush=True)

    # The first is no mutant: all tests must pass.
    owner, _, _, same, _ = mutants[0]
    todo = [(owner, "unchanged", 1, same, same), *mutants[: options.mutants]]
    for number, (mutated, name, line, node, new) in enumerate(todo):
        if len(running) == options.jobs:
            wait()
        source = mutated.wrapper.module.deep_replace(node, new).code
        here = lines.get(str(mutated.path), {})
        chosen = tests_of(mutated.path, line, here, seconds) if number else seconds
        folder = work / str(number)
        running[fork(folder, partial(run, folder, mutated.path, source, chosen))] = number, mutated.path, name, line
    while running:
        wait()
    print(f"{len(mutants)} mutants in all; of those that ran:")
    for room, count in counts.items():
        print(f"{room}: {dict(count)}")


if __name__ == "__main__":
    main()

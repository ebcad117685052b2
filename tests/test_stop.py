"""Leaving: signals before, in and after the training loop, exit codes, and output that nobody
takes. The scripts here import no PyTorch, so that each takes a moment."""
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from running import stop
from running.stop import StopSignal


ROOT = Path(__file__).resolve().parents[1]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

SCRIPT = """
import ctypes, os, sys, time
from running import stop

def block():
    # In C, where Python's own handlers would not be called: a lock that is taken twice.
    mutex = ctypes.create_string_buffer(100)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)


stop.begin_script()
"""
BUSY = """
print("ready")
block()
"""
LOOP = """
with stop.StopSignal() as signals:
    print("ready")
    for step in range(1, 100):
        time.sleep(0.2)
        print("step", step)
        if signals.leaving():
            break
print("left")
sys.exit(stop.exit_code())
"""


def start(tmp_path, code, before=None, rank="0", **options):
    """A script that has printed "ready", if it can."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT + code)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    process = subprocess.Popen(
        [sys.executable, path], text=True, preexec_fn=before, **options,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RANK": rank})
    if process.stdout:
        assert process.stdout.readline() == "ready\n"
    return process


def finish(process):
    """(exit code, stdout, stderr)."""
    try:
        out, err = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert "Traceback" not in err
    return process.returncode, out, err


# Before the loop, and in other scripts

@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_script_in_one_line(tmp_path, number):
    process = start(tmp_path, BUSY)
    begin = time.monotonic()
    process.send_signal(number)
    code, out, err = finish(process)
    assert (code, out, err) == (128 + number, "", f"script.py: stopped by {number.name}\n")
    assert time.monotonic() - begin < 5


def test_a_shell_does_not_go_on(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT + "os.kill(os.getpid(), 2); block()")
    command = f"{sys.executable} {tmp_path}/script.py && echo next"
    result = subprocess.run(command, shell=True, capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 130 and result.stdout == ""


def test_what_was_printed_is_not_lost(tmp_path):
    process = start(tmp_path, """
print("ready")
sys.stdout.write("half a line")
print("written", file=sys.stderr)
block()
""")
    assert process.stderr.readline() == "written\n"
    process.send_signal(signal.SIGTERM)
    assert finish(process)[:2] == (143, "half a line")


def test_only_rank_0_says_it(tmp_path):
    process = start(tmp_path, BUSY, rank="1")
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (143, "", "")


def test_nohup_is_respected_and_ctrl_c_in_the_background_works(tmp_path):
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)        # as a shell does for `script.py &`
    for code in (BUSY, LOOP):
        process = start(tmp_path, code, ignore)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert finish(process)[0] == 130


def test_children_get_signals_as_ever(tmp_path):
    process = start(tmp_path, """
child = os.fork()
if not child:
    time.sleep(30)
os.kill(child, 15)
print("ready")
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert finish(process) == (0, "-15\n", "")


def test_errors_end_in_one_line_once_for_all_ranks(tmp_path):
    process = start(tmp_path, 'print("ready"); stop.fail(ValueError("odd"))')
    assert finish(process) == (1, "", "script.py: odd\n")
    process = start(tmp_path, 'print("ready"); stop.fail("odd")', rank="1")
    process.send_signal(signal.SIGTERM)                     # torchrun, once rank 0 has failed
    assert finish(process) == (143, "", "")
    process = start(tmp_path, 'print("ready"); stop.fail("odd")', rank="1")
    assert finish(process) == (1, "", "script.py: rank 1: odd\n")       # rank 0 has not


# In the loop

def will_end(number):
    return (f"script.py: {number.name}: the step will be ended and saved; another one ends the run "
            "at once\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_lets_the_step_end(tmp_path, number):
    process = start(tmp_path, LOOP)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 128 + number and out.endswith("left\n") and err == will_end(number)
    assert "step 1\n" in out and "step 5\n" not in out


def test_the_second_signal_ends_the_run_at_once(tmp_path):
    process = start(tmp_path, LOOP.replace("time.sleep(0.2)", "block()"))
    process.send_signal(signal.SIGTERM)
    time.sleep(stop.ONE_WISH + 0.2)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130 and out == ""
    assert err == will_end(signal.SIGTERM) + (
        "script.py: stopped by SIGINT, the second signal, before the step was saved; go on with "
        "--resume\n")


def test_signals_in_quick_succession_are_one(tmp_path):
    """Slurm sends SIGTERM to all processes, and torchrun passes its own on; the loop is left, and
    what follows it is not ended either."""
    process = start(tmp_path, LOOP.replace('print("left")', 'time.sleep(0.5); print("left")'))
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
        time.sleep(0.1)
    code, out, err = finish(process)
    assert code == 143 and out.endswith("left\n") and err == will_end(signal.SIGTERM)


def test_a_signal_after_the_last_step_still_counts(tmp_path):
    code = 'print("ready")\nwith stop.StopSignal():\n    os.kill(os.getpid(), 15); time.sleep(.5)\n'
    assert finish(start(tmp_path, code + "sys.exit(stop.exit_code())"))[0] == 143


# In other programs: no begin_script

def test_a_notebook_gets_its_handlers_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignal() as signals:
        assert not signals.leaving()
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.leaving() and signals.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.exit_code() == 130
    with StopSignal() as signals:
        assert stop.exit_code() == 0
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_in_another_thread_signals_are_left_alone():
    handlers, before = [], signal.getsignal(signal.SIGTERM)

    def loop():
        with StopSignal() as signals:
            handlers.append(signal.getsignal(signal.SIGTERM))
            assert not signals.leaving()
    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert handlers == [before]


# Output that nobody takes

WRITE = """
print("ready")
for i in range(200):
    print("line", i, "x" * 1000)
    time.sleep(0.002)
open(sys.argv[0] + ".done", "w").write("done")
"""


def is_done(tmp_path):
    return (tmp_path / "script.py.done").read_text() == "done"


def test_lines_are_flushed(tmp_path):
    process = start(tmp_path, 'print("ready"); print("next"); print("last", file=sys.stderr); '
                              'block()')
    assert process.stdout.readline() == "next\n" and process.stderr.readline() == "last\n"
    process.kill()
    process.communicate()


def test_the_work_goes_on_when_the_reader_leaves(tmp_path):
    process = start(tmp_path, WRITE)
    process.stdout.close()
    assert process.wait(20) == 0 and is_done(tmp_path)
    assert process.stderr.read() == ("script.py: stdout cannot be written (Broken pipe); going on "
                                     "without\n")
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_the_work_goes_on_when_the_disk_is_full(tmp_path):
    with open("/dev/full", "w") as full:
        process = start(tmp_path, WRITE, stdout=full)
        code, _, err = finish(process)
    assert code == 0 and is_done(tmp_path) and err.count("\n") == 1


def test_closed_streams_do_not_get_mixed_with_files(tmp_path):
    def close():
        os.close(1)
        os.close(2)
    code = """
file = open(sys.argv[0] + ".done", "w")
print("text"); print("text", file=sys.stderr)
os.write(1, b"text"); os.write(2, b"text")
file.write("done")
"""
    process = start(tmp_path, code, close, stdout=None, stderr=None)
    assert process.wait(20) == 0 and is_done(tmp_path)


def test_a_closed_terminal_stops_a_run_after_its_step(tmp_path):
    """SIGHUP, and then all that is written fails: on stderr and stdout alike."""
    code = LOOP.replace('print("left")', 'open(sys.argv[0] + ".done", "w").write("done")')
    (tmp_path / "script.py").write_text(SCRIPT + code)
    pid, terminal = pty.fork()
    if not pid:
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, str(tmp_path / "script.py")])
    assert os.read(terminal, 100).startswith(b"ready")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129 and is_done(tmp_path)


def test_a_terminal_of_ascii_costs_no_table():
    done = subprocess.run(
        [sys.executable, "-c", "from running import stop; stop.begin_script(); print('Δ = 1')"],
        cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\\u0394 = 1\n")

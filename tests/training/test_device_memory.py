"""How much memory a run has needed."""

from __future__ import annotations

from tests.builders.memory import needs_linux

CHILD = "from library.training.device_memory import peak_of_process; print(peak_of_process())"


@needs_linux
def test_the_peak_is_not_that_of_the_program_which_started_the_run(run_script):
    """As where a GUI that holds much memory starts the training."""
    code = (
        "import subprocess, sys\n"
        "held = b'x' * 1_500_000_000\n"
        f"print(subprocess.run([sys.executable, '-c', {CHILD!r}], capture_output=True, text=True).stdout)"
    )
    done = run_script("-c", code)
    assert done.returncode == 0, done.stderr
    assert 0.05 < float(done.stdout) < 1

"""The shell completes commands, YAML files and folders."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --")]
)
def test_the_completion_script_of_each_shell(shell, word):
    done = subprocess.run(
        [sys.executable, "-m", "spark_ray", "completion", shell],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    assert word in done.stdout
    assert "_SPARK_RAY_COMPLETE" in done.stdout


def completed(cwd, line):
    words = f"spark-ray {line}"
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'spark-ray'; from spark_ray.cli import main; sys.exit(main())"],
        capture_output=True, text=True, check=False, timeout=600, cwd=cwd,
        env={**os.environ, "_SPARK_RAY_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)},
    )  # fmt: skip
    return done.stdout.split()


def test_the_shell_completes_commands_yaml_files_and_folders(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("night.yaml", "notes.txt", "more/day.yml", ".hidden.yaml"):
        (tmp_path / name).write_text("")
    assert completed(tmp_path, "resu") == ["plain,resume"]
    assert completed(tmp_path, "sweep n") == ["plain,night.yaml"]
    assert completed(tmp_path, "plan ") == ["plain,night.yaml", "plain,more/"]
    assert completed(tmp_path, "plan more/") == ["plain,more/day.yml"]
    assert completed(tmp_path, "plan mo") == ["file,mo"], "the shell goes into folders"
    assert completed(tmp_path, "status ru") == ["dir,ru"]

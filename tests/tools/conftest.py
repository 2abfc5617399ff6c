"""The command line, run in this process."""

import pytest

from prefixkv_cache.cli import main


@pytest.fixture
def run(capsys):
    """Run a command in this process; returns exit status, standard output and standard error."""

    def run(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as ended:  # argparse
            status = ended.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return run

"""What unit tests share: a slow machine is not a failure; and the command line in a folder with a small text."""

import pytest
from hypothesis import settings

from slm_lib.__main__ import main

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture
def slm(tmp_path, monkeypatch, capsys):
    """The command line, in this process: words to (what it printed, what it died of)."""
    (tmp_path / "mine.txt").write_text("Now is the winter of our discontent\nMade glorious summer;\n" * 60)
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr("sys.argv", ["slm_lib", *words])
        died = ""
        try:
            main()
        except SystemExit as error:
            died = str(error.code)
        printed = capsys.readouterr()
        return printed.out + printed.err, died

    return call

"""The Hub on loopback, as in the tests of files."""

from files.conftest import hub as hub
